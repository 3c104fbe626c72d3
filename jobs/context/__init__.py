"""What every part of a sweep is given: its settings, its folders, the keys of its results, and the disk it takes.

In: settings. Out: a `Context`. Uses `cluster`, `search` and `tracking`, which it starts when they are first needed.
"""
