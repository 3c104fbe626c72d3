"""Splicing edits a running model, and runs forward passes, scoring and decoding with that edit in place.

In: models, transcoders and token ids. Out: scores and tokens. Nothing here knows about tables or behaviours.
"""
