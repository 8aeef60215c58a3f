"""A vision transformer with a separate decay of its attention."""
