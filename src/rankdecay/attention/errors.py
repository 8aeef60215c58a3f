"""The error that reading a checkpoint raises, whatever its format."""


class CheckpointError(ValueError):
    """Raised for a checkpoint that cannot be read; the message names the file and the reason."""
