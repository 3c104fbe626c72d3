"""The evaluation: its cells, what each costs, and how a worker computes them.

In: a `Context` with trained deltas (or without, to count and forecast). Out: cells and generated texts.
"""
