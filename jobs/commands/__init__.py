"""The commands that are not stages of a sweep.

In: a sweep's settings and its results on disk. Out: text.
"""
