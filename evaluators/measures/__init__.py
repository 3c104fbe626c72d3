"""Measurements: each function computes the contents of one kind of cell.

Rows and a model with its patches come in, plain numbers come out.
"""
