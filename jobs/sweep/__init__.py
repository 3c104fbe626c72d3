"""The study: its stages in order, what each depends on and what it writes to disk.

In: settings. Out: a sweep's folder. Uses `cluster`, `search` and `tracking`.
"""
