"""The report: one line for like parameters, and the words once."""

from rankdecay.audit import AuditReport, AuditRow, Share, audit

from .models import language_model


def test_printing():
    report = audit(*language_model("gpt2"))
    text = str(report)
    assert text == report.describe()
    assert "head ×8" in text
    assert "c_attn.weight query with transformer.h.*.attn.c_attn.weight key" in text
    assert max(map(len, text.splitlines())) < 140


def _row(layer: int, kind="neither", head=None, **changes) -> AuditRow:
    fields = {
        "name": f"layers.{layer}.weight", "part": "", "role": "mlp", "head": head, "kind": kind, "partner": None,
        "radial": 0.5, "euler": 0.5, "balance": None, "confirmed": None, "gradient": Share(0.25, 0.75),
        "low_rank": Share(0.9, 0.1), "words": "neither: it shrinks.",
    }  # fmt: skip
    return AuditRow(**(fields | changes))


def test_layers_share_a_line_with_the_mean_of_their_figures():
    head, line, _, words, place = AuditReport((_row(0), _row(1, euler=1.5))).describe().splitlines()
    assert head.split("  ")[0] == "parameter"
    assert line.split() == ["layers.*.weight", "whole", "×2", "neither", "1", "-", "0%", "10%", "75%"]
    assert (words, place.strip()) == ("neither: it shrinks.", "layers.*.weight")


def test_another_kind_has_a_line_of_its_own_and_a_missing_figure_a_dash():
    lines = AuditReport((_row(0), _row(1, "scale_invariant", confirmed=True, low_rank=None))).describe().splitlines()
    assert "scale-invariant, confirmed" in lines[2]
    assert lines[2].split()[-3:] == ["0%", "-", "75%"]


def test_notes_come_last():
    text = AuditReport((_row(0),), notes=("attn: flattened.",)).describe()
    assert text.splitlines()[-1] == "Not read as attention: attn: flattened."
