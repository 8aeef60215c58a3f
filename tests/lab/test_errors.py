"""How an error names a setting: by its argument where it is raised, by the option where it is read."""

import pickle

import pytest

from rankdecay import cli
from rankdecay.lab.errors import SettingError, check_name


def test_a_setting_in_backticks_is_shown_as_an_option_under_the_name_it_has_where_it_was_asked():
    error = SettingError("`train_fraction` 1.5 is outside (0, 1): `modulus` decides")
    assert str(error) == "--train-fraction 1.5 is outside (0, 1): --modulus decides"
    error.names = {"train_fraction": "fractions"}
    assert str(error) == "--fractions 1.5 is outside (0, 1): --modulus decides"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # as it comes from a worker of another process


def test_an_unknown_name_names_its_setting_too():
    with pytest.raises(SettingError, match=r"^--data-set 'x' is unknown"):
        check_name("`data_set`", "x", ["y"])


def test_an_experiment_names_its_own_options(tmp_path, capsys):
    assert cli.main(["boundary", "--fractions", "1.5", "--out", str(tmp_path / "run")]) == 2
    assert "--fractions 1.5 is outside (0, 1)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
