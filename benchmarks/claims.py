"""The claims of the papers and of ours, each with the rows it stands on: the table of `docs/findings/index.md`.

Evidence and intervals are sentences whose numbers stand in braces, as the words of `benchmarks/findings.py`; a digit
typed by hand is refused. A claim without its rows has to be "open", and a claim whose ``when`` is no longer true of the
rows is refused too, so a status cannot outlive what it was said of.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerators_findings
import attention_findings
import boundary_findings
import compress_findings
import margin_findings
import pretrained_findings
import rotary_findings
import schedule_findings
import stored

from rankdecay.lab.experiments.boundary.claims import settled

DATA = Path("docs/data")
STATUSES = ("holds", "holds with a condition", "replaced", "contradicted", "open")
HEADS = ("claim", "evidence", "interval", "command", "data", "commit", "status")
PLACE = re.compile(r"\{(.*?)\}")
TYPED = re.compile(r"(?<![A-Za-z_\d-])\d")  # a digit that is no part of a name, as in L2 and GPT-2
Sweep = boundary_findings.Sweep


@dataclass(frozen=True)
class Claim:
    """A row of the index.

    Attributes:
        group: under which heading it stands.
        claim: in words.
        evidence, interval: in words, with every number made from the rows: ``{held grok_default l2} of the seeds``.
        command: what makes the rows.
        data: the rows, below `docs/data`.
        page: where it is discussed, below `docs/findings`.
        status: one of `STATUSES`, or a function that says which.
        condition: under which it holds.
        when: whether the rows still say so.
    """

    group: str
    claim: str
    evidence: str
    interval: str
    command: str
    data: tuple[str, ...]
    page: str
    status: str | Callable[[], str]
    condition: str = ""
    when: Callable[[], bool] = lambda: True


def _selection() -> Sweep:
    return boundary_findings.sweep((DATA / "boundary" / "selection",), 2.0)


def _above_none(run: str, arm: str, strength: float, key: str) -> dict[str, Any]:
    """A figure of a cell above no decay, by seed; without runs what decides nothing."""
    nothing = {"low": -math.inf, "high": math.inf}
    return attention_findings.above(DATA / run, arm, strength, attention_findings.NONE, key) or nothing


def _planes(arm: str, strength: float, key: str, positions: str = "rotary") -> float:
    directory = DATA / "language" / f"planes_{positions}"
    return statistics.fmean(attention_findings.planes_of(directory, arm, strength)[key])


def _sweep(name: str) -> Sweep:
    return boundary_findings.sweep((DATA / "boundary" / name,))


def _least(name: str, arm: str) -> float | None:
    return boundary_findings.smallest(_sweep(name), arm, 0.95)


def _reached(name: str, arm: str) -> float:
    """The best test accuracy of an arm, a mean over the seeds of its best cell."""
    sweep = _sweep(name)
    cells = {(row["train_fraction"], row["strength"]) for row in sweep.of(arm)}
    return max(statistics.fmean(boundary_findings.best_accuracies(sweep, arm, *cell)) for cell in cells)


def _soonest(name: str, arm: str) -> float:
    """The least step at which a run of an arm held; infinite if none did."""
    steps = (row["steps_to_generalise"] for row in _sweep(name).of(arm))
    return min((step for step in steps if step is not None), default=math.inf)


def _across_rests(arm: str, rest: float, other: str, other_rest: float) -> dict[str, Any]:
    """The data of two arms on selection, each at a decay of the rest of its own, by seed."""
    return boundary_findings.across_rests(_sweep("selection"), arm, rest, other, other_rest)["by_seed"]


def _lost(arm: str) -> int:
    """Runs of an arm on selection that generalised and end below the threshold."""
    return boundary_findings.lost(_selection(), arm)


def _events(name: str, arm: str) -> dict[str, int]:
    sweep = _selection() if name == "selection" else _sweep(name)
    return sweep.arm(arm)["events"]


def _rank_alone_or_first(name: str, arm: str = "paper_a1") -> bool:
    """Whether in every run of an arm's best strength the rank fell, and accuracy rose later or not at all."""
    found = _events(name, arm)
    return found["rank_first"] > 0 and found["rank_first"] + found["rank_only"] == sum(found.values())


def _grok(run: str) -> dict[str, dict[str, Any]]:
    return stored.arms(DATA / run)


def _ratio(arm: str, other: str, key: str) -> dict[str, Any]:
    return _selection().ratio(arm, other)[key]


def _margin(run: str, arm: str) -> dict[str, Any]:
    return stored.arms(DATA / "margin" / run)[arm]


def _more(part: str) -> list[dict[str, Any]]:
    return json.loads((DATA / "factor" / "more.json").read_text())[part]


def _recall(strength: str, part: str, name: str, run: str = "seeds") -> list[float]:
    return attention_findings.over_seeds(DATA / "recall" / run, "l2", strength, part, name)


IMBALANCE, GAP, RANK = ("query_key", "imbalance"), ("value_output", "nuclear_gap"), ("query_key", "pseudo_rank")


def _falls_in_recall(run: str, *measures: tuple[str, str]) -> bool:
    """Whether measures are lower in every seed of the strongest decay than in any of a weaker one."""
    return all(
        max(_recall(strong, *measure, run)) < min(_recall(weak, *measure, run))
        for weak, strong in (("0", "1"), ("0.1", "1"))
        for measure in measures
    )


def _falls_in_language(part: str) -> bool:
    """Whether the pseudo rank of a product is lower in each seed the stronger the decay."""
    runs = [attention_findings.over_seeds(DATA / "language" / "long", "l2", s, part) for s in ("0", "0.1", "1")]
    return len(runs[0]) > 1 and all(none > usual > ten for none, usual, ten in zip(*runs, strict=True))


def _standing() -> set[str]:
    directories = [DATA / "language" / name for name in ("standard", "qk_norm")]
    found, bounds, _ = attention_findings.standing(directories)
    return {name for name, _, beyond in found if beyond == bounds}


def _cost(arm: str, run: str = "controls", key: str = "loss") -> dict[str, Any]:
    """The cost of a control of attention by seed; an infinite interval, which decides nothing, without runs."""
    nothing = {"low": -math.inf, "high": math.inf}
    directory, usual = attention_findings.directory_of(run), attention_findings.USUAL
    return attention_findings.above(directory, arm, 0.1, usual, key) or nothing


def _figure_two(arm: str, fraction: float) -> float:
    """The share of the energy of scores that is at equal frequencies, at the best of a run."""
    return boundary_findings.figure_two(arm, fraction)["best"]["equal_frequencies"]


def _chance() -> float:
    """The larger of the differences that chance exceeds once in twenty times."""
    return max(found["bound"] for found in attention_findings.chances())


def _pretrained(model: str, product: str, key: str = "rank") -> list[float]:
    """A figure of every layer, above the same shapes untrained."""
    named = {"rank": "untrained", "nuclear_ratio": "untrained_ratio"}[key]
    return [row[key] - row[named] for row in pretrained_findings.of(model, product)]


PRETRAINED = "python benchmarks/pretrained.py --minilm DIR --smollm2 DIR --json docs/data/pretrained.json"
CONTROLS = (
    "rankdecay language --preset standard --steps 600 --evaluate-every 300 --arms l2 low_rank uniform positions frozen "
    "frozen_large --strengths l2=0.1 low_rank=10 --seeds 3 --save none"
)
VISION_CONTROLS = (
    "rankdecay vision --preset standard --image-folder runs/mnist --grey --image-size 28 --patch 7 --evaluate-every "
    "200 --arms l2 uniform frozen frozen_large --strengths l2=0.1 --qk-norm off --seeds 5"
)
EXTENSION = (
    "rankdecay language --preset standard --steps 600 --evaluate-every 300 --seeds 5 --save all --arms l2 l2_loss "
    "planes low_rank --strengths l2=0,10 l2_loss=0.0001,0.0003,0.001 planes=10 low_rank=10, and with --positions "
    "learned, without planes"
)
COMPRESS = "python benchmarks/compress.py --stage tune; … --stage train, for --family llama and qwen3"
GROKKING, KOBAYASHI = "Low-rank decay and grokking", "L2 as a nuclear norm (Kobayashi et al.)"
SMALLER = "A smaller head"
GENERIC = "--examples 6 --tokens 8 --dimension 10 --init random --datasets 20"
ACCELERATED = {
    "selection": "Accelerators of grokking, equally tuned (selection mod 13)",
    "add": "Accelerators of grokking on addition mod 97",
}
SHEEN, COSTS = "Softmax attention and its SVM (Sheen et al.)", "What it costs"


