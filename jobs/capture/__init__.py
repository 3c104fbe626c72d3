"""What hooks read from the models and store on disk: activations, the errors of base transcoders, second moments.

In: a `Context` and sites. Out: files, which trainers and controls read. It also holds the models that workers keep in
memory.
"""
