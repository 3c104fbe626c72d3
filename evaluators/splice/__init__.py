"""Splicing: the edit of a running model, and its passes, scoring and decoding under that edit.

Models, transcoders and token ids come in. Nothing here knows about tables or behaviours.
"""
