"""The reference study's data: arithmetic to hand to a calculator, and sentences to repeat unchanged.

In: a seed and options. Out: rows labelled tool, copy and tool_ood, and texts. Only the presets and the `calculator`
check use this package; rows of your own take its place.
"""
