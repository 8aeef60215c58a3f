"""Associative recall in a two-layer attention-only transformer."""
