"""What hooks read from the models and store on disk: activations, the errors of base transcoders, second moments.

In: a `Context` and sites. Out: files, which trainers and controls read. The models that workers keep in memory, too.
"""
