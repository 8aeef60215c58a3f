from dataclasses import dataclass
from pathlib import Path

from rankdecay.lab.settings import Settings, check_counts, check_numbers, check_seeds


@dataclass(frozen=True)
class Toy(Settings):
    """How far does a point come that decays?"""

    decay: float = 0.1
    """Share of the distance that a step takes."""
    steps: int = 20
    """Steps."""
    seeds: int = 2
    """Points, each from a seed."""
    out: Path = Path("runs/toy")
    """Where results go."""


PRESETS = {"default": Toy(), "standard": Toy(preset="standard", steps=100)}


def check(settings: Toy) -> Toy:
    check_seeds(settings)
    check_counts(settings, "steps", "seeds")
    check_numbers(settings, "decay", zero=True)
    return settings
