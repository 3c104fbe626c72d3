"""Measurements: what one cell of the evaluation holds.

Rows and a model with its sites come in, plain numbers come out.
"""
