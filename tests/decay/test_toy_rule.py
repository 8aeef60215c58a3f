"""A rule of one file goes everywhere: LowRank, attach, FSDP2, the lab's ensembles, the command line, an entry point."""

import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rankdecay as rd
from rankdecay import cli, rules
from rankdecay.linalg import record_backends, shrink
from rankdecay.linalg.gram import shrink_factor
from tests.decay import toy_rule
from tests.ranks import on_ranks


def by_svd(W: Tensor, tau: Tensor | float) -> Tensor:
    """The formula in `toy_rule`, from a float64 SVD."""
    U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    sigma = sigma - torch.as_tensor(tau, dtype=torch.float64)[..., None] * sigma / (1 + sigma**2)
    return (U * sigma[..., None, :]) @ Vh


# ---- one matrix ------------------------------------------------------------------------------------------------


@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    tau=st.floats(0, 1),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    backend=st.sampled_from(["auto", "exact", "matmul"]),
    seed=st.integers(0, 10**6),
)
def test_the_formula_is_all_that_a_step_needs(m, n, tau, scale, backend, seed):
    W = scale * torch.randn(2, m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with record_backends() as ran:
        got = shrink(W, tau, "toy", backend=backend)
    assert "matmul" not in ran  # it has no products
    torch.testing.assert_close(got, by_svd(W, tau), rtol=0, atol=1e-9 * scale)
    C = shrink_factor(W.mT @ W, torch.full((2,), tau, dtype=torch.float64), "toy", backend="matmul")
    torch.testing.assert_close(W - W @ C, by_svd(W, tau), rtol=0, atol=1e-5 * scale)


# ---- an optimizer, in one process and in two -------------------------------------------------------------------


def network() -> nn.Module:
    """A matrix for each way of sharing: one much longer than wide, a square one, both on the role ``other``."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 64, bias=False), nn.Linear(64, 64, bias=False))


def decayed(model: nn.Module) -> list[Tensor]:
    """The weights after two steps without a gradient."""
    groups = rd.param_groups(model, other=rd.LowRank(3.0, rule="toy", every=2, scale="absolute"))
    optimizer = torch.optim.SGD(groups, lr=0.1)
    attachment = rd.attach(optimizer)
    assert "toy, 3" in attachment.describe()
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def test_an_optimizer_decays_by_it():
    model = network()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for new, old in zip(decayed(model), before, strict=True):
        torch.testing.assert_close(new.double(), by_svd(old, 2 * 3.0 * 0.1), rtol=0, atol=1e-6)
        assert not torch.allclose(new, old, atol=1e-3)


def sharded() -> tuple[list[Tensor], dict[str, int]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    model = network()
    for layer in model:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    with CommDebugMode() as seen:
        weights = decayed(model)
    calls = {str(name).rpartition(".")[2]: count for name, count in seen.get_comm_counts().items()}
    return [weight.full_tensor() for weight in weights], calls


def test_two_processes_of_fsdp2_decay_by_it():
    alone = decayed(network())
    for weights, calls in on_ranks(2, sharded):
        assert calls == {"_reduce_scatter_base_": 1, "_allgather_base_": 1, "alltoall_base_": 2}  # both ways of sharing
        for new, expected in zip(weights, alone, strict=True):
            torch.testing.assert_close(new, expected, rtol=0, atol=1e-6)


# ---- the lab ---------------------------------------------------------------------------------------------------


def test_an_ensemble_decays_by_it():
    from rankdecay.lab.ensemble.ensemble import Ensemble
    from rankdecay.lab.ensemble.members import Member, Training
    from rankdecay.lab.ensemble.transformer import TransformerConfig
    from rankdecay.lab.tasks import make_dataset

    config = TransformerConfig(6, 3, 5, width=8, depth=2, heads=2, mlp_width=12)
    decay = rd.LowRank(0.3, rule="toy", scale="absolute", lr_coupled=False)
    members = [Member("toy", 0, decay, 1.0), Member("none", 0, None, 1.0)]
    data = [make_dataset("subtract", 0, modulus=5, train_fraction=0.6) for _ in members]
    ensemble = Ensemble(config, members, data, Training(batch_size=10, precision="float64"))
    ensemble.train(1)  # AdamW does the same to both
    decayed, untouched = ensemble.query_key
    torch.testing.assert_close(decayed, by_svd(untouched, 0.3), rtol=0, atol=1e-9)


TINY = "--task add --modulus 5 --steps 4 --evaluate-every 2 --seeds 1 --batch-size 4 --width 8 --precision float32"


def grok(out, rule: str) -> int:
    options = [*TINY.split(), "--device", "cpu", "--arms", "none", "low_rank", "--rule", rule, "--out", str(out)]
    return cli.main(["grok", *options, "--quiet"])


def test_the_command_line_takes_it(tmp_path):
    assert grok(tmp_path / "run", "toy") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["rule"] == "toy"
    assert config["arms"][1]["decay"]["rule"] == "toy"
    assert {arm["name"] for arm in json.loads((tmp_path / "run" / "summary.json").read_text())["arms"]} == {
        "none",
        "low_rank",
    }


def test_the_command_line_names_the_known_rules(tmp_path, capsys):
    assert grok(tmp_path / "run", "tou") == 2
    line = capsys.readouterr().err
    assert "--rule 'tou' is unknown: did you mean 'toy'? (known: newton_schulz, polar, prox, smooth, toy)" in line


# ---- another package -------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch, nothing_stays_registered):
    """An installed package, which names a rule ``linear`` in its metadata."""
    (tmp_path / "their_rule.py").write_text(
        "from rankdecay.rules import Rule\n"
        "RULE = Rule('linear', 'σ (1 - τ)', lambda sigma, null, tau, options: tau.expand_as(sigma))\n"
    )
    metadata = tmp_path / "their_rule-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rule\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[rankdecay.rules]\nlinear = their_rule:RULE\nwrong = their_rule:RULE\n")
    monkeypatch.syspath_prepend(tmp_path)
    rules._loaders.cache_clear()
    yield
    rules._loaders.cache_clear()
    sys.modules.pop("their_rule", None)


@pytest.mark.usefixtures("package")
def test_a_package_adds_a_rule_by_an_entry_point(tmp_path):
    assert "linear" in rules.rule_names()
    assert "their_rule" not in sys.modules  # imported when it is used
    assert rd.LowRank(0.1, rule="linear").rule == "linear"
    W = torch.randn(3, 5, 4)
    torch.testing.assert_close(shrink(W, 0.25, "linear"), 0.75 * W)
    assert grok(tmp_path / "run", "linear") == 0
    with pytest.raises(ValueError, match=r"the entry point 'wrong' of rankdecay\.rules must be a Rule of that name"):
        rules.get_rule("wrong")


def test_the_rule_of_the_tests_is_the_registered_one():
    assert rules.get_rule("toy") is toy_rule.RULE
