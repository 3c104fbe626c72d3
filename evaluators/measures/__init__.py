"""Measurements: what one cell of the evaluation holds.

Rows and a model with its patches come in, plain numbers come out.
"""
