"""The one error this folder raises for a request it cannot meet."""


class ModelError(ValueError):
    """A model or transcoder that is missing, unreadable or does not fit; the message is one sentence."""
