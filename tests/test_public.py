"""The public API as a user meets it: `import rankdecay as rd`, and the README's example."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rankdecay as rd
from rankdecay import cli
from tests import needs
from tests.waiting import HANG
from tests.walked import python_blocks, walk

ROOT = Path(__file__).resolve().parents[1]


def test_importing_the_package_does_not_import_torch():
    code = "import sys, rankdecay; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG)
    assert answer.stdout.strip() == "False"


@pytest.mark.parametrize("name", rd.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(rd, name).__doc__


def test_spectrum_stays_the_function_whatever_is_imported_first():
    code = (
        "import rankdecay.spectrum, rankdecay as rd, torch\n"
        "assert rd.spectrum(torch.eye(3)).stable_rank == 3\n"
        "from rankdecay.spectrum import Spectrum\n"
        "assert rd.Spectrum is Spectrum"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=HANG)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(AttributeError, match="soft_threshold"):
        rd.softthreshold  # noqa: B018


def test_the_consumer_that_ci_checks_the_types_of_uses_every_public_name():
    text = (ROOT / ".ci" / "consumer.py").read_text(encoding="utf-8")
    assert [name for name in rd.__all__ if not re.search(rf"\brd\.{name}\b", text)] == []


def test_the_readmes_training_script_lowers_the_rank_of_attention(tmp_path, monkeypatch, capsys):
    needs.package("transformers")
    monkeypatch.chdir(tmp_path)
    [block] = python_blocks("README.md")
    exec(block, {})
    assert cli.main(["inspect", "model"]) == 0
    shown = re.search(r"<!-- walk: printed -->\n```text\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert shown is not None
    assert walk.same(shown[1], capsys.readouterr().out)


def test_the_quickstarts_script_lowers_the_rank_of_attention(capsys):
    needs.package("transformers")
    exec(python_blocks("docs/quickstart.md")[0], {})
    before, after = capsys.readouterr().out.split("rankdecay, attached to AdamW")[1:]
    ranks = [[int(line.split()[-1]) for line in table.splitlines() if "c_attn" in line] for table in (before, after)]
    assert ranks[0] == [128] * 4
    assert max(ranks[1]) < 50


def test_the_matrix_functions_of_the_reference_run(capsys):
    exec(python_blocks("docs/reference/matrices.md")[0], {})
    rank, left = (float(number) for number in re.findall(r"tensor\((\d[\d.]*)", capsys.readouterr().out))
    assert rank > 50
    assert 60 < left < 110
