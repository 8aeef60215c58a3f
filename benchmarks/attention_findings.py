"""The tables of `docs/findings.md` on the decay of attention, from the stored rows of recall, language and vision.

    python benchmarks/attention_findings.py store runs/language docs/data/language/default   # a compact copy
    python benchmarks/attention_findings.py table docs/data/language/default                 # one line per cell
    python benchmarks/attention_findings.py layers docs/data/recall/default                  # and of each layer

A compact copy is a run directory: its rows with the measures that the tables show, so `rankdecay report` draws it too.
Rows of language without the losses of the validation text's pieces get those of the kept model, which has to have the
loss that the row says.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rankdecay.lab.attention_summary import difference, of, summarise
from rankdecay.lab.store import read_json, read_metrics

MEASURES = ("pseudo_rank", "imbalance", "nuclear_gap")
PARTS = ("query_key", "value_output")
Row = dict[str, Any]


def store(options: argparse.Namespace) -> None:
    """Copies a run directory with the measures that the tables show."""
    options.to.mkdir(parents=True, exist_ok=True)
    config = json.loads((options.run / "config.json").read_text())
    words = [word for word in config["reproduce"].split() if not word.startswith("/")]  # a folder of this machine
    config["reproduce"] = " ".join(word for word in words if word != "--out")
    (options.to / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    judge = _Judge(options.run, config)
    rows = read_metrics(options.run)
    with (options.to / "metrics.jsonl").open("w") as file:
        for row in rows:
            if row.get("ended") and not row.get("diverged") and not row.get("pieces"):
                row["pieces"] = judge.pieces(row)
            elif not row.get("ended"):
                row.pop("pieces", None)
            if "layers" in row:
                row["layers"] = [
                    {part: {m: v[m] for m in MEASURES if m in v} for part, v in layer.items()}
                    for layer in row["layers"]
                ]
            file.write(json.dumps(row, separators=(",", ":")) + "\n")
    summary = json.loads((options.run / "summary.json").read_text())
    summary["arms"] = summarise(read_metrics(options.to), summary["unit"])
    (options.to / "summary.json").write_text(json.dumps(summary, separators=(",", ":"), ensure_ascii=False) + "\n")


class _Judge:
    """Evaluates the kept models of a language run again."""

    def __init__(self, run: Path, config: Row) -> None:
        self.run, self.config = run, config
        self.problem: Any = None

    def pieces(self, row: Row) -> list[float]:
        import torch
        from safetensors.torch import load_file

        from rankdecay.lab import text
        from rankdecay.lab.experiments.language import Language, LanguageModelling

        if self.config["command"] != "language" or row["seed"] != 0:
            return []
        if self.problem is None:
            fields = Language.__dataclass_fields__
            settings = Language(**{k: v for k, v in self.config["settings"].items() if k in fields})
            corpus = text.load(
                text=settings.text,
                dataset=settings.dataset,
                tokenizer=settings.tokenizer,
                share=settings.valid_share,
            )
            self.problem = LanguageModelling(settings, corpus)
        name = f"{row['arm']}_{row['strength']:g}_mlp_{row['mlp_decay']:g}{'_qk_norm' if row['qk_norm'] else ''}_seed_0"
        model = self.problem.model(0, row["qk_norm"])
        model.load_state_dict(load_file(self.run / "models" / name / "model.safetensors"), strict=False)
        with torch.no_grad():
            quality = self.problem.evaluate(model.eval(), "cpu")
        assert abs(quality.loss - row["loss"]) < 1e-4, (name, quality.loss, row["loss"])
        return list(quality.pieces)


def table(options: argparse.Namespace) -> None:
    """A Markdown line per cell, its loss against that of no decay with the same MLP decay and norm."""
    for directory in options.directories:
        unit = (read_json(directory / "summary.json") or {"unit": "tokens"})["unit"]
        cells = summarise(read_metrics(directory), unit)
        _lines(cells, unit)


def _lines(cells: list[Row], unit: str) -> None:
    heads = ["arm", "decay", "MLP", "QK-norm", "loss", "above no decay", "accuracy", "rank QK", "rank VO"]
    heads += ["imbalance QK", "imbalance VO", "gap QK", "gap VO", f"{unit}/s", "at equal time"]
    shown = [[*_named(cell), *_figures(cell, _no_decay(cells, cell))] for cell in cells]
    keep = [i for i in range(len(heads)) if any(row[i] != "—" for row in shown)]
    print("\n| " + " | ".join(heads[i] for i in keep) + " |\n|" + "---|" * len(keep))
    for row in shown:
        print("| " + " | ".join(row[i] for i in keep) + " |")
    for cell in cells[:1]:
        ranks = ", ".join(f"{part} {_number(of(cell['untrained_mean'], part, 'pseudo_rank'), '.2f')}" for part in PARTS)
        print(f"\nuntrained pseudo rank: {ranks}")


def _named(cell: Row) -> list[str]:
    norm = "yes" if cell["qk_norm"] else "no"
    return [cell["name"], f"{cell['strength']:g}", _number(cell["mlp_decay"], "g"), norm]


def _figures(cell: Row, none: Row | None) -> list[str]:
    if cell["loss"] is None:
        return ["diverged", *["—"] * 10]
    above = "—"
    if none is not None and none is not cell:
        distance, error = difference(cell, none)
        above = f"{distance:+.4f}" + (f" ± {error:.4f}" if error is not None else "")
    figures = [f"{cell['loss']:.4f}", above, _number(cell["accuracy"], ".3f")]
    for measure in MEASURES:
        figures += [_number(of(cell["mean"], part, measure), ".3g") for part in PARTS]
    return [*figures, _number(cell["per_second"], ",.0f"), _number(cell["loss_at_equal_time"], ".4f")]


def _no_decay(cells: list[Row], cell: Row) -> Row | None:
    same = [
        c
        for c in cells
        if c["strength"] == 0 and (c["mlp_decay"], c["qk_norm"]) == (cell["mlp_decay"], cell["qk_norm"])
    ]
    return same[0] if same and same[0]["loss"] is not None else None


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)


def layers(options: argparse.Namespace) -> None:
    """A Markdown line per cell and layer: pseudo rank and imbalance of both products, untrained in brackets."""
    for directory in options.directories:
        print("\n| arm | decay | QK-norm | layer | rank QK | rank VO | imbalance QK | imbalance VO |\n|" + "---|" * 8)
        for cell in summarise(read_metrics(directory), (read_json(directory / "summary.json") or {})["unit"]):
            for index, (layer, before) in enumerate(zip(cell["layers"], cell["untrained"], strict=True)):
                shown = [
                    f"{_number(of(layer, part, measure), '.2f')} ({_number(of(before, part, measure), '.2f')})"
                    for measure in MEASURES[:2]
                    for part in PARTS
                ]
                print(f"| {cell['name']} | {cell['strength']:g} | {_named(cell)[3]} | {index} | {' | '.join(shown)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    storing = commands.add_parser("store")
    storing.set_defaults(action=store)
    storing.add_argument("run", type=Path)
    storing.add_argument("to", type=Path)
    for name, action in (("table", table), ("layers", layers)):
        shown = commands.add_parser(name)
        shown.set_defaults(action=action)
        shown.add_argument("directories", type=Path, nargs="+")
    options = parser.parse_args()
    options.action(options)


if __name__ == "__main__":
    main()
