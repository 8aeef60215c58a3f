"""Writes the tree of modules in docs/architecture.md from the first sentence of each module's docstring.

python .ci/architecture.py            # write
python .ci/architecture.py --check    # fail if it is not up to date
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "rankdecay"
DOCUMENT = ROOT / "docs" / "architecture.md"
LONGEST = 130  # characters of a sentence; of a longer one what stands before its colon
BLOCK = re.compile(r"(<!-- modules -->\n```text\n).*?(```\n<!-- end -->)", re.DOTALL)
#: Modules of a folder by layer, from what everything stands on; one not named follows in alphabetical order.
LAYERS = {
    "rankdecay": [
        "files", "text", "checks", "dtensor", "rules", "linalg", "spectrum", "attention", "decay", "compress",
        "inspection", "monitor", "audit", "integrations", "compat", "browser", "completion", "commands", "cli", "lab",
    ],
    "lab": [
        "errors", "settings", "machine", "convex", "store", "stored", "unfit", "precision", "progress", "tasks",
        "report", "ensemble", "session", "experiment", "experiments", "cli",
    ],
}  # fmt: skip
FIRST = ["errors", "settings", "stored", "rules", "experiment"]  # the same in any other folder


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    whole = re.split(r"(?<=[.?])\s", " ".join(text.split("\n\n")[0].split()))[0]
    return whole if len(whole) <= LONGEST else whole.split(": ")[0]


def lines(folder: Path, depth: int = 0) -> list[str]:
    """One line per module below a folder."""
    found = []
    names = [path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    order = {name: number for number, name in enumerate(LAYERS.get(folder.name, FIRST))}
    for path in sorted(names, key=lambda path: (order.get(path.stem, len(order)), path.stem)):
        if path.name == "__init__.py":
            continue
        module = path if path.is_file() else path / "__init__.py"
        name = "  " * depth + path.name + ("/" if path.is_dir() else "")
        found.append(f"{name:<24} {sentence(module)}".rstrip())
        if path.is_dir():
            found += lines(path, depth + 1)
    return found


def main() -> int:
    """Write or check the tree; return the exit code."""
    before = DOCUMENT.read_text(encoding="utf-8")
    tree = "\n".join(lines(SOURCE)) + "\n"
    after = BLOCK.sub(lambda match: match[1] + tree + match[2], before)
    if "--check" not in sys.argv:
        DOCUMENT.write_text(after, encoding="utf-8")
    elif after != before:
        print("docs/architecture.md is not up to date: run python .ci/architecture.py")
        return 1
    undocumented = [line for line in lines(SOURCE) if len(line.split()) < 3]
    if undocumented:
        print("without a docstring:", *undocumented, sep="\n")
    return int(bool(undocumented))


if __name__ == "__main__":
    sys.exit(main())
