"""What goes wrong with checkpoints, whatever their format."""


class CheckpointError(ValueError):
    """Raised for a checkpoint that cannot be read; the message names the file and the reason."""
