"""A decay of attention alone: what recall, language and vision share."""
