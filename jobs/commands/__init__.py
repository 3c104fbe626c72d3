"""The commands that are not stages of a study.

In: a study's settings and its results on disk. Out: text.
"""
