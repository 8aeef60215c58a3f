"""Names of projections: which are complete, and a table without rows that can never match."""

from __future__ import annotations

import pytest

import rankdecay as rd
from rankdecay.attention.names import FUSED


def test_three_projections_or_a_fused_one_are_needed() -> None:
    for given in ({}, {"query": "q"}, {"query": "q", "key": "k"}, {"fused": "qkv", "key": "k"}):
        with pytest.raises(ValueError, match=r"expected query, key and value, or fused alone"):
            rd.AttentionNames(**given)


def test_a_query_beside_a_fused_parameter_leaves_keys_and_values_in_it() -> None:
    assert rd.AttentionNames(query="q", fused="kv").order == "kv"
    assert rd.AttentionNames(fused="qkv").order == "qkv"


@pytest.mark.parametrize("given", [{"num_heads": 0}, {"head_dim": 2.0}, {"blocks": True}])
def test_numbers_are_whole_and_positive(given) -> None:
    [(name, value)] = given.items()
    with pytest.raises(ValueError, match=rf"^{name}={value} must be a whole number >= 1$"):
        rd.AttentionNames(fused="qkv", **given)


def test_one_output_name_or_several() -> None:
    assert rd.AttentionNames(fused="qkv", output="out").outputs == ("out",)
    assert rd.AttentionNames(fused="qkv", output=("out", "proj")).outputs == ("out", "proj")
    assert rd.AttentionNames(fused="qkv").outputs == ()


def test_no_known_row_is_hidden_by_an_earlier_one() -> None:
    """A row without a condition matches wherever all its projections exist, so none of its supersets may follow it."""
    for i, row in enumerate(FUSED):
        for earlier in FUSED[:i]:
            assert earlier.when is not None or not set(earlier.projections) <= set(row.projections), (earlier, row)