def _of_sweep(sweep: str, claim: str, evidence: str, interval: str, *more: Any) -> Claim:
    """A claim on grokking that a sweep of `boundary` decides; ``more`` is its status and what follows."""
    command, data = "bash docs/data/boundary/commands.sh", (f"boundary/{sweep}",)
    return Claim(GROKKING, claim, evidence, interval, command, data, "boundary.md", *more)


def _accelerated(task: str, claim: str, arm: str, against: str = "learning_rate") -> Claim:
    """A claim of the authors of an accelerator, which its contrast on a task decides."""
    other = "a tuned learning rate" if against == "learning_rate" else "the same decay of all weights"
    pair = f"{against} {task}"
    options = "" if task == "selection" else f"--task {task} "
    return Claim(
        ACCELERATED[task],
        claim,
        f"mean time {{accelerated time {arm} {pair}}} steps, {other} {{accelerated time {against} {pair}}}; still held "
        f"at the end {{accelerated still {arm} {pair}}} and {{accelerated still {against} {pair}}}; a step takes "
        f"{{accelerated milliseconds {arm} {pair}}} ms, AdamW's {{accelerated milliseconds none {pair}}}",
        f"ratio of times {{accelerated ratio {arm} {pair}}}",
        f"python benchmarks/accelerators.py {options}--stage tune; … --stage test; … --stage report",
        (f"accelerators/{task}",),
        "accelerators.md",
        lambda: accelerators_findings.words("status", arm, against, task),
        "one size, one small network",
    )


ACCELERATORS = (  # what their authors say, and what it is held against
    ("Grokfast is faster than a tuned learning rate", "grokfast_ema"),
    ("Grokfast-MA is faster than a tuned learning rate", "grokfast_ma"),
    ("⊥Grad is faster than AdamW, each at its best learning rate", "orthograd"),
    ("StableMax is faster than a tuned learning rate", "stablemax"),
    ("Muon is faster than AdamW at a tuned learning rate", "muon"),
    ("Cautious decay is faster than the plain one", "cautious", "l2_all"),
)

