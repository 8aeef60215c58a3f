"""Results of a run of `grok`: the headline, the claims and the note to its table.

The sentences count seeds and compare medians; they never say that one thing caused another. The controls that could
explain a success away come first.
"""

from __future__ import annotations

from rankdecay.lab.report.words import Check, Decided, Facts, counted, is_number, known, listed, span, wilson_interval
from rankdecay.lab.settings import Record
from rankdecay.rules import rule_names

LOW_RANK = ("low_rank", *rule_names())
COLLAPSED = 0.9  # an arm whose every seed generalised and whose final mean accuracy is below this did not keep it
FEW = 10  # seeds, below which medians are compared as an observation
CERTAIN = 0.2  # width of the interval of a rate that is known


def _rows(facts: Facts) -> dict[str, Record]:
    return {name: rows[0] for name, rows in facts.arms.items()}


def _any(facts: Facts) -> bool:
    return any(row["generalised"] for row in _rows(facts).values())


def _count(row: Record) -> str:
    if not row["generalised"]:
        return f"none of {counted(row['seeds'], 'seed')}"
    steps = row["steps_to_generalise"]
    median = f" (median {steps:,.0f} steps)" if is_number(steps) else ""
    return f"{row['generalised']} of {counted(row['seeds'], 'seed')}{median}"


def _named(facts: Facts, arm: str) -> str:
    """The label of an arm as part of a sentence."""
    label = facts.label(arm)
    return f"{label}," if "," in label else label


def headline(facts: Facts) -> str:
    """In how many seeds low-rank decay generalised, and what else did."""
    rows = _rows(facts)
    steps = facts.summary.get("step", facts.settings.get("steps"))
    within = f" within {steps:,} steps" if is_number(steps) else ""
    if not _any(facts):
        return f"No arm generalised{within}, so this run does not tell the arms apart."
    subjects = [name for name in rows if name in LOW_RANK]
    others = [
        f"{_named(facts, n)} in {_count(row)}" for n, row in rows.items() if row["generalised"] and n not in subjects
    ]
    if not subjects:
        return f"Generalised{within}: {listed(others)}."
    first, *more = (f"{_named(facts, name)} {{}}in {_count(rows[name])}" for name in subjects)
    outcomes = "; ".join([first.format("generalised "), *(text.format("") for text in more)])
    rest = f"so did {listed(others)}" if others else "no other arm did"
    if not any(rows[name]["generalised"] for name in subjects):
        rest = f"{listed(others)} did"
    elif len(subjects) == len(rows):
        rest = "there was no other arm to compare with"
    return f"{outcomes[0].upper()}{outcomes[1:]}{within}; {rest}."


def _control(claim: str, arm: str, how: str, open: str, if_none: str = "", if_some: str = "") -> Check:
    """The claim that a control generalised in no seed; where nothing did, its failure says nothing."""

    def decided(facts: Facts) -> Decided | None:
        row = facts.arms[arm][0]
        more = if_some if row["generalised"] else if_none
        return (not row["generalised"], f"{how}, {_count(row)} generalised{more}.") if _any(facts) else None

    return Check(claim, decided, (arm,), open)


def _earlier(facts: Facts) -> Decided | None:
    rows, tuned = _rows(facts), facts.arms["l2_tuned"][0]
    compared = [name for name in LOW_RANK if name in rows and is_number(rows[name]["steps_to_generalise"])]
    if not compared or not is_number(tuned["steps_to_generalise"]):
        return None
    ahead = {name: tuned["steps_to_generalise"] - rows[name]["steps_to_generalise"] for name in compared}
    texts = []
    for name, steps in ahead.items():
        order = f"{abs(steps):,.0f} steps {'earlier' if steps > 0 else 'later'}" if steps else "at the same median step"
        texts.append(f"{_named(facts, name)} {order} ({_seeds(rows[name])} against {_seeds(tuned)})")
    fewest = min(row["seeds"] for row in [tuned, *(rows[name] for name in compared)])
    limit = f"; {counted(fewest, 'seed')}: an observation, not a test" if fewest < FEW else ""
    return all(steps > 0 for steps in ahead.values()), f"by the median {listed(texts)}{limit}."


def _seeds(row: Record) -> str:
    return span([steps for steps in row["steps_to_generalise_by_seed"] if steps is not None], ",.0f")


def _kept(facts: Facts) -> Decided | None:
    reached = {name: row for name, row in _rows(facts).items() if row["generalised"] == row["seeds"]}
    final = {name: row["test_accuracy"] for name, row in reached.items() if is_number(row["test_accuracy"])}
    if not final:
        return None
    lost = [f"{facts.label(name)} ({value:.2f})" for name, value in final.items() if value < COLLAPSED]
    if lost:
        return False, f"every seed generalised, yet mean test accuracy at the end is lower: {listed(lost)}."
    return True, f"mean test accuracy at the end, where every seed generalised: {span(list(final.values()), '.2f')}."


def _rank(facts: Facts) -> Decided | None:
    rows = [row for name, row in _rows(facts).items() if name != "uniform_attention"]
    did = known((row for row in rows if row["generalised"] > row["seeds"] / 2), "stable_rank")
    did_not = known((row for row in rows if row["generalised"] <= row["seeds"] / 2), "stable_rank")
    if not did or not did_not:
        return None
    where = f"{span(did)} where most seeds generalised, {span(did_not)} elsewhere"
    return max(did) < min(did_not), f"{where}. Going together does not say why."


def _rate(facts: Facts) -> Decided:
    rows = _rows(facts).values()
    most, best = max(row["seeds"] for row in rows), max(row["generalised"] for row in rows)
    low, high = wilson_interval(best, most)
    return high - low <= CERTAIN, (
        f"{best} of {counted(most, 'seed')} is compatible with a true rate between {low * 100:.0f} and "
        f"{high * 100:.0f} % (95 % interval), on one task, with one model and one budget."
    )


CHECKS = (
    _control("Switching attention off is not enough", "uniform_attention", "under uniform attention",
             "whether switching attention off would do as well",
             if_some=": what a low-rank pattern does cannot be told from what switching attention off does"),
    _control("A stronger L2 is not enough", "l2_tuned", "under tuned L2",
             "whether a stronger L2 on the same matrices would do as well",
             " at the one strength tried", ": that did not require low-rank decay"),
    Check("Low-rank decay gets there before tuned L2", _earlier, ("l2_tuned",)),
    _control("Queries and keys need a decay", "none", "without one", "whether queries and keys need any decay at all",
             if_some=": the rest of the training set-up can be enough"),
    Check("What generalised stays so", _kept),
    Check("Arms that generalise end at a lower stable rank", _rank),
    Check("The rate of success is known to within 20 %", _rate),
)  # fmt: skip


def note(facts: Facts) -> str:
    """Note under the table."""
    decides = "validation" if facts.settings.get("validation") else "test"
    return (
        "Means over seeds at the end of the run; steps are their median. A seed has generalised when its "
        f"{decides} accuracy reaches {facts.summary['threshold'] * 100:g} % and the next evaluation holds it. The "
        "share of a decay step across W, its tangential part, changes the spectrum; the rest is radial. The page has "
        "the 95 % interval under a count: with few seeds it is wide."
    )
