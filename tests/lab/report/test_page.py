import json

import numpy as np

from rankdecay.lab.report import page as pieces
from rankdecay.lab.report.run_page import reproduce


def test_numbers_that_are_not_finite_become_null():
    value = {
        "a": [float("nan"), float("inf"), 0.123456],
        "b": np.array([1.0, np.nan], dtype=np.float32),
        "c": True,
    }
    assert json.loads(pieces.embedded(value)) == {"a": [None, None, 0.1235], "b": [1.0, None], "c": True}


def test_reproduce_from_settings_or_as_recorded():
    settings = {"task": "two words", "steps": 600, "early_stop": False, "qk_norm": True, "note": None}
    settings |= {"fractions": [0.3, 0.4], "model": {"width": 64}}
    words = "rankdecay grok --task 'two words' --steps 600 --no-early-stop --qk-norm --fractions 0.3 0.4"
    assert reproduce({"command": "grok", "settings": settings}) == f"{words} --model.width 64 --out DIR"
    assert reproduce({"reproduce": "rankdecay grok --seeds 5"}) == "rankdecay grok --seeds 5"
