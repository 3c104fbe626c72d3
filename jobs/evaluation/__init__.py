"""The evaluation: its cells, what each costs, and how a worker computes them.

In: a `Context`; without trained deltas its cells can only be counted and forecast. Out: cells and generated texts.
"""
