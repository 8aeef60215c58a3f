"""The registry of decay rules."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rankdecay as rd
from rankdecay import cli
from rankdecay.linalg import rules as folder
from rankdecay.linalg import shrink
from rankdecay.rules import Rule, get_rule, register_rule, rule_names
from tests.waiting import HANG

BUILT_IN = ("newton_schulz", "polar", "prox", "smooth")


pytestmark = pytest.mark.usefixtures("nothing_stays_registered")


def keep_all(sigma, null, tau, options):
    return 0 * sigma


RULE = Rule("keep_all", "σ", keep_all)


def test_every_file_is_a_rule_of_its_name():
    files = {file.stem for file in Path(folder.__path__[0]).glob("*.py")} - {"__init__"}
    assert files == set(BUILT_IN)
    assert set(BUILT_IN) <= set(rule_names())
    for name in BUILT_IN:
        assert get_rule(name).name == name
        assert f"``{name}``" in folder.__doc__


def test_names_are_known_and_checked_without_torch():
    code = (
        "import sys\nimport rankdecay.rules\nfrom rankdecay.decay.policy import LowRank\n"
        f"assert rankdecay.rules.rule_names() == {BUILT_IN!r}, rankdecay.rules.rule_names()\n"
        "LowRank(0.1, rule='polar')\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr


def test_a_registered_rule_is_known_by_its_name():
    with pytest.raises(ValueError, match=r"rule='keep_all' is unknown"):
        rd.LowRank(0.1, rule="keep_all")
    assert register_rule(RULE) is RULE
    assert register_rule(RULE) is RULE  # once more, as a module that is imported again does
    assert get_rule("keep_all") is RULE
    assert rd.LowRank(0.1, rule="keep_all").describe() == "low-rank keep-all, 0.1, relative"
    with pytest.raises(ValueError, match=r"rule='keep_al' is unknown: did you mean 'keep_all'\? \(known: .*prox.*\)"):
        rd.LowRank(0.1, rule="keep_al")


@pytest.mark.parametrize("name", ["prox", "frobenius", "keep_all"])
def test_a_name_has_one_rule(name):
    register_rule(RULE)
    with pytest.raises(ValueError, match=f"'{name}' is the name of another rule"):
        register_rule(Rule(name, "something else", lambda sigma, null, tau, options: tau / sigma))


def test_a_name_is_an_identifier():
    with pytest.raises(ValueError, match=r"must be an identifier, such as 'log_penalty'; got 'log penalty'"):
        register_rule(replace(RULE, name="log penalty"))


def test_only_a_rule_that_reads_it_describes_the_smoothing():
    assert "ε = 0.1·‖W‖_F" in rd.LowRank(1.0, rule="smooth", smoothing=0.1).describe()
    assert "ε" not in rd.LowRank(1.0, rule="polar", smoothing=0.1).describe()


@pytest.mark.parametrize("command", ["grok", "boundary"])
def test_the_help_names_the_rules(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    words = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    [explained] = re.findall(r"--rule STR (.*?) --", words)
    assert all(name in explained for name in BUILT_IN)


@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        (lambda sigma, null, tau, options: None, "must return a share for each of sigma"),
        (lambda sigma, null, tau, options: sigma[..., :2], "must return a share for each of sigma"),
        (lambda sigma, null, tau, options: sigma > tau, "must return a share for each of sigma"),
        (lambda sigma, null, tau, options: sigma * math.nan, "must return a share for each of sigma"),
        (lambda sigma: sigma, r"fails \(TypeError: .*it is called with \(sigma, null, tau, options\)"),
    ],
)
def test_a_fraction_that_gives_no_shares_is_refused_by_the_name_of_its_rule(fraction, message):
    with pytest.raises(ValueError, match=f"the fraction of rule 'mistaken' {message}"):
        register_rule(Rule("mistaken", "a mistake", fraction))
    assert "mistaken" not in rule_names()


@pytest.mark.parametrize("backend", ["exact", "matmul"])
def test_a_share_that_is_no_number_is_none_in_the_weight_either(backend):
    def fraction(sigma, null, tau, options):
        return torch.where(tau > 1, math.nan, 0.1) * torch.ones_like(sigma)

    register_rule(Rule("sometimes", "a tenth, or nothing that is a number", fraction))
    W = torch.eye(3).repeat(2, 1, 1)
    got = shrink(W, torch.tensor([0.5, 2.0]), "sometimes", backend=backend)
    torch.testing.assert_close(got[0], 0.9 * W[0])
    assert got[1].isnan().all()


@pytest.mark.parametrize(
    "rule",
    [
        Rule("of_the_norm", "a share of the norm", lambda sigma, null, tau, options: tau / (1 + tau)),
        Rule(
            "all_of_the_small", "0 below 4 τ", lambda sigma, null, tau, options: torch.where(sigma <= 4 * tau, 9e9, 0.0)
        ),
        Rule("smoothed", "σ / s", lambda sigma, null, tau, options: tau / options.smoothing, smoothing=True),
    ],
    ids=lambda rule: rule.name,
)
def test_rules_that_give_one_share_or_more_than_all_are_taken(rule):
    assert register_rule(rule) is rule
    assert shrink(torch.eye(3), 0.1, rule.name, smoothing=0.5).isfinite().all()
