"""A language model with a separate decay of its attention."""
