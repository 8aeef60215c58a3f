"""The batched transformer against an ordinary one, and the symmetries that the experiment rests on."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from rankdecay.lab.ensemble.transformer import TransformerConfig, forward, initial_parameters, loss
from tests.lab.ensemble.reference import ReferenceTransformer

VOCABULARY, OUTPUTS, MEMBERS = 11, 7, 2
SMALL, LARGE = 4, 25  # batches below and above the vocabulary take different paths


def make_config(**changes) -> TransformerConfig:
    settings = {"vocabulary": VOCABULARY, "length": 3, "outputs": OUTPUTS, "width": 8, "heads": 2, "mlp_width": 12}
    return TransformerConfig(**(settings | changes))


def make_members(config: TransformerConfig, members: int = MEMBERS) -> dict[str, torch.Tensor]:
    """Stacked initial parameters; gains are drawn too, so that they matter."""
    rows = [initial_parameters(config, seed) for seed in range(members)]
    generator = torch.Generator().manual_seed(7)
    stacked = {}
    for name in rows[0]:
        value = torch.stack([row[name] for row in rows])
        if name.startswith("norm"):
            value = 0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64)
        stacked[name] = value.requires_grad_()
    return stacked


def make_batch(config: TransformerConfig, batch: int, members: int = MEMBERS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(config.vocabulary, (members, batch, config.length), generator=generator)
    return tokens, torch.randint(config.outputs, (members, batch), generator=generator)


def losses(parameters, tokens, targets, config) -> torch.Tensor:
    return loss(parameters, tokens, targets, config, torch.float64)


def gradients(parameters, tokens, targets, config) -> dict[str, torch.Tensor]:
    total = losses(parameters, tokens, targets, config).sum()
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


def scaled(parameters, name: str, factor: float) -> dict[str, torch.Tensor]:
    return parameters | {name: (factor * parameters[name].detach()).requires_grad_()}


VARIANTS = list(itertools.product(["head", "width", "none"], [False, True], [1, 2], [3, 5], [SMALL, VOCABULARY, LARGE]))


@pytest.mark.parametrize(("qk_norm", "gains", "depth", "length", "batch"), VARIANTS)
def test_equals_an_ordinary_transformer(qk_norm, gains, depth, length, batch):
    config = make_config(qk_norm=qk_norm, gains=gains, depth=depth, length=length)
    parameters, (tokens, targets) = make_members(config), make_batch(config, batch)

    logits = forward(parameters, tokens, config, torch.float64)
    grads = gradients(parameters, tokens, targets, config)

    for m in range(MEMBERS):
        network = ReferenceTransformer.with_parameters(config, {k: v[m] for k, v in parameters.items()})
        expected = network(tokens[m])
        torch.testing.assert_close(logits[m], expected, atol=1e-10, rtol=0)
        F.cross_entropy(expected, targets[m]).backward()
        for name, grad in grads.items():
            torch.testing.assert_close(grad[m], network.parameter_named(name).grad, atol=1e-10, rtol=0)


def test_loss_is_the_mean_cross_entropy_of_each_member():
    config = make_config()
    parameters, (tokens, targets) = make_members(config), make_batch(config, LARGE)
    logits = forward(parameters, tokens, config, torch.float64)
    expected = torch.stack([F.cross_entropy(logits[m], targets[m]) for m in range(MEMBERS)])
    torch.testing.assert_close(losses(parameters, tokens, targets, config), expected, atol=1e-12, rtol=0)


# --- what scale invariance means ------------------------------------------------------------------------------

QUERIES_AND_KEYS = ["query.0", "key.0", "query.1", "key.1"]


@pytest.mark.parametrize("batch", [SMALL, LARGE])
@pytest.mark.parametrize("qk_norm", ["head", "width"])
@pytest.mark.parametrize("name", QUERIES_AND_KEYS)
@pytest.mark.parametrize("factor", [0.01, 3.0, 100.0])
def test_with_qk_norm_the_scale_of_queries_and_keys_is_invisible(name, qk_norm, factor, batch):
    config = make_config(qk_norm=qk_norm)
    parameters, (tokens, targets) = make_members(config), make_batch(config, batch)
    before, after = (losses(p, tokens, targets, config) for p in (parameters, scaled(parameters, name, factor)))
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)  # up to the ε of the norm at the smallest scale
    if factor > 1:
        torch.testing.assert_close(after, before, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["value.0", "value.1", "output.0", "mlp_in.1", "mlp_out.0", "unembedding"])
def test_the_scale_of_every_other_matrix_is_visible(name):
    config = make_config()
    parameters, (tokens, targets) = make_members(config), make_batch(config, LARGE)
    before, after = (losses(p, tokens, targets, config) for p in (parameters, scaled(parameters, name, 3.0)))
    assert ((after - before).abs() > 1e-3).all()


@pytest.mark.parametrize("name", QUERIES_AND_KEYS)
def test_without_qk_norm_the_scale_of_queries_and_keys_is_visible(name):
    config = make_config(qk_norm="none")
    parameters, (tokens, targets) = make_members(config), make_batch(config, LARGE)
    before, after = (losses(p, tokens, targets, config) for p in (parameters, scaled(parameters, name, 3.0)))
    assert ((after - before).abs() > 1e-5).all()
    grad = gradients(parameters, tokens, targets, config)[name]
    assert ((grad * parameters[name]).sum((-2, -1)).abs() > 1e-6).all()


@pytest.mark.parametrize("qk_norm", ["head", "width"])
@pytest.mark.parametrize("batch", [SMALL, LARGE])
def test_gradients_of_queries_and_keys_are_tangential(qk_norm, batch):
    config = make_config(qk_norm=qk_norm)
    parameters, (tokens, targets) = make_members(config), make_batch(config, batch)
    grads = gradients(parameters, tokens, targets, config)
    for name, grad in grads.items():
        weight = parameters[name]
        radial = (grad * weight).flatten(1).sum(1).abs() / (grad.flatten(1).norm(dim=1) * weight.flatten(1).norm(dim=1))
        if name in QUERIES_AND_KEYS:
            assert (radial < 1e-9).all(), name
        elif name.startswith("value"):
            assert (radial > 1e-6).all(), name


@pytest.mark.parametrize("name", QUERIES_AND_KEYS)
@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_scaling_queries_by_c_divides_their_gradient_by_c(name, factor):
    config = make_config()
    parameters, (tokens, targets) = make_members(config), make_batch(config, LARGE)
    before = gradients(parameters, tokens, targets, config)
    after = gradients(scaled(parameters, name, factor), tokens, targets, config)
    for other in before:
        expected = before[other] / factor if other == name else before[other]
        torch.testing.assert_close(after[other], expected, atol=1e-9, rtol=1e-8)


def test_per_head_norm_makes_every_head_invariant_by_itself():
    """One norm over the full width does not: there the whole matrix is the unit."""
    batches = {}
    for qk_norm in ("head", "width"):
        config = make_config(qk_norm=qk_norm)
        parameters, (tokens, targets) = make_members(config), make_batch(config, LARGE)
        query = parameters["query.0"].detach().clone()
        query[:, : config.head_dim] *= 5
        after = losses(parameters | {"query.0": query}, tokens, targets, config)
        batches[qk_norm] = (after - losses(parameters, tokens, targets, config)).abs()
    assert (batches["head"] < 1e-9).all()
    assert (batches["width"] > 1e-5).all()


# --- uniform attention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", ["head", "width"])
@pytest.mark.parametrize("length", [3, 5])
@pytest.mark.parametrize("batch", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_queries_and_keys_at_zero_attend_uniformly_and_stay_there(qk_norm, length, batch, dtype):
    config = make_config(qk_norm=qk_norm, length=length)
    parameters, (tokens, targets) = make_members(config), make_batch(config, batch)
    parameters = {
        name: (value.detach() * (name not in QUERIES_AND_KEYS)).to(dtype).requires_grad_()
        for name, value in parameters.items()
    }
    attention: list[torch.Tensor] = []
    logits = forward(parameters, tokens, config, dtype, attention)
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    grads = torch.autograd.grad(total, [parameters[name] for name in QUERIES_AND_KEYS])

    assert len(attention) == config.depth
    uniform = torch.ones(length, dtype=dtype).softmax(0)[0]
    for weights in attention:
        assert weights.shape == (MEMBERS, batch, config.heads, length)
        assert (weights == uniform).all()
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("length", [3, 5])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("batch", [SMALL, LARGE])
def test_attention_is_what_the_last_position_attends_to(length, depth, batch):
    config = make_config(length=length, depth=depth)
    parameters, (tokens, _) = make_members(config), make_batch(config, batch)
    attention: list[torch.Tensor] = []
    forward(parameters, tokens, config, torch.float64, attention)

    p = {name: value[1] for name, value in parameters.items()}  # the first layer of member 1, by hand
    x = p["embedding"][tokens[1]] + p["position"]
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    query, key = ((x @ p[f"{role}.0"].T).unflatten(-1, (config.heads, -1)) for role in ("query", "key"))
    query, key = (part / part.square().mean(-1, keepdim=True).sqrt() for part in (query, key))
    scores = torch.einsum("bhd,bkhd->bhk", query[:, -1], key) / config.head_dim**0.5
    torch.testing.assert_close(attention[0][1], scores.softmax(-1), atol=1e-10, rtol=0)


# --- shapes and initial values ---------------------------------------------------------------------------------


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"heads=3.*width=8"):
        make_config(heads=3)
    with pytest.raises(ValueError, match=r"qk_norm.*'heads'"):
        make_config(qk_norm="heads")


def test_initial_parameters_depend_on_the_seed_alone():
    config = make_config(gains=True)
    first, again, other = (initial_parameters(config, seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if not name.startswith("norm"))
    assert {name: tuple(value.shape) for name, value in first.items()} == config.shapes()


def test_initial_values_have_their_documented_distribution():
    config = make_config(width=64, heads=4, mlp_width=256, vocabulary=200, gains=True, position_scale=0.02)
    parameters = initial_parameters(config, 0)
    for name, value in parameters.items():
        if name.startswith("norm"):
            assert (value == 1).all()
        elif name == "embedding":
            assert value.std().item() == pytest.approx(1, rel=0.05)
        elif name == "position":
            assert value.std().item() == pytest.approx(0.02, rel=0.2)
        else:
            bound = value.shape[-1] ** -0.5
            assert value.abs().max() <= bound
            assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_initial_scale_multiplies_matrices_only():
    config = make_config(gains=True)
    plain, doubled = initial_parameters(config, 0), initial_parameters(config, 0, 2.0)
    for name in plain:
        factor = 1.0 if name.startswith("norm") or name in ("embedding", "position") else 2.0
        torch.testing.assert_close(doubled[name], factor * plain[name], atol=0, rtol=1e-15)
