"""The evaluation: which cells it consists of, what each costs, and how a worker computes them.

In: a `Context` whose deltas are trained, or, to count, one whose deltas are not. Out: cells and generated texts.
"""
