"""The registry of decay rules."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import rankdecay as rd
from rankdecay import cli, rules
from rankdecay.linalg import rules as folder
from rankdecay.rules import Rule, get_rule, register_rule, rule_names
from tests.waiting import HANG

BUILT_IN = ("newton_schulz", "polar", "prox", "smooth")


@pytest.fixture(autouse=True)
def nothing_stays_registered(monkeypatch):
    monkeypatch.setattr(rules, "_registered", dict(rules._registered))


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
