"""What all parts of a sweep share: its settings, its folders, the keys of its results, and the disk space it needs.

In: settings. Out: a `Context`. Uses `cluster`, `search` and `tracking`, which it starts when they are first needed.
"""