CLAIMS = (
    Claim(
        GROKKING,
        "Low-rank decay generalises where the usual L2 and no decay do not (the default `grok`)",
        "held by low rank {held grok_default low_rank}, by the usual L2 {held grok_default l2}, by none "
        "{held grok_default none}, by uniform attention {held grok_default uniform_attention}; by a tuned L2 "
        "{held grok_default l2_tuned}",
        "nine seeds: low rank {held grok_nine low_rank}, tuned L2 {held grok_nine l2_tuned}, usual {held grok_nine l2}",
        "rankdecay grok; … --seeds 9",
        ("grok_default", "grok_nine"),
        "grokking.md",
        "holds with a condition",
        "within this budget; a tuned L2 gets there too",
        lambda: (
            _grok("grok_default")["low_rank"]["generalised"] > _grok("grok_default")["l2"]["generalised"]
            and _grok("grok_nine")["low_rank"]["generalised"] > _grok("grok_nine")["l2"]["generalised"]
        ),
    ),
    Claim(
        GROKKING,
        "What it does is a schedule of the norm, not the rank (E1)",
        "{e1 runs}; headline: {e1 headline}",
        "low rank / ramp {e1 low_rank/l2_ramp}; / radial part {e1 low_rank/radial_only}; / rank raised "
        "{e1 low_rank/raise_rank}; ramp / constant L2 {e1 l2_ramp/l2}",
        "python benchmarks/schedule.py --stage tune; … --stage test; … --stage report",
        ("schedule",),
        "grokking.md",
        lambda: schedule_findings.words("status"),
    ),
    Claim(
        GROKKING,
        "What low-rank decay does beyond its part along the weights, which lowers the rank, makes it sooner (E1)",
        "at the larger modulus held in {e1 held:smooth schedule_31} under low rank, in {e1 held:radial_only "
        "schedule_31} under that part alone, in {e1 held:raise_rank schedule_31} with the rank raised; {e1 runs "
        "schedule_31}",
        "low rank / radial part {e1 low_rank/radial_only}, and {e1 low_rank/radial_only schedule_31} at the larger "
        "modulus; / rank raised {e1 low_rank/raise_rank} and {e1 low_rank/raise_rank schedule_31}; / ramp {e1 "
        "low_rank/l2_ramp} and {e1 low_rank/l2_ramp schedule_31}",
        "python benchmarks/schedule.py --modulus 31 --width 128 --sizes 2500 --dir docs/data/schedule_31 --stage tune; "
        "… --stage test; … --stage report",
        ("schedule", "schedule_31"),
        "grokking.md",
        "contradicted",
        "one task at two sizes, each arm at its best strength; that it is the lowering that costs is shown at the "
        "larger alone, where raising costs nothing",
        lambda: all(
            schedule_findings.against(DATA / run, "smooth", "radial_only")["low"] > 1
            for run in ("schedule", "schedule_31")
        ),
    ),
    Claim(
        GROKKING,
        "Rank pressure beside a ramp of L2, or beside L2 (LRD Elastic, announced by the paper), makes it sooner",
        "a ramp with low rank at the ramp's norms takes {e1 variant:ramp_low_rank} times the steps of the ramp",
        "Elastic / low rank {e1 variant:elastic}",
        "python benchmarks/schedule.py --stage secondary; … --stage report",
        ("schedule",),
        "grokking.md",
        "contradicted",
        "one size; both strengths as each is best without the other",
        lambda: all(
            schedule_findings.variant(DATA / "schedule", name)["low"] > 1 for name in ("ramp_low_rank", "elastic")
        ),
    ),
    Claim(
        GROKKING,
        "Without QK-norm the same L2, and the same radial part of low rank, generalise sooner",
        "without it L2 takes {e1 variant:no_qk_norm} times its steps",
        "the radial part {e1 variant:radial_no_qk_norm}",
        "python benchmarks/schedule.py --stage secondary; … --stage report",
        ("schedule",),
        "grokking.md",
        "holds with a condition",
        "one size, at the strengths that were tuned with QK-norm",
        lambda: all(
            schedule_findings.variant(DATA / "schedule", name)["high"] < 1
            for name in ("no_qk_norm", "radial_no_qk_norm")
        ),
    ),
    Claim(
        GROKKING,
        "The path of the norm is enough: without any decay, at the norms of a low-rank run of another seed, it "
        "generalises as soon as under the best rule (E1)",
        "generalised within the budget in {e1 held:yoked} runs, under low rank in {e1 held:smooth}, without either in "
        "{e1 held:none}",
        "low rank / yoked {e1 low_rank/yoked}; yoked / radial part {e1 yoked/radial_only}",
        "python benchmarks/schedule.py --stage tune; … --stage test; … --stage report",
        ("schedule",),
        "grokking.md",
        "holds with a condition",
        "one task, one network; not among the contrasts that were named beforehand",
        lambda: (
            schedule_findings.against(schedule_findings.DATA, "smooth", "yoked")["low"] > 1
            and schedule_findings.against(schedule_findings.DATA, "yoked", "radial_only")["ratio"] < 1
        ),
    ),
    _of_sweep(
        "selection",
        "W_Q and W_K lose their rank under low-rank decay",
        "stable rank {best selection none stable_rank 2} without decay, {best selection l2 stable_rank 2} under the "
        "best L2, {best selection smooth stable_rank 2} (smooth), {best selection prox stable_rank 2} (prox)",
        "seeds: {spread selection smooth stable_rank 2} (smooth), {spread selection none stable_rank 2} (none)",
        "holds",
    ),
    _of_sweep(
        "selection",
        "It generalises from less data, and sooner, than no decay (selection)",
        "data, by seed {data_ratio selection smooth none 2}; {across_rests selection smooth 2 none 4} where no "
        "decay is at its best decay of the rest",
        "time, by seed {time_ratio selection smooth none 2}",
        "holds",
        "",
        lambda: settled(_selection().ratio("smooth", "none")) == "less",
    ),
    _of_sweep(
        "selection",
        "It generalises from less data, and sooner, than a tuned L2 (selection)",
        "data, by seed {data_ratio selection smooth l2 2} (of fits {fits_ratio selection smooth l2 2}); {across_rests "
        "selection smooth 2 l2 1} where L2 is at its best decay of the rest",
        "time, by seed {time_ratio selection smooth l2 2}; on E1's held-out seeds {e1 low_rank/l2}, at the larger "
        "modulus {e1 low_rank/l2 schedule_31}",
        "holds with a condition",
        "sooner on E1's seeds, which were not tuned on, and not told apart in the larger network; that it needs less "
        "data is not settled where each has its best decay of the rest",
        lambda: (
            _across_rests("smooth", 2.0, "l2", 1.0)["high"] >= 1
            and schedule_findings.against(schedule_findings.DATA, "smooth", "l2")["high"] < 1
        ),
    ),
    _of_sweep(
        "selection",
        "It is the collapse of the rank that makes it generalise from less data",
        "as much data with the rank *raised* ({data_ratio selection smooth raise_rank 2}) and with the radial part "
        "alone ({data_ratio selection smooth radial_only 2}), at stable ranks of {best selection raise_rank "
        "stable_rank 2} and {best selection radial_only stable_rank 2}",
        "time: against rank raised {time_ratio selection smooth raise_rank 2}, against the radial part "
        "{time_ratio selection smooth radial_only 2}",
        "contradicted",
        "",
        lambda: (
            settled(_selection().ratio("smooth", "raise_rank")) is None
            and settled(_selection().ratio("smooth", "radial_only")) is None
            and _ratio("smooth", "raise_rank", "time")["high"] >= 1
        ),
    ),
    _of_sweep(
        "selection",
        "L2 on W_Q and W_K is inert under QK-norm",
        "boundary {at selection none 2} examples without, {at selection l2 2} with it, stable rank "
        "{best selection none stable_rank 2} and {best selection l2 stable_rank 2}",
        "data, by seed, L2 / none {data_ratio selection l2 none 2}",
        "contradicted",
        "",
        lambda: settled(_selection().ratio("l2", "none")) == "less",
    ),
    _of_sweep(
        "selection",
        "The decay shortens the delay between memorising and generalising (selection)",
        "without decay memorised at step {delay selection none memorised_at 2} and generalised {delay selection none "
        "delay 2} steps later; under the smooth rule at {delay selection smooth memorised_at 2} and {delay selection "
        "smooth delay 2} later: memorising comes as late as generalising, and no delay is left",
        "{delay selection none shortest 2} to {delay selection none longest 2} and {delay selection smooth shortest "
        "2} to {delay selection smooth longest 2} steps",
        "contradicted",
        "it goes because memorising comes later; on addition and division it is there under the decay as well",
        lambda: (
            abs(boundary_findings.delays(_selection(), "smooth")["delay"]) <= 40
            and boundary_findings.delays(_selection(), "none")["delay"] >= 120
        ),
    ),
    _of_sweep(
        "selection",
        "Decay may be switched off once it has generalised",
        "switched off, {ends selection until_generalised lost} of {ends selection until_generalised runs} fall below "
        "the threshold, kept on {ends selection kept_on lost} of {ends selection kept_on runs}",
        "worst: {ends selection until_generalised worst} and {ends selection kept_on worst}",
        "open",
        "about as many are lost either way",
        lambda: abs(_lost("until_generalised") - _lost("kept_on")) <= 2,
    ),
    _of_sweep(
        "add",
        "On modular addition the gain is one of rank",
        "attention is not needed: held with half of the pairs by uniform attention in {cell add uniform_attention "
        "0.5}, smooth {cell add smooth 0.5}, L2 {cell add l2 0.5}",
        "smooth / uniform attention, of fits {fits_ratio add smooth uniform_attention}",
        "contradicted",
    ),
    _of_sweep(
        "add",
        "On modular addition low-rank decay needs less data than a tuned L2",
        "data, by seed {data_ratio add smooth l2}",
        "of fits {fits_ratio add smooth l2}; in time, by seed {time_ratio add smooth l2}",
        "open",
        "three seeds do not part them in data",
        lambda: settled(_sweep("add").ratio("smooth", "l2")) is None,
    ),
    Claim(
        GROKKING,
        "On subtraction more data is not always better (an earlier page of ours)",
        "with four fifths of the pairs a strong L2 stops at {stuck right}, but right up to the sign in {stuck either}: "
        "b − a is told for a − b, and the plateau ends between steps {stuck ends}",
        "all seeds, as far as three times the budget",
        "python benchmarks/plateau.py --json docs/data/plateau.json",
        ("plateau.json", "boundary/subtract"),
        "boundary.md",
        "replaced",
        "no boundary of subtraction is quoted any more",
    ),
    Claim(
        GROKKING,
        "The prototype's published phase diagram",
        "{published near} of {published cells} cells within {published within} of it",
        "its best column ends at a stable rank of {published full_rank}, of noise, not of low rank",
        "rankdecay boundary --preset prototype --compile on --widen 0",
        ("boundary/prototype",),
        "paper.md",
        "holds",
        "",
        lambda: boundary_findings.published(DATA / "boundary" / "prototype")["near"] >= 70,
    ),
    Claim(
        GROKKING,
        "On the paper's grid of addition low-rank decay generalises from less data than L2 (its phase diagram)",
        "unordered pairs: A1 from a fraction of {least_data paper_add paper_a1 0.95} on ({least_held paper_add "
        "paper_a1 0.95} held there), L2 beyond the paper's grid from {least_data paper_add l2_all 0.95} on "
        "({least_held paper_add l2_all 0.95}); at the smallest they reach {reached paper_add paper_a1 0.3} and "
        "{reached paper_add l2_all 0.3}; S6 and S5 from {least_data paper_rules paper_s6 0.95} and {least_data "
        "paper_rules paper_s5 0.95} on ({least_held paper_rules paper_s6 0.95} and {least_held paper_rules paper_s5 "
        "0.95}); with ordered pairs A1 and L2 reach {reached paper_add_ordered paper_a1 0.3} and {reached "
        "paper_add_ordered l2_all 0.3}",
        "the same three seeds at each fraction from {sizes_alike paper_add paper_a1 l2_all} on, A1 at {fullest "
        "paper_add paper_a1}, L2 at {fullest paper_add l2_all}: A1 takes {times_alike paper_add paper_a1 l2_all} times "
        "L2's steps; ordered, one seed: {times_alike paper_add_ordered paper_a1 l2_all}",
        "bash docs/data/boundary/commands.sh",
        ("boundary/paper_add", "boundary/paper_add_ordered", "boundary/paper_rules"),
        "paper.md",
        "contradicted",
        "of L2 at strengths of its own; on the paper's grid L2 does nothing to multiplication. The paper's split is "
        "not stated: the same with unordered and ordered pairs",
        lambda: all(
            (_least(run, "l2_all") or 1.0) <= (_least(run, "paper_a1") or 0.0)
            for run in ("paper_add", "paper_add_ordered")
        ),
    ),
    Claim(
        GROKKING,
        "On multiplication low-rank decay generalises and L2 does not, on the paper's grid of strengths",
        "best test accuracy on that grid: A1 {reached paper_multiply paper_a1 0.5}, L2 {reached paper_multiply l2_all "
        "0.5}, no decay {reached paper_multiply none 0.5}; L2 beyond it {reached paper_multiply_l2 l2_all 0.5}, from a "
        "strength of {least_strength paper_multiply_l2 l2_all 0.5 0.95} on",
        "one seed; held at step {held_at paper_multiply paper_a1 0.005} (A1) and {held_at paper_multiply_l2 l2_all 8} "
        "(L2 beyond the grid, at {fullest paper_multiply_l2 l2_all})",
        "rankdecay boundary --preset paper --task multiply --fractions 0.5 --seeds 1 --arms none l2_all paper_a1; … "
        "--arms l2_all --strengths l2_all=0.2,0.5,1,2,4,8",
        ("boundary/paper_multiply", "boundary/paper_multiply_l2"),
        "paper.md",
        "holds with a condition",
        "of that grid, on which L2 does nothing: at strengths of its own L2 generalises too, and sooner",
        lambda: (
            _reached("paper_multiply", "paper_a1") >= 0.95
            and _reached("paper_multiply", "l2_all") < 0.1
            and _soonest("paper_multiply_l2", "l2_all") < _soonest("paper_multiply", "paper_a1")
        ),
    ),
    Claim(
        GROKKING,
        "Low-rank decay generalises on the symmetric group S₅ (permutations of five), which the paper names as still "
        "to be tried",
        "best test accuracy: A1 {reached paper_s5 paper_a1 0.5}, at its best strength on the paper's grid {column "
        "paper_s5 paper_a1 0.005 best_test_accuracy}; L2 beyond the grid {reached paper_s5 l2_all 0.5}, no decay "
        "{reached paper_s5 none 0.5}",
        "one seed; L2 holds at step {held_at paper_s5 l2_all 2}, A1 at none of its strengths",
        "rankdecay boundary --preset paper --task s5 --fractions 0.5 --seeds 1 --arms none paper_a1 l2_all --strengths "
        "l2_all=1,2,4,8,16 --precision float32; … --arms paper_a1 --strengths paper_a1=0.002,0.003",
        ("boundary/paper_s5",),
        "paper.md",
        "contradicted",
        "half of the pairs, within 3000 steps, where L2 does; longer runs were not made",
        lambda: (
            _reached("paper_s5", "paper_a1") < 0.95 <= _reached("paper_s5", "l2_all")
            and math.isinf(_soonest("paper_s5", "paper_a1"))
            and math.isfinite(_soonest("paper_s5", "l2_all"))
        ),
    ),
    Claim(
        GROKKING,
        "The rank falls before the test accuracy rises (the order of events)",
        "rank first in {events selection smooth rank_first 2} runs of the smooth rule, {events selection l2 rank_first "
        "2} of L2 on W_Q and W_K, {events selection l2_all rank_first 2} of L2 on every matrix (accuracy first in "
        "{events selection l2_all accuracy_first 2}), {events selection raise_rank rank_first 2} with the rank raised; "
        "on addition in the paper's settings in {events paper_add paper_a1 rank_first} of A1's",
        "counts at each arm's best strength; the rank fell at half of the first stable rank, accuracy rose at half of "
        "the test set; in the others of smooth, L2 on W_Q and W_K and A1 accuracy does not rise",
        "bash docs/data/boundary/commands.sh",
        ("boundary/selection", "boundary/paper_add"),
        "boundary.md",
        "holds with a condition",
        "under a decay of W_Q and W_K that lowers the rank; on selection, with the rank raised or under L2 on every "
        "matrix, runs generalise in another order, so the fall is not what they wait for",
        lambda: (
            all(_rank_alone_or_first(*of) for of in (("selection", "smooth"), ("selection", "l2"), ("paper_add",)))
            and _events("selection", "l2_all")["accuracy_first"] > _events("selection", "l2_all")["rank_first"]
            and _events("selection", "raise_rank")["accuracy_first"] > _events("selection", "raise_rank")["rank_first"]
        ),
    ),
    Claim(
        GROKKING,
        "W_Q W_Kᵀ is structured in blocks under low-rank decay and noisy under L2 (the paper's Figure 2)",
        "scores of the first layer by the frequencies of both tokens, energy where they are equal, each run at its "
        "best: L2 {figure_two l2_all 0.4 best equal_frequencies} and {figure_two l2_all 0.5 best equal_frequencies}, "
        "the paper's step {figure_two paper_a1 0.4 best equal_frequencies} and {figure_two paper_a1 0.5 best "
        "equal_frequencies}, no decay {figure_two none 0.4 best equal_frequencies} and {figure_two none 0.5 best "
        "equal_frequencies}, untrained {figure_two none 0.4 untrained equal_frequencies}",
        "one seed, two sizes; stable rank early on {figure_two paper_a1 0.4 500 stable_rank .1f} and "
        "{figure_two paper_a1 0.5 500 stable_rank .1f} under the step, {figure_two l2_all 0.4 500 stable_rank .1f} and "
        "{figure_two l2_all 0.5 500 stable_rank .1f} under L2",
        "python benchmarks/mechanism.py --json docs/data/boundary/mechanism.json",
        ("boundary/mechanism.json",),
        "paper.md",
        "contradicted",
        "of an L2 that generalises: it has the blocks too, and the clearer ones; without a decay of W_Q and W_K there "
        "are none. The rank does fall sooner and further under the paper's step",
        lambda: all(
            _figure_two("l2_all", fraction) > _figure_two("paper_a1", fraction) > 2 * _figure_two("none", fraction)
            for fraction in (0.4, 0.5)
        ),
    ),
    *(_accelerated(task, *of) for task in ACCELERATED for of in ACCELERATORS),
    Claim(
        KOBAYASHI,
        "L2 on two factors ends at the soft threshold of their product",
        "{settled factors} problems; largest deviation {worst factors deviation_largest}",
        "above the optimum at most {worst factors optimality_gap_largest} (duality certificate)",
        "rankdecay factor --seeds 200",
        ("factor/standard",),
        "factor.md",
        "holds",
    ),
    Claim(
        KOBAYASHI,
        "The imbalance of the factors decays at 2ηλ a step",
        "off by at most {rates flow}; by {rates steps} against the rate of finite steps",
        "medians over the seeds, the worst of the strengths",
        "rankdecay factor --seeds 200",
        ("factor/standard",),
        "factor.md",
        "holds with a condition",
        "at small steps",
    ),
    Claim(
        KOBAYASHI,
        "Momentum and Adam with L2 in the loss end there too",
        "{settled momentum} and {settled adam} problems",
        "Adam, run on: {value factor/beside.json late_adam.1.within_1e-3 .0%} are there still",
        "rankdecay factor --seeds 200; python benchmarks/factor_findings.py beside --json docs/data/factor/beside.json",
        ("factor/standard", "factor/beside.json"),
        "factor.md",
        "holds with a condition",
        "Adam leaves the optimum again",
    ),
    Claim(
        KOBAYASHI,
        "Decoupled decay (AdamW) is a nuclear norm as well",
        "rank {rank_of decoupled} at every strength, {left decoupled} of the imbalance left",
        "the floor falls with the step: at a tenth of the rate {value factor/beside.json decoupled_floor.1.left.1 "
        ".1%} left",
        "rankdecay factor --seeds 200; python benchmarks/factor_findings.py beside --json docs/data/factor/beside.json",
        ("factor/standard", "factor/beside.json"),
        "factor.md",
        "contradicted",
        "normalising is the cause, not decoupling",
    ),
    Claim(
        KOBAYASHI,
        "With momentum, noise and decoupled decay the imbalance falls exponentially, to a floor (Proposition B.2)",
        "the identity is met to {noise off}; it begins to fall at {noise rate} of twice ηλ; ten times the noise leave "
        "{noise by_noise} times the imbalance, no noise {noise none}",
        "floors are at most {noise bound} of the printed bound, which is far off",
        "python benchmarks/factor_findings.py more --json docs/data/factor/more.json",
        ("factor/more.json",),
        "factor.md",
        "holds",
        "",
        lambda: all(row["off_identity"] < 0.03 and row["of_printed_bound"] < 1 for row in _more("noise")),
    ),
    Claim(
        KOBAYASHI,
        "AdamW of λ and ε ends where Adam with an L2 of λε does: the least L2 norm of w, the least L1 of products",
        "two dimensions, far above the gradients: {value factor/more.json two_dimensions.0.from_least_l2 .3f} and "
        "{value factor/more.json two_dimensions.1.from_least_l2 .3f} from the first on w, {value factor/more.json "
        "two_dimensions.3.from_least_l1 .3f} and {value factor/more.json two_dimensions.4.from_least_l1 .3f} from the "
        "second on products",
        "at the usual ε AdamW ends {value factor/more.json two_dimensions.2.from_least_l2 .2f} and {value "
        "factor/more.json two_dimensions.5.from_least_l1 .2f} away, at the least maximum norm: {value factor/more.json "
        "two_dimensions.2.from_least_linf .3f} and {value factor/more.json two_dimensions.5.from_least_linf .3f} from "
        "it (medians of the starts)",
        "python benchmarks/factor_findings.py more --json docs/data/factor/more.json",
        ("factor/more.json",),
        "factor.md",
        "holds with a condition",
        "where ε is far above the gradients, which it is in no usual training",
        lambda: (
            max(row["from_least_l2"] for row in _more("two_dimensions")[:2]) < 0.01
            and max(row["from_least_l1"] for row in _more("two_dimensions")[3:5]) < 0.01
            and all(_more("two_dimensions")[i]["from_least_linf"] < 0.01 for i in (2, 5))
        ),
    ),
    Claim(
        KOBAYASHI,
        "Attention's rank falls with its decay (language)",
        "eight seeds, under no decay, L2 at the usual strength and at ten times that: W_KᵀW_Q {seeds_of language/long "
        "l2 0 query_key}, {seeds_of language/long l2 0.1 query_key}, {seeds_of language/long l2 1 query_key}; W_O W_V "
        "{seeds_of language/long l2 0 value_output}, {seeds_of language/long l2 0.1 value_output}, {seeds_of "
        "language/long l2 1 value_output}",
        "lower in every seed at each step of the strength; a hundred times the usual, one seed of a quarter of the "
        "steps: {rank language/standard l2 10} and {rank language/standard l2 10 value_output}, without decay {rank "
        "language/standard l2 0} and {rank language/standard l2 0 value_output}",
        "rankdecay language --preset standard --steps 2400 --evaluate-every 1200 --arms l2 --strengths l2=0,0.1,1 "
        "--seeds 8; … --steps 600",
        ("language/long", "language/standard"),
        "recall_language_vision.md",
        "holds",
        "",
        lambda: all(_falls_in_language(part) for part in ("query_key", "value_output")),
    ),
    Claim(
        KOBAYASHI,
        "A low rank of W_KᵀW_Q costs the loss that L2 pays for it",
        "low rank at the strongest: rank {rank language/standard low_rank 10} at {loss language/standard low_rank 10} "
        "nats; L2: {rank language/standard l2 10} at {loss language/standard l2 10}",
        "beyond chance is {chance}",
        "rankdecay language --preset standard --steps 600",
        ("language/standard", "language/mlp", "language/seeds"),
        "recall_language_vision.md",
        "contradicted",
        "L2's cost stands, low rank's is within chance, so a small one is not excluded",
        lambda: "l2 10" in _standing() and "low_rank 10" not in _standing(),
    ),
    Claim(
        KOBAYASHI,
        "A decay of attention near the usual one is the sweet spot (their Table 1)",
        "loss above no decay, of four times the tokens, by seed: the usual strength {above_none long l2 0.1}, ten "
        "times that {above_none long l2 1}",
        "four in five such experiments would show {power long l2 0.1} of the usual strength; it takes the rank of "
        "W_KᵀW_Q from {rank language/long l2 0} to {rank language/long l2 0.1}, ten times that to {rank language/long "
        "l2 1}",
        "rankdecay language --preset standard --steps 2400 --evaluate-every 1200 --arms l2 --strengths l2=0,0.1,1 "
        "--seeds 8",
        ("language/long",),
        "recall_language_vision.md",
        "holds with a condition",
        "more than the usual strength hurts, slightly, as they have it; none at all is not seen to be worse than it, "
        "so it is the end of a plateau and no optimum",
        lambda: (
            _above_none("language/long", "l2", 1.0, "loss")["low"] > 0
            and (usual := _above_none("language/long", "l2", 0.1, "loss"))["low"] < 0 < usual["high"]
        ),
    ),
    Claim(
        KOBAYASHI,
        "Under QK-norm L2 hardly lowers the rank of W_Q and W_K, low-rank decay does",
        "L2 {rank language/qk_norm l2 0 query_key yes} to {rank language/qk_norm l2 10 query_key yes}, low rank to "
        "{rank language/qk_norm low_rank 10 query_key yes}",
        "one seed",
        "rankdecay language --preset standard --steps 600 --qk-norm on --arms l2 low_rank "
        "--strengths l2=0,1,10,100 low_rank=1,10,100",
        ("language/qk_norm",),
        "recall_language_vision.md",
        "holds",
    ),
    Claim(
        KOBAYASHI,
        "A low rank of W_KᵀW_Q at no loss says something of attention by content (language)",
        "against attention with the usual decay uniform attention costs {control uniform} nats, W_Q and W_K never "
        "trained {control frozen} (as drawn) and {control frozen_large} (large); scores of positions alone, for which "
        "a head needs a rank of one, {control positions}",
        "by seed; low-rank decay at the strongest {control low_rank 10}; beyond chance is {chance}",
        CONTROLS,
        ("language/controls", "language/seeds"),
        "recall_language_vision.md",
        "contradicted",
        "attention is worth much here, but by positions: scores that see no token are ahead of those that do",
        lambda: _cost("uniform")["low"] > _chance() and _cost("positions")["high"] < 0,
    ),
    Claim(
        GROKKING,
        "Directions that low-rank decay has emptied are the task's to refill (the needle and the fan)",
        "of the task's gradient {emptied on 0 gradient_share} lies between them, of any matrix {emptied on 0 "
        "isotropic}; without the decay {emptied off 0 in_use} directions in use of a head become {emptied off "
        "200 in_use}, the loss {emptied off 200 loss} against {emptied on 200 loss}",
        "the loss without the decay less that with it, by seed: {refilled 200}",
        "python benchmarks/needle.py runs/planes_rotary/models/low_rank_10_* --json docs/data/language/needle.json",
        ("language/needle.json",),
        "recall_language_vision.md",
        "holds with a condition",
        "under Adam they grow beyond the decay's threshold within its interval, and most are emptied again; without "
        "the decay they fill, and the loss is a little lower, of which the share of the refilled ones is not known",
        lambda: (
            float(attention_findings.emptied("off", "200", "in_use"))
            > 2 * float(attention_findings.emptied("on", "200", "in_use"))
            and float(attention_findings.emptied("on", "20", "grown")) > 1
            and float(attention_findings.emptied("on", "200", "in_use")) < 10
        ),
    ),
    Claim(
        KOBAYASHI,
        "Under rotary positions L2 prunes planes, not the rank of W_Q (their extension, E2)",
        "decoupled L2 at the strongest: {plane planes_rotary l2 10 planes .0%} of the planes in use, rank of W_Q "
        "{plane planes_rotary l2 10 query} ({plane planes_rotary l2 0 query} without); L2 in the loss: {plane "
        "planes_rotary l2_loss 0.0003 planes .0%} and {plane planes_rotary l2_loss 0.001 planes .0%} of the planes, in "
        "{plane planes_rotary l2_loss 0.0003 heads .0%} and {plane planes_rotary l2_loss 0.001 heads .0%} of the "
        "heads, rank of W_Q in them {plane planes_rotary l2_loss 0.0003 query} and {plane planes_rotary l2_loss 0.001 "
        "query} (with learned positions {plane planes_learned l2_loss 0.001 query})",
        "loss above none: {above_none planes_rotary l2 10}; {above_none planes_rotary l2_loss 0.0003} and {above_none "
        "planes_rotary l2_loss 0.001}",
        EXTENSION,
        ("language/planes_rotary", "language/planes_learned"),
        "recall_language_vision.md",
        "contradicted",
        "in a small language model, after so many steps: decoupled L2 empties no plane and lowers the rank, L2 in "
        "the loss empties whole heads, and of those that are left few planes; at the stronger decays more rank is "
        "left than with learned positions",
        lambda: (
            _planes("l2", 10.0, "planes") > 0.99  # no plane is empty, and the rank has fallen
            and _planes("l2", 10.0, "query") < 0.5 * _planes("l2", 0.0, "query")
            and all(  # of the heads that are left few planes are empty
                0.85 * _planes("l2_loss", strength, "heads") < _planes("l2_loss", strength, "planes") < 0.7
                for strength in (0.0003, 0.001)
            )
            and all(
                _planes(arm, strength, "query") > 1.5 * _planes(arm, strength, "query", "learned")
                for arm, strength in (("l2", 10.0), ("l2_loss", 0.001))
            )
        ),
    ),
    Claim(
        KOBAYASHI,
        "Under rotary positions L2 on W_Q and W_K prunes planes, and the rank follows (E2, fitted scores)",
        "of eight planes {planes_left fourier rotary active 0.4} and {planes_left fourier rotary active 0.8} are left, "
        "at ranks of {planes_left fourier rotary query_rank 0.4} and {planes_left fourier rotary query_rank 0.8}; "
        "without positions {planes_left fourier unturned active 0.4} at a rank of {planes_left fourier unturned "
        "query_rank 0.4}; of a target of rank two {planes_left shared rotary active 0.8}",
        "as models have their frequencies {planes_left geometric rotary active 0.8} and {planes_left theta rotary "
        "active 0.8} (means over seeds)",
        "rankdecay rotary --strengths 0.05 0.1 0.2 0.4 0.8 --seeds 20 --frequencies fourier; … --seeds 10; … --target "
        "shared --lr 0.03; … --theta 10000",
        ("rotary/fourier", "rotary/geometric", "rotary/shared", "rotary/theta"),
        "rotary.md",
        "holds",
        "",
        lambda: all(
            max(strong["each"]["active"]) < min(weak["each"]["active"])
            for run in ("fourier", "geometric", "theta")
            for weak, *_, strong in [rotary_findings.rows(rotary_findings.DATA / run, "rotary")]
        ),
    ),
    Claim(
        KOBAYASHI,
        "L2 under rotary positions ends at the minimum of a convex problem, the group penalty over planes",
        "certified: {planes_left fourier rotary certified} problems whose planes do not see each other, "
        "{planes_left geometric rotary certified} whose do, {planes_left heads rotary certified} with two heads on one "
        "key; W_Q and W_K can attain it in {planes_left geometric rotary attainable} and {planes_left heads rotary "
        "attainable}, and rest above it in {planes_left geometric rotary not_global} and {planes_left heads rotary "
        "not_global}",
        "above it at most {planes_left fourier rotary above_convex_largest}, {planes_left geometric rotary "
        "above_convex_largest} and {planes_left heads rotary above_convex_largest}",
        "rankdecay rotary --strengths 0.05 0.1 0.2 0.4 0.8 --seeds 20 --frequencies fourier; … --seeds 10; … --heads 2",
        ("rotary/fourier", "rotary/geometric", "rotary/heads"),
        "rotary.md",
        "holds with a condition",
        "where W_Q and W_K can attain it, nearly always; planes that see each other often cannot under weak decay",
        lambda: (
            all(
                row["certified"] == row["seeds"]
                for row in rotary_findings.rows(rotary_findings.DATA / "fourier", "rotary")
            )
            and any(row["not_global"] for row in rotary_findings.rows(rotary_findings.DATA / "heads", "rotary"))
        ),
    ),
    Claim(
        KOBAYASHI,
        "Balanced heads are a sign of decay",
        "imbalance of W_KᵀW_Q {measure language/standard l2 0 query_key imbalance} without decay and {measure "
        "language/standard l2 10 query_key imbalance} under the strongest; of W_O W_V {measure language/standard l2 0 "
        "value_output imbalance} and {measure language/standard l2 10 value_output imbalance}",
        "one seed",
        "rankdecay language --preset standard --steps 600",
        ("language/standard",),
        "recall_language_vision.md",
        "contradicted",
        "of W_KᵀW_Q in the language model; of W_O W_V, and in recall, it holds",
    ),
    Claim(
        KOBAYASHI,
        "In recall imbalance and gap fall with L2, the further the stronger",
        "five seeds, at three strengths: imbalance of W_KᵀW_Q {seeds_of recall/seeds l2 0 query_key imbalance}, "
        "{seeds_of recall/seeds l2 0.1 query_key imbalance}, {seeds_of recall/seeds l2 1 query_key imbalance}; gap of "
        "W_O W_V {seeds_of recall/seeds l2 0 value_output nuclear_gap}, {seeds_of recall/seeds l2 0.1 value_output "
        "nuclear_gap}, {seeds_of recall/seeds l2 1 value_output nuclear_gap}",
        "rank of W_KᵀW_Q {seeds_of recall/seeds l2 0 query_key} to {seeds_of recall/seeds l2 1 query_key}; ten times "
        "stronger, one seed: imbalance {measure recall/standard l2 10 query_key imbalance}",
        "rankdecay recall --arms l2 --strengths l2=0,0.1,1 --qk-norm off --seeds 5 --evaluate-every 100; rankdecay "
        "recall --preset standard",
        ("recall/seeds", "recall/standard"),
        "recall_language_vision.md",
        "holds with a condition",
        "up to where decay keeps the task from being learnt: at the strongest it does, and the imbalance is back",
        lambda: _falls_in_recall("seeds", IMBALANCE, GAP),
    ),
    Claim(
        KOBAYASHI,
        "With one query a sequence, as in the paper, recall shows the same",
        "imbalance of W_KᵀW_Q {seeds_of recall/one_query l2 0 query_key imbalance}, {seeds_of recall/one_query l2 0.1 "
        "query_key imbalance}, {seeds_of recall/one_query l2 1 query_key imbalance}; gap of W_O W_V {seeds_of "
        "recall/one_query l2 0 value_output nuclear_gap}, {seeds_of recall/one_query l2 0.1 value_output nuclear_gap}, "
        "{seeds_of recall/one_query l2 1 value_output nuclear_gap}",
        "rank of W_KᵀW_Q {seeds_of recall/one_query l2 0 query_key} to {seeds_of recall/one_query l2 1 query_key}; "
        "learnt by {learnt recall/one_query l2 0}, {learnt recall/one_query l2 0.1}, {learnt recall/one_query l2 1}",
        "rankdecay recall --queries 1 --batch-size 1024 --arms l2 --strengths l2=0,0.1,1 --qk-norm off --seeds 5 "
        "--steps 1500 --evaluate-every 100",
        ("recall/one_query",),
        "recall_language_vision.md",
        "holds with a condition",
        "gap and rank fall in the order of the strengths, in every seed; imbalance is lower than without decay, not in "
        "that order",
        lambda: (
            _falls_in_recall("one_query", GAP, RANK)
            and not _falls_in_recall("one_query", IMBALANCE)
            and all(
                max(_recall(strength, *IMBALANCE, "one_query")) < min(_recall("0", *IMBALANCE, "one_query"))
                for strength in ("0.1", "1")
            )
        ),
    ),
    Claim(
        KOBAYASHI,
        "Rank costs accuracy in a ViT",
        "MNIST's digits: at a rank of W_KᵀW_Q of {rank vision/mnist_vit low_rank 10} ({rank vision/mnist_vit l2 0} "
        "without decay) accuracy {accuracy vision/mnist_vit low_rank 10} ({accuracy vision/mnist_vit l2 0}); under "
        "L2 of all four matrices, ranks {rank vision/mnist_vit l2 10} and {rank vision/mnist_vit l2 10 "
        "value_output}, {accuracy vision/mnist_vit l2 10}",
        "accuracy beside no decay, by seed: {above_none vision/mnist_vit low_rank 10 accuracy} and {above_none "
        "vision/mnist_vit l2 10 accuracy}",
        "rankdecay vision --preset standard --image-folder runs/mnist --grey --image-size 28 --patch 7 --arms l2 "
        "low_rank --strengths l2=0,1,10 low_rank=1,10 --qk-norm off --seeds 5 --evaluate-every 200",
        ("vision/mnist_vit", "vision/standard"),
        "recall_language_vision.md",
        "contradicted",
        "of W_KᵀW_Q, to a hundredth, on these validation images; of L2 on all four matrices it may hold, one of four "
        "comparisons that are not adjusted for their number",
        lambda: (
            (found := _above_none("vision/mnist_vit", "low_rank", 10.0, "accuracy"))["low"] > -0.01
            and found["high"] > 0 > _above_none("vision/mnist_vit", "l2", 10.0, "accuracy")["high"]
        ),
    ),
    Claim(
        KOBAYASHI,
        "A low rank of W_KᵀW_Q at no cost says something of what is learnt in W_Q and W_K (the ViT)",
        "MNIST's digits, accuracy beside attention with the usual decay: W_Q and W_K never trained {control "
        "frozen_large 0.1 vision/mnist_vit accuracy} (drawn large) and {control frozen 0.1 vision/mnist_vit "
        "accuracy} (as drawn), uniform attention {control uniform 0.1 vision/mnist_vit accuracy}",
        "by seed; low-rank decay at the strongest {control low_rank 10 vision/mnist_vit accuracy}",
        VISION_CONTROLS,
        ("vision/mnist_vit",),
        "recall_language_vision.md",
        "contradicted",
        "scores are worth five points, but random ones do as well as trained ones, so nothing learnt can be lost",
        lambda: (
            _cost("uniform", "vision/mnist_vit", "accuracy")["high"] < -0.02
            and _cost("frozen_large", "vision/mnist_vit", "accuracy")["low"] > -0.01
        ),
    ),
    Claim(
        KOBAYASHI,
        "The attention of pretrained models is of low rank (two that packages ship)",
        "SmolLM2's W_KᵀW_Q {of_pretrained smollm2 query_key first} in the first layer, {of_pretrained smollm2 "
        "query_key later} after, untrained {of_pretrained smollm2 query_key untrained}; its W_O W_V "
        "{of_pretrained smollm2 value_output all}; MiniLM's {of_pretrained minilm query_key all} and {of_pretrained "
        "minilm value_output all}, "
        "untrained {of_pretrained minilm query_key untrained}",
        "ranges over layers; rounding to four bits adds at most {rounding largest smollm2} to SmolLM2's heads cut to a "
        "rank",
        PRETRAINED,
        ("pretrained.json",),
        "pretrained.md",
        "holds with a condition",
        "of W_KᵀW_Q under rotary positions, and there below untrained rather than low; of the encoder and of W_O W_V "
        "hardly",
        lambda: (
            max(_pretrained("smollm2", "query_key")) < -0.04
            and max(max(map(abs, _pretrained("minilm", p))) for p in pretrained_findings.SYMBOLS) < 0.04
            and max(map(abs, _pretrained("smollm2", "value_output"))) < 0.04
        ),
    ),
    Claim(
        KOBAYASHI,
        "Rounding to four bits raises the rank that is read from a file",
        "by {rounding mean} in the mean over heads of a known rank; at most {rounding largest gaussian} (Gaussian), "
        "{rounding largest smollm2} (SmolLM2's, cut), {rounding largest minilm} (MiniLM's, cut); "
        "MiniLM's whole heads by {rounding whole} at most",
        "means over the heads of a layer",
        PRETRAINED,
        ("pretrained.json",),
        "pretrained.md",
        "holds",
        "by little: it explains none of the differences above",
        lambda: min(pretrained_findings.rises()) >= 0 and max(pretrained_findings.rises(("smollm2",))) < 0.05,
    ),
    Claim(
        KOBAYASHI,
        "In pretrained models nuclear and mean Frobenius norm coincide, as a decay makes them",
        "ratio of W_KᵀW_Q {of_pretrained minilm query_key all nuclear_ratio} (MiniLM; untrained {of_pretrained minilm "
        "query_key untrained nuclear_ratio}) and {of_pretrained smollm2 query_key all nuclear_ratio} (SmolLM2, by "
        "plane; untrained {of_pretrained smollm2 query_key untrained nuclear_ratio}); of W_O W_V {of_pretrained minilm "
        "value_output all nuclear_ratio} ({of_pretrained minilm value_output untrained nuclear_ratio}) and "
        "{of_pretrained smollm2 value_output all nuclear_ratio} ({of_pretrained smollm2 value_output untrained "
        "nuclear_ratio})",
        "ranges over layers",
        PRETRAINED,
        ("pretrained.json",),
        "pretrained.md",
        "open",
        "it does not part trained from untrained here; with which decay they were trained is not known",
        lambda: (
            max(max(_pretrained("minilm", p, "nuclear_ratio")) for p in pretrained_findings.SYMBOLS) < 0
            and all(
                min(_pretrained("smollm2", p, "nuclear_ratio")) < 0 < max(_pretrained("smollm2", p, "nuclear_ratio"))
                for p in pretrained_findings.SYMBOLS
            )
        ),
    ),
    Claim(
        SHEEN,
        "Gradient flow on separate K and Q goes to the nuclear-norm SVM without any decay",
        "nearer to it than to the Frobenius SVM in {svm generic separate nearer} data sets; cosine "
        "{svm generic separate cosine}; merged W: {svm generic merged nearer}",
        "‖W‖_* above the least {svm generic separate excess}",
        "rankdecay margin --examples 6 --tokens 8 --dimension 10 --init random --margin 1e6 --steps 40000 "
        "--parametrisation merged separate separate_l2 recipe recipe_bare",
        ("margin/generic",),
        "margin.md",
        "holds with a condition",
        "in the logarithm of the margin: slowly",
        lambda: (
            _margin("generic", "separate")["nearer_nuclear"] == 20
            and _margin("generic", "merged")["nearer_nuclear"] == 0
        ),
    ),
    Claim(
        SHEEN,
        "Diagonal K and Q go to the ℓ1 solution",
        "norm above the least {svm diagonal diagonal excess}, at a far larger margin {svm diagonal_far diagonal "
        "excess}",
        "nearer to it in {svm diagonal diagonal nearer} data sets, then {svm diagonal_far diagonal nearer}",
        "rankdecay margin --data equal --examples 4 --tokens 3 --dimension 20 --parametrisation diagonal --rate 2e-3 "
        "--steps 40000",
        ("margin/diagonal", "margin/diagonal_far"),
        "margin.md",
        "holds with a condition",
        "the norm settles before the direction",
    ),
    Claim(
        SHEEN,
        "Low-rank decay on merged W reaches the same minimum as L2 on K and Q",
        "cosine to the nuclear SVM {svm long low_rank cosine}, of L2 {svm long separate_l2 cosine}",
        "nearer to it in {svm long low_rank nearer} data sets",
        "rankdecay margin --parametrisation low_rank separate_l2 --steps 400000 --evaluate-every 1000",
        ("margin/long",),
        "margin.md",
        "holds with a condition",
        "it arrives last",
    ),
    Claim(
        SHEEN,
        "It does so with fewer columns of K and Q than the dimension (the theorem asks for as many)",
        "four columns of ten: cosine {beyond inner inner_4 fits cosine_nuclear}, ‖W‖_* above the least {beyond inner "
        "inner_4 fits nuclear_excess}; three: {beyond inner inner_3 fits nuclear_excess} in the {beyond inner inner_3 "
        "fits count} data sets whose SVM has at most that rank",
        "where its rank is higher: three columns {beyond inner inner_3 short nuclear_excess}, two {beyond inner "
        "inner_2 short nuclear_excess} above the least of any rank",
        f"rankdecay margin {GENERIC} --inner 4 --parametrisation separate --margin 1e6 --steps 40000; … --inner 3; … 2",
        ("margin/inner_4", "margin/inner_3", "margin/inner_2", "margin/inner_1"),
        "margin.md",
        "holds with a condition",
        "as long as the SVM's rank is at most d_e",
        lambda: (
            max(margin_findings.of_inner("inner_4", True, "nuclear_excess")) < 0.03
            and min(margin_findings.of_inner("inner_1", False, "nuclear_excess")) > 0.03
        ),
    ),
    Claim(
        SHEEN,
        "Steps of finite length keep that bias",
        "normalised steps in exact arithmetic, less the flow at equal margins: cosine {beyond less finite normalised "
        "1e4}; plain descent {beyond less descent descent 10}",
        "ten times the rate: {beyond less descent_large descent 10}",
        f"rankdecay margin {GENERIC} --parametrisation separate normalised --margin 1e4; … descent --lr 10; … --lr 100",
        ("margin/finite", "margin/descent", "margin/descent_large"),
        "margin.md",
        "holds with a condition",
        "at small rates, and where a softmax of float64 does not saturate",
        lambda: (
            max(map(abs, margin_findings.differences("finite", "normalised", 1e4))) < 0.02
            and statistics.fmean(margin_findings.differences("descent_large", "descent", 10)) < -0.05
        ),
    ),
    Claim(
        SHEEN,
        "Adam on K and Q has that bias too",
        "cosine to the nuclear SVM {svm adam adam cosine}; nearer to it than to the Frobenius one in {svm adam adam "
        "nearer} data sets",
        "less the flow at equal margins: cosine {beyond less adam adam 1e3}, ‖W‖_* {beyond less adam adam 1e3 "
        "nuclear_excess} of the least",
        f"rankdecay margin {GENERIC} --parametrisation adam --lr 0.01 --beta2 0.95 --epsilon 0 --margin 1e3 "
        "--steps 60000 --evaluate-every 400",
        ("margin/adam", "margin/adam_default"),
        "margin.md",
        "contradicted",
        "it settles elsewhere, between the two and above both in norm",
        lambda: (
            max(margin_findings.differences("adam", "adam", 1e3)) < 0
            and min(margin_findings.differences("adam", "adam", 1e3, "nuclear_excess")) > 0
        ),
    ),
    Claim(
        SHEEN,
        "It is there with a value head that is trained too",
        "three examples: in {beyond head head_three yes count} data sets each is a support vector of the head, and "
        "‖W‖_* ends {beyond head head_three yes nuclear_excess} above the least, at a margin of {beyond head "
        "head_three yes margin}; in the others the margin is {beyond head head_three no margin}",
        "six examples: all hold it in {beyond head head yes count} data set, at a margin of {beyond head head yes "
        "margin}; not in {beyond head head no count}, at {beyond head head no margin} (medians)",
        f"rankdecay margin {GENERIC} --parametrisation trained_head --margin 500 --steps 40000 --evaluate-every 400; "
        "… --examples 3 --parametrisation separate trained_head",
        ("margin/head", "margin/head_three"),
        "margin.md",
        "holds with a condition",
        "for examples that hold the head: attention to the tokens of others stops",
        lambda: (
            max(margin_findings.of_head("head_three", True, "nuclear_excess")) < 0.06
            and statistics.median(margin_findings.of_head("head", False, "margin")) < 10
        ),
    ),
    Claim(
        COSTS,
        "The default costs about a hundredth of a training step of GPT-2",
        "{share step_goals.json 'cycle: defaults'} of a step of GPT-2 with short contexts; per head "
        "{share step_goals.json 'cycle: per head'}, smooth {share step_goals.json 'cycle: smooth 0.13'}",
        "medians of interleaved rounds",
        "python benchmarks/step.py --threads 2 --cases gpt2 --rounds 5",
        ("step_goals.json",),
        "cost.md",
        "holds",
    ),
    Claim(
        COSTS,
        "`smooth` is cheaper than five Newton–Schulz steps",
        "{against step_goals.json 'smooth 0.13' 'five cubic steps'} of them; without smoothing "
        "{against step_goals.json 'smooth, exact' 'five cubic steps'}; prox "
        "{against step_goals.json 'prox, exact' 'five cubic steps'}",
        "medians of interleaved rounds",
        "python benchmarks/step.py --threads 2 --cases 24x768 --rules prox smooth newton_schulz --rounds 5",
        ("step_goals.json",),
        "cost.md",
        "holds with a condition",
        "with its smoothing",
    ),
    Claim(
        COSTS,
        "Heads that fall inside a shard send no byte",
        "two processes: {sent head 2} bytes by head, {sent matrix 2} by whole matrix",
        "counted, not timed",
        "python benchmarks/sharded.py --json docs/data/sharded.json",
        ("sharded.json",),
        "cost.md",
        "holds",
    ),
    Claim(
        COSTS,
        "Inspecting a checkpoint takes no SVD of its products",
        "{value inspection.json rows:gpt2.times_faster_than_direct .0f} and {value inspection.json "
        "rows:7b.times_faster_than_direct ,.0f} times faster than one, at widths of GPT-2 and of a large Llama",
        "medians",
        "python benchmarks/inspection.py",
        ("inspection.json",),
        "inspection.md",
        "holds",
    ),
    Claim(
        COSTS,
        "A monitor costs next to nothing",
        "{value monitor.json share .3%} of a step at every hundredth",
        "medians",
        "python benchmarks/monitor.py",
        ("monitor.json",),
        "inspection.md",
        "holds",
    ),
    Claim(
        SMALLER,
        "Planes and values that decay towards the cut make it free",
        "the cut costs, at half and a quarter of the head, {cut_rise llama planes 16} and {cut_rise llama planes 8} "
        "nats (Llama), {cut_rise qwen3 planes 16} and {cut_rise qwen3 planes 8} (QK-norm)",
        "at the same step without it {cut_rise llama l2 16} and {cut_rise llama l2 8}, {cut_rise qwen3 l2 16} and "
        "{cut_rise qwen3 l2 8}",
        COMPRESS,
        ("compress",),
        "compress.md",
        "holds",
        when=lambda: all(compress_findings.mean_rise(*at) < 0.002 for at in _cuts()),
    ),
    Claim(
        SMALLER,
        "And end lower than cutting at once and healing for as many tokens",
        "above cut at once: {compressed llama planes 16 cut} and {compressed llama planes 8 cut} nats (Llama), "
        "{compressed qwen3 planes 16 cut} and {compressed qwen3 planes 8 cut} (QK-norm)",
        "above the original: {compressed llama planes 16 dense} and {compressed llama planes 8 dense}, "
        "{compressed qwen3 planes 16 dense} and {compressed qwen3 planes 8 dense}",
        COMPRESS,
        ("compress",),
        "compress.md",
        "contradicted",
        "cutting and healing is level with it; the decay pays where nobody trains after the cut",
        lambda: all(compress_findings.sign(family, "planes", size, "cut") >= 0 for family, _, size in _cuts()),
    ),
    Claim(
        SMALLER,
        "A small head is better made from a trained model than trained from the start",
        "small from the start above cut at once: {compressed llama small 16 cut} and {compressed llama small 8 cut} "
        "nats (Llama), {compressed qwen3 small 16 cut} and {compressed qwen3 small 8 cut} (QK-norm)",
        "above the original: {compressed llama small 16 dense} and {compressed llama small 8 dense}, "
        "{compressed qwen3 small 16 dense} and {compressed qwen3 small 8 dense}",
        COMPRESS,
        ("compress",),
        "compress.md",
        "open",
        "short runs, far from convergence: lower from the start at half the head, not everywhere at a quarter",
    ),
)


