"""The names of the decay rules, readable without importing torch. `linalg.shrink` says what each does."""

from typing import Literal

Rule = Literal["prox", "smooth", "polar", "newton_schulz"]
