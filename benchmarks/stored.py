"""A compact copy of a run directory for `docs/data`: still one that `rankdecay report` draws."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def copy_config(run: Path, to: Path) -> None:
    """Copies a run's configuration, without the name of a folder that is nobody else's."""
    to.mkdir(parents=True, exist_ok=True)
    config = json.loads((run / "config.json").read_text())
    words = shlex.split(config["reproduce"])
    if "--out" in words:
        words[words.index("--out") + 1] = f"runs/{to.name}"
    config["reproduce"] = shlex.join(words)
    (to / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def copy(run: Path, to: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Copies a run's configuration, with `rows` in the place of its own."""
    copy_config(run, to)
    with (to / "metrics.jsonl").open("w") as file:
        for row in rows:
            file.write(json.dumps(row, separators=(",", ":")) + "\n")
