"""Pages, tables, charts and figures, and the verdict of a run."""
