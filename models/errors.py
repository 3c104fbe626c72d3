"""The one error that this package raises for a request it cannot meet."""


class ModelError(ValueError):
    """A model or transcoder is missing, unreadable or does not fit; the message is one sentence."""
