"""Command ``rankdecay compress``: the same model with a smaller head, as an ordinary checkpoint."""

import argparse
from pathlib import Path
from typing import Any

from rankdecay.commands.parser import CommandError, Parser, explained
from rankdecay.commands.progress import Progress
from rankdecay.text import json_text

COMPRESS = "Write the same model with a smaller head and KV cache, as an ordinary checkpoint, and say what it costs."
#: Command lines to show at the end of ``--help``, with what each does.
COMPRESS_EXAMPLES = {
    "rankdecay compress model --dry-run": "what smaller heads would cost; writes nothing",
    "rankdecay compress model --head-dim 8 --out smaller --calibration text.txt": "write one, chosen on a text",
}
#: What the command without arguments lacks.
_WANTED = (
    "needs the PATH of a model: rankdecay compress model --dry-run shows what smaller heads cost, "
    "rankdecay compress model --head-dim 64 --out smaller writes one"
)


def compress_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser("compress", COMPRESS, COMPRESS_EXAMPLES, _WANTED)
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="directory of save_pretrained; a causal language model of transformers")
    add("--head-dim", type=int, metavar="N", help="size of a head wanted: even, better a multiple of 8")
    add("--out", type=Path, metavar="DIR", help="directory to write, which must not exist")
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text of what the model is for, on which planes and values are chosen and the loss is measured; without "
        "it the weights alone decide, which costs much more",
    )
    add("--window", type=int, metavar="N", help="tokens of a window of the text (default: 512)")
    add("--windows", type=int, metavar="N", help="windows of the text, half of which choose (default: 24)")
    add("--sizes", type=int, nargs="*", metavar="N", help="other head sizes to show (default: 7/8, 3/4 and 1/2)")
    add("--dry-run", action="store_true", help="show what head sizes would cost, and write nothing")
    add("--json", action="store_true", help="print the result as JSON")
    add("--quiet", action="store_true", help="no progress on standard error")
    return parser


def compress_command(settings: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    if settings.head_dim is None and not settings.dry_run:
        raise CommandError("rankdecay compress needs --head-dim N; --dry-run shows what head sizes cost")
    if settings.out is None and not settings.dry_run:
        raise CommandError("rankdecay compress needs --out DIR, a directory that does not exist yet; or --dry-run")
    of_text = {name: value for name in ("window", "windows") if (value := getattr(settings, name)) is not None}
    if of_text and settings.calibration is None:
        raise CommandError(f"--{next(iter(of_text))} is of a text: give one, --calibration FILE")
    from rankdecay.compress import compress, plan

    path: Path = settings.path
    size: int | None = settings.head_dim
    how: dict[str, Any] = {
        **of_text,
        "sizes": settings.sizes,
        "progress": None if settings.quiet else Progress(),
    }
    try:
        if settings.dry_run:
            result = plan(path, size, settings.calibration, **how)
        else:
            assert size is not None
            result = compress(path, size, settings.out, settings.calibration, **how)
    except ValueError as error:
        raise explained(error, settings.path) from None
    print(json_text(result.to_json() | {"command": "compress"}) if settings.json else result)
    return 0
