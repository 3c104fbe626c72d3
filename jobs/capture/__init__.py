"""What hooks read from the models, stored on disk: activations, errors of bases, second moments.

In: a `Context` and sites. Out: files that trainers and controls read, and the models that workers cache.
"""
