"""Splicing: the edit of a running model, and its passes, scoring and decoding under that edit.

Models, transcoders and token ids come in. Nothing here knows of tables or of what a behaviour is.
"""
