import random

from rankdecay.lab.experiment import Arm, Axis, Chart, Check, Column, Experiment, Job, Line, Section
from rankdecay.lab.report.words import known
from rankdecay.lab.settings import question, seeds
from tests.lab.toy.settings import PRESETS, Toy, check


def train(work):
    for job in work.jobs:
        place = random.Random(job.key["seed"]).uniform(1, 2)
        yield job.key | {"step": work.settings.steps, "place": place * (1 - job.how.how) ** work.settings.steps}


def summarise(work, rows):
    places = {arm.name: [row["place"] for row in rows if row["arm"] == arm.name] for arm in work.arms}
    return {"arms": [{"name": name, "seeds": len(own), "place": max(own)} for name, own in places.items()]}


def sections(stored):
    lines = [Line(arm, *zip(*[(r["seed"], r["place"]) for r in stored.rows if r["arm"] == arm], strict=True), arm=arm,
                  mark="points") for arm in dict.fromkeys(row["arm"] for row in stored.rows)]  # fmt: skip
    return [Section("Places", "Where points ended.", [Chart("places", "Places", Axis("seed"), Axis("place"), lines)])]


EXPERIMENT = Experiment(
    name="toy",
    question=question(Toy),
    presets=PRESETS,
    check=check,
    arms=lambda settings: [Arm("none", "No decay.", 0.0), Arm("decay", "Decay.", settings.decay)],
    jobs=lambda work: [Job({"arm": a.name, "seed": s}, a) for s in seeds(work.settings) for a in work.arms],
    train=train,
    summarise=summarise,
    columns=[Column("furthest", "place")],
    headline=lambda facts: f"The furthest point is at {max(known(facts.summary['arms'], 'place')):.3g}.",
    checks=[Check("Decay brings points nearer", lambda facts: (facts.arms["decay"][0]["place"] < 1, "."), ("decay",))],
    sections=sections,
)
