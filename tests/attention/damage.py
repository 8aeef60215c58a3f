"""Files with bytes flipped, cut out and cut off at random: never another exception than the one that names the file."""

from __future__ import annotations

import random
import resource
from pathlib import Path

import rankdecay as rd


def check_damaged(content: bytes, damaged: Path, beginning: int, kilobytes: int) -> None:
    """Inspects 150 damaged versions of a file, which give an error or numbers, and never take memory beyond the file's.

    Args:
        content: of the whole file.
        damaged: where each version is written; its suffix says the format.
        beginning: bytes within which every other version is damaged, where the header is.
        kilobytes: what the process may grow by.
    """
    rng, refused = random.Random(0), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for trial in range(150):
        data = bytearray(content)
        reach = len(data) if trial % 2 else beginning
        for _ in range(rng.choice([1, 3, 30])):
            data[rng.randrange(reach)] = rng.randrange(256)
        if trial % 3 == 0:
            del data[rng.randrange(len(data)) :]
        elif trial % 3 == 1:
            cut = rng.randrange(reach)
            del data[cut : cut + rng.randrange(1, 64)]
        damaged.write_bytes(data)
        try:
            str(rd.inspect(damaged, num_heads=4))
        except ValueError:
            refused += 1
    assert refused > 50
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < kilobytes
