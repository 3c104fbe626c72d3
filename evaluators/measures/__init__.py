"""Measurements: each function computes the contents of one kind of cell.

In: rows, and a model with what is spliced into it. Out: plain numbers.
"""
