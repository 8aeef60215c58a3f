"""The experiments, one folder each; another package can add one (see `lab.experiment`)."""

ORDER = ("grok", "boundary", "factor", "rotary", "margin", "recall", "language", "vision")  # in the help
