"""What the models compute, read by hooks and kept on disk: activations, what bases leave of them, their moments.

In: a `Context` and sites. Out: files that trainers and controls read, and the models that workers keep in memory.
"""
