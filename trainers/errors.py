"""What a trainer raises when it cannot go on; the message is one sentence that a trial records as its reason."""


class TrainingError(RuntimeError):
    """A run that cannot start or go on."""


class DivergedError(TrainingError):
    """A run whose loss is not finite, or far worse than doing nothing."""
