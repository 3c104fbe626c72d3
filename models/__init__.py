"""The language model and the transcoders, as objects and as files."""