def _cuts() -> list[tuple[str, str, str]]:
    return [(family, "planes", size) for family in ("llama", "qwen3") for size in ("16", "8")]


def index(made: Callable[[str], str]) -> str:
    """The table of all claims, a table a group.

    Args:
        made: the text of the words in braces.

    Raises:
        ValueError: For a claim that its rows do not bear out, or that has none and is not open.
    """
    parts = []
    for group in dict.fromkeys(claim.group for claim in CLAIMS):
        lines = [f"### {group}\n", f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
        lines += [_row(claim, made) for claim in CLAIMS if claim.group == group]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _row(claim: Claim, made: Callable[[str], str]) -> str:
    status = claim.status if isinstance(claim.status, str) else claim.status()
    for text in (claim.evidence, claim.interval):
        if TYPED.search(PLACE.sub("", text)):
            raise ValueError(f"{claim.claim!r} has a number that is typed, not made: {text!r}")
    if status not in STATUSES:
        raise ValueError(f"{claim.claim!r} has the status {status!r}: choose of {', '.join(STATUSES)}")
    lacking = [name for name in claim.data if not (DATA / name).exists()]
    if lacking and status != "open":
        raise ValueError(f"{claim.claim!r} is said to be {status!r} without rows: {', '.join(lacking)}")
    if not claim.when():
        raise ValueError(
            f"the rows do not bear out {claim.claim!r} as {status!r} any more: read them, and say what they do"
        )
    evidence, interval = (PLACE.sub(lambda match: made(match[1]), text) for text in (claim.evidence, claim.interval))
    places = ", ".join(f"`{name}`" if name in lacking else f"[{name}](../data/{name})" for name in claim.data)
    made_by = ", ".join(
        dict.fromkeys(one for name in claim.data if name not in lacking for one in _commits(DATA / name))
    )
    said = f"**{status}**" + (f": {claim.condition}" if claim.condition else "")
    shown = [f"[{claim.claim}]({claim.page})", evidence, interval, f"`{claim.command}`", places, made_by or "—", said]
    return f"| {' | '.join(shown)} |"


def _commits(path: Path) -> list[str]:
    """The commits of the code that made some rows, as they say it, and which run directories below do not say it.

    Several where a grid grew, or where a directory holds several runs.
    """
    files = [path] if path.is_file() else sorted(path.rglob("config.json"))
    found: list[str] = []
    silent: list[str] = []
    for file in files:
        document = json.loads(file.read_text())
        commands = [*document.get("earlier", []), document]
        said = [(one.get("versions") or {}).get("commit") for one in commands]
        found += [commit for commit in said if commit]
        if not all(said):
            place = (file if path.is_file() else file.parent).relative_to(DATA)
            silent.append(f"part of {place}" if any(said) else str(place))
    if not found:
        return ["not recorded"]
    return [*found, *([f"not recorded ({', '.join(silent)})"] if silent else [])]
