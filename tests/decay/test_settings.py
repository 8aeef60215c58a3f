"""Settings as data: text and dictionaries, there and back, and what is wrong with one that cannot be read."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rankdecay as rd
from rankdecay.decay.roles import ROLES
from rankdecay.decay.settings import as_settings
from rankdecay.rules import rule_names
from tests import needs

NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "output": ["to_out", "out"], "num_heads": 2}


def test_text_and_dictionaries_say_the_same():
    expected = {"query_key": rd.LowRank(0.1, rule="smooth", every=4), "value_output": rd.Frobenius(0.0)}
    text = "query_key=LowRank:0.1:rule=smooth:every=4, value_output = Frobenius:0.0"
    by_field = {"decay": "LowRank", "strength": 0.1, "rule": "smooth", "every": 4}
    assert rd.decays(text) == expected
    assert rd.decays({"query_key": "LowRank:0.1:rule=smooth:every=4", "value_output": "Frobenius:0"}) == expected
    assert rd.decays({"query_key": by_field, "value_output": rd.Frobenius(0.0), "mlp": None}) == expected
    assert rd.decays("query_key=LowRank:strength=1e-1:rule=smooth:every=4", value_output="Frobenius:0") == expected


def test_yaml_reads_small_numbers_as_text():
    yaml = needs.package("yaml")
    read = yaml.safe_load("query_key: {decay: LowRank, strength: 1e-3, lr_coupled: no}\nexclude: [lm_head]")
    assert read["query_key"]["strength"] == "1e-3"
    assert rd.decays(read) == {"query_key": rd.LowRank(1e-3, lr_coupled=False), "exclude": ["lm_head"]}


def test_the_other_arguments():
    text = "query_key=LowRank:0.1,exclude=lm_head;*.layers.0.*,only=true,num_heads=2,backend=exact,counts=attachment"
    others = {"exclude": ["lm_head", "*.layers.0.*"], "only": True, "num_heads": 2, "backend": "exact"}
    assert rd.decays(text) == {"query_key": rd.LowRank(0.1), **others, "counts": "attachment"}
    pattern = re.compile("layers.[01]", re.IGNORECASE)
    read = rd.decays({"query_key": "LowRank:0.1", "exclude": [{"regex": "layers.[01]", "flags": 2}], "names": NAMES})
    assert read["exclude"] == [pattern]
    assert read["names"] == [rd.AttentionNames(**{**NAMES, "output": ("to_out", "out")})]


def test_attach_takes_them():
    model = torch.nn.MultiheadAttention(8, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    attachment = rd.attach(optimizer, model, **rd.decays("query_key=LowRank:0.1,exclude=out_proj"))
    assert {row.decay for row in attachment.rows() if row.role == "query_key"} == {"low-rank prox, 0.1, relative"}


strengths = st.floats(0, 1e6)
low_rank = st.builds(
    rd.LowRank,
    strength=strengths,
    rule=st.sampled_from(rule_names()),
    scale=st.sampled_from(["relative", "absolute"]),
    unit=st.sampled_from(["matrix", "head"]),
    every=st.integers(1, 100),
    lr_coupled=st.booleans(),
    smoothing=strengths,
)
frobenius = st.builds(rd.Frobenius, strength=strengths, lr_coupled=st.booleans())


@given(st.dictionaries(st.sampled_from(["default", *ROLES]), low_rank | frobenius, min_size=1), st.booleans())
def test_there_and_back(roles: dict[str, Any], more: bool):
    if more:
        roles |= {
            "exclude": ["lm_head", re.compile("x", re.I)],
            "names": [rd.AttentionNames(fused="qkv")],
            "only": True,
        }
    written = json.loads(json.dumps(as_settings(roles)))
    assert rd.decays(written) == roles
    if not more:
        assert rd.decays(",".join(f"{role}={decay}" for role, decay in written.items())) == roles


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("query_kye=LowRank:0.1", "setting='query_kye' is unknown: did you mean 'query_key'?"),
        ({"strength": 0.1}, "setting='strength' is unknown"),
        (
            "query_key=LowRnk:0.1",
            "query_key='LowRnk:0.1' is not a decay: decay='LowRnk' is unknown: did you mean 'LowRank'",
        ),
        ("mlp=LowRank:0.1:rul=smooth", "mlp=.* is not a decay: field='rul' is unknown: did you mean 'rule'?"),
        ("mlp=Frobenius:0.1:rule=smooth", "mlp=.* field='rule' is unknown: .*known: strength, power, cap"),
        ("mlp=LowRank:0.1:rule=smoth", "mlp=.* rule='smoth' is unknown: did you mean 'smooth'?"),
        (
            "mlp=LowRank:a",
            "mlp='LowRank:a' is not a decay: strength='a' must be a finite number >= 0; 0 switches it off",
        ),
        ("mlp=LowRank:nan", "mlp='LowRank:nan' is not a decay: strength=nan must be a finite number"),
        ("mlp=LowRank:0.1:every=2.5", "mlp=.* every=2.5 must be a whole number >= 1"),
        ("mlp=LowRank:0.1:lr_coupled=perhaps", "mlp=.* lr_coupled='perhaps' must be true or false"),
        (
            "mlp=LowRank",
            "mlp='LowRank' is not a decay: it has no strength; write 'Frobenius:0.1' or 'LowRank:0.1' or 'Planes:0.1'",
        ),
        ("mlp=LowRank:0.1:smooth", "'smooth' has no '='"),
        ("mlp=Frobenius:0.1:power=true", "mlp='Frobenius:0.1:power=true' is not a decay: power=True must be a number"),
        ("mlp=LowRank:0.1:strength=0.2", "strength is given twice"),
        ("mlp", "'mlp' in the settings 'mlp' has no '='; write them as in 'query_key=LowRank:0.1,"),
        ("mlp=LowRank:1,mlp=LowRank:2", "mlp is in the settings .* twice"),
        (
            {"mlp": 0.1},
            "mlp=0.1 is not a decay: write 'Frobenius:0.1' or 'LowRank:0.1' or 'Planes:0.1', or a dictionary",
        ),
        ({"mlp": {"rule": "smooth"}}, "mlp=.* is not a decay: write .* a dictionary with 'decay' for its kind"),
        ({"mlp": {"decay": ["LowRank"]}}, "mlp=.* decay=\\['LowRank'\\] is unknown"),
        ("mlp=LowRank:1,names=to_q", "names='to_q' must be a dictionary of the arguments of rankdecay.AttentionNames"),
        ({"mlp": "LowRank:1", "names": {"qurey": "a"}}, "field of names='qurey' is unknown: did you mean 'query'?"),
        ("mlp=LowRank:1,num_heads=two", "num_heads='two' must be a whole number >= 1"),
        ("mlp=LowRank:1,only=2", "only='2' must be true or false"),
        ("", "no role is named, so there is nothing to decay: give settings such as 'query_key=LowRank:0.1"),
        ("exclude=lm_head", "no role is named"),
    ],
)
def test_bad_settings(settings: Any, message: str):
    with pytest.raises(ValueError, match=message):
        rd.decays(settings)


def test_a_setting_given_twice_or_of_no_kind():
    with pytest.raises(ValueError, match="mlp is in the settings and among the arguments; give it once"):
        rd.decays("mlp=LowRank:0.1", mlp=rd.LowRank(0.1))
    with pytest.raises(TypeError, match=r"settings=0.1 must be a dictionary, or text such as 'query_key=LowRank:0.1"):
        rd.decays(0.1)  # pyright: ignore[reportArgumentType]


def test_none_in_text_is_none():
    found = rd.decays("query_key=LowRank:0.1:every=none,mlp=Frobenius:0.1:cap=None")
    assert found == {"query_key": rd.LowRank(0.1), "mlp": rd.Frobenius(0.1)}
