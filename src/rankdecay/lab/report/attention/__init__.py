"""The page and the figure of an experiment on the decay of attention: `recall`, `language`, `vision`."""
