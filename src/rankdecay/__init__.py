"""Weight decay that decays rank: control, measure and explain the rank of a transformer's attention."""
