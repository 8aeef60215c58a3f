"""The page of the matrix experiment: its words, its table and what its charts are drawn from."""
