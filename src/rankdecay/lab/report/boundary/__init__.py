"""What a sweep of `rankdecay boundary` shows: its page and its figure, of one run directory or several merged."""
