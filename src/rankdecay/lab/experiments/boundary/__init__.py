"""Phase diagram: the data fraction and strength at which a transformer generalises."""
