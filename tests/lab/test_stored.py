"""Reading run directories: what no experiment could use is refused by name."""

import json

import pytest

from rankdecay.lab.errors import SettingError
from rankdecay.lab.stored import read_run


def test_a_summary_of_another_experiment_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"command": "factor", "arms": []}))
    (tmp_path / "summary.json").write_text(json.dumps({"command": "grok", "arms": []}))
    with pytest.raises(SettingError, match=r"belongs to 'grok', but config.json to 'factor'"):
        read_run(tmp_path)


def test_a_run_without_a_summary_is_not_complete(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"command": "factor", "arms": [{"name": "merged"}]}))
    stored = read_run(tmp_path)
    assert (stored.complete, stored.summary, stored.arms, stored.last_step) == (False, None, ["merged"], None)
