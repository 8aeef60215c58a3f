"""Callbacks for training frameworks; each module is imported by its user alone, and needs its framework."""
