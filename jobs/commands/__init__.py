"""What each command does that is not a stage.

A study's settings and its results on disk come in, text comes out.
"""
