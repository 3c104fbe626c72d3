"""Splicing: editing a running model, and forward passes, scoring and decoding under that edit.

Models, transcoders and token ids come in. Nothing here knows about tables or behaviours.
"""
