"""The study: its stages in order, what each depends on and leaves on disk.

Settings come in, a sweep's folder comes out. It uses `cluster`, `search` and `tracking`.
"""
