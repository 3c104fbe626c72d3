"""The sweep: its stages in order, their dependencies, and what they write to disk.

In: settings. Out: a sweep's folder. Uses `cluster`, `search` and `tracking`.
"""
