"""What is said and shown of `rankdecay margin`."""
