"""The audit against known symmetries: of real classes, and of modules whose answers are exact."""

import pytest
import torch
from torch import nn

from rankdecay.audit import AuditReport, AuditRow, audit
from tests import needs

from .attention import families


def language_model(name, dtype=torch.float64):
    """A model of a family and its loss, at positions that turn."""
    model = families.build(name).to(dtype)
    ids = torch.randint(3, families.VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))

    def loss():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1).to(torch.float64), ids[:, 1:].flatten())

    return model, loss


def kinds(report: AuditReport, part, head=False):
    """The kinds of one of attention's matrices, whole or by head, in all layers."""
    rows = [row for row in report.rows if row.part == part and row.role != "bias" and (row.head is not None) == head]
    assert rows
    return {row.kind for row in rows}


def row(report: AuditReport, name: str, part: str = "", head: int | None = None) -> AuditRow:
    [found] = [row for row in report.rows if (row.name, row.part, row.head) == (name, part, head)]
    return found


INVARIANT, PAIR, NEITHER, UNKNOWN = {"scale_invariant"}, {"pair"}, {"neither"}, {"unknown"}


@pytest.mark.parametrize("confirm", [False, True])
@pytest.mark.parametrize(
    ("name", "query_key", "by_head", "value_output"),
    [
        ("qwen3", INVARIANT, INVARIANT, PAIR),
        ("gemma3", INVARIANT, INVARIANT, INVARIANT),  # a norm after attention: W_V and W_O are invariant as wholes
        ("olmo2", INVARIANT, NEITHER, INVARIANT),  # one norm over all heads
        ("persimmon", INVARIANT, INVARIANT, PAIR),  # with biases
        ("llama", PAIR, PAIR, PAIR),
        ("qwen2", PAIR, PAIR, PAIR),  # biases and rotary positions
        ("gpt2", PAIR, PAIR, PAIR),
        ("gptj", PAIR, PAIR, PAIR),
        ("gpt_neox", PAIR, PAIR, PAIR),
        ("falcon-grouped", PAIR, PAIR, PAIR),  # fused, interleaved, grouped
        ("bloom", PAIR, PAIR, PAIR),  # ALiBi
    ],
)
def test_attention_of_real_models(name, query_key, by_head, value_output, confirm):
    report = audit(*language_model(name), confirm=confirm)
    for part in ("query", "key"):
        assert kinds(report, part) == query_key
        assert kinds(report, part, head=True) == by_head
    for part in ("value", "output"):
        assert kinds(report, part) == value_output
        assert kinds(report, part, head=True) == PAIR
    for found in report.rows:
        if found.part and found.role != "bias" and found.kind != "neither":
            assert found.confirmed is (True if confirm else None)


def test_evidence_is_sharp_in_float64():
    report = audit(*language_model("llama"))
    for found in report.rows:
        if found.kind == "pair":
            assert found.balance < 1e-12
        if found.part == "query":
            assert found.euler > 1e-2
    report = audit(*language_model("qwen3"))
    assert all(found.euler < 1e-5 for found in report.rows if found.part in ("query", "key"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "expected"), [("qwen3", INVARIANT), ("llama", PAIR)])
def test_lower_precision(name, expected, dtype):
    report = audit(*language_model(name, dtype), confirm=dtype == torch.float32)
    assert kinds(report, "query", head=True) == kinds(report, "key", head=True) == expected
    assert kinds(report, "value") == PAIR


def test_gains_gates_and_partners():
    report = audit(*language_model("qwen3"))
    layer = "model.layers.1"
    assert row(report, f"{layer}.self_attn.q_norm.weight").partner == f"{layer}.self_attn.k_norm.weight"
    assert row(report, f"{layer}.mlp.up_proj.weight").partner == f"{layer}.mlp.down_proj.weight"
    assert row(report, f"{layer}.mlp.gate_proj.weight").kind == "neither"
    assert row(report, f"{layer}.input_layernorm.weight").kind == "neither"
    value = row(report, f"{layer}.self_attn.v_proj.weight", "value", head=1)
    assert value.partner == f"{layer}.self_attn.o_proj.weight output heads 2–3"
    assert row(report, f"{layer}.self_attn.o_proj.weight", "output", head=3).partner.endswith(
        "v_proj.weight value head 1"
    )
    assert (
        "effective learning rate; low-rank decay also turns it (tangential share"
        in row(report, f"{layer}.self_attn.q_proj.weight", "query").words
    )


def test_a_stored_gain_minus_one_is_no_factor():
    model, loss = language_model("gemma3")
    name = "model.layers.1.self_attn.q_norm.weight"
    assert row(audit(model, loss), name).words == "zero: there is nothing to decay yet."
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            nn.init.constant_(norm.weight, 0.5)
    assert row(audit(model, loss), name).kind == "pair"  # equal sides: the equation holds by coincidence
    assert row(audit(model, loss, confirm=True), name).kind == "neither"
    nn.init.constant_(model.model.layers[1].self_attn.k_norm.weight, 0.3)
    assert row(audit(model, loss), name).kind == "neither"


def test_biases():
    report = audit(*language_model("gpt2"), confirm=True)
    attention = "transformer.h.0.attn"
    assert row(report, f"{attention}.c_attn.bias", "query").kind == "pair"
    key = row(report, f"{attention}.c_attn.bias", "key")  # softmax does not see what it adds to all keys
    assert key.kind == "unknown"
    assert "without effect" in key.words
    assert row(report, f"{attention}.c_proj.bias", "output").kind == "neither"
    opt = audit(*language_model("opt"), confirm=True)  # ReLU: each hidden unit is a pair, with its bias
    assert row(opt, "model.decoder.layers.0.fc1.weight").confirmed
    assert row(opt, "model.decoder.layers.0.fc1.bias").kind == "pair"
    assert row(opt, "model.decoder.layers.0.fc2.bias").kind == "neither"


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "opt"])
def test_every_parameter_has_a_row(name):
    model, loss = language_model(name)
    assert {found.name for found in audit(model, loss).rows} == {name for name, _ in model.named_parameters()}


class Known(nn.Module):
    """W is invariant; a and b are a pair with ⟨∇a, a⟩ = ⟨∇b, b⟩ = 6; c is neither, with a gradient along itself."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64))
        self.up = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        self.down = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        self.c = nn.Parameter(torch.tensor([[2.0, 0.0]], dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.zero = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        with torch.no_grad():
            self.up.weight.fill_(2.0)
            self.down.weight.fill_(3.0)

    def loss(self):
        direction = (self.W / self.W.norm())[0, 1] + (self.W / self.W.norm())[1, 0]
        return direction + (self.up.weight * self.down.weight).sum() + self.c.square().sum() + self.zero.sum()


@pytest.mark.parametrize("confirm", [False, True])
def test_exact_answers_without_attention(confirm):
    model = Known()
    with torch.no_grad():
        model.W[0, 1] = 1.0
    report = audit(model, model.loss, confirm=confirm)
    W = row(report, "W")
    assert W.kind == "scale_invariant"
    assert W.radial == pytest.approx(0, abs=1e-15)
    assert W.gradient == pytest.approx((0, 1))
    s = torch.linalg.svdvals(model.W.detach())
    assert W.low_rank.radial == pytest.approx(float(s.sum() ** 2 / (2 * s.square().sum())))
    assert sum(W.low_rank) == pytest.approx(1)
    assert W.l2 == (1, 0)
    up = row(report, "up.weight")
    assert (up.kind, up.partner, up.balance, up.radial) == ("pair", "down.weight", 0, 1)
    c = row(report, "c")
    assert (c.kind, c.radial, c.gradient, c.euler) == ("neither", 1, (1, 0), 1)
    assert c.low_rank == pytest.approx((1, 0))  # of rank 1: U Vᵀ is W itself, up to its length
    for name, why in (("frozen", "frozen"), ("unused", "unused"), ("zero", "zero")):
        assert row(report, name).kind == "unknown"
        assert row(report, name).words.startswith(why)


def test_a_rescaling_uncovers_a_coincidence():
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0]]))

    def loss():  # stationary along W, just here
        return (model.weight.sum() - 2).square() + model.weight[0, 0] - model.weight[0, 1]

    assert row(audit(model, loss), "weight").kind == "scale_invariant"
    assert row(audit(model, loss, confirm=True), "weight").kind == "neither"


def test_adapters():
    peft = needs.package("peft")
    model, _ = language_model("llama", torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.randint(3, families.VOCABULARY, (2, 7))
    report = audit(model.eval(), lambda: model(input_ids=ids, labels=ids).loss)
    factors = [found for found in report.rows if "lora" in found.name]
    assert {found.kind for found in factors} == PAIR
    assert all("nuclear norm" in found.words for found in factors)
    assert kinds(report, "query") == UNKNOWN  # frozen


def test_the_model_is_left_as_it_was():
    model, loss = language_model("falcon-grouped")
    model.transformer.h[0].mlp.dense_h_to_4h.weight.requires_grad_(False)
    kept = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = kept
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = 0

    def breaks():
        nonlocal calls
        calls += 1
        if calls == 6:
            raise RuntimeError("out of memory")
        return loss()

    audit(model, loss, confirm=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        audit(model, breaks, confirm=True)
    assert model.training
    assert model.lm_head.weight.grad is kept
    assert all(p.grad is None for p in model.parameters() if p is not model.lm_head.weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_already_computed_keeps_its_graph():
    model, loss = language_model("llama")
    value = loss()
    assert kinds(audit(model, value), "query") == PAIR
    value.backward()


def test_printing():
    report = audit(*language_model("gpt2"))
    text = str(report)
    assert text == report.describe()
    assert "head ×8" in text
    assert "c_attn.weight query with transformer.h.*.attn.c_attn.weight key" in text
    assert max(map(len, text.splitlines())) < 140


def test_errors_say_the_remedy():
    model = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    cases = [
        (TypeError, "function of no arguments", lambda: audit(model, 3.0)),  # pyright: ignore
        (TypeError, "returned float", lambda: audit(model, lambda: 3.0)),  # pyright: ignore
        (TypeError, "torch.nn.Module", lambda: audit(x, lambda: x.sum())),  # pyright: ignore
        (ValueError, r"\.mean\(\)", lambda: audit(model, lambda: model(x))),
        (ValueError, "no graph", lambda: audit(model, model(x).sum().detach())),
        (ValueError, "does not depend", lambda: audit(model, nn.Linear(2, 1)(x).sum())),
        (ValueError, "finite", lambda: audit(model, lambda: model(x).sum() / 0)),
        (ValueError, "tolerance", lambda: audit(model, model(x).sum(), tolerance=2.0)),
        (ValueError, "its value", lambda: audit(model, model(x).sum(), confirm=True)),
        (ValueError, "eval", lambda: audit(model, lambda: (model(x) * torch.rand(2)).sum(), confirm=True)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        audit(model, lambda: model(x.requires_grad_()).sum())


def test_names_that_match_nothing():
    from rankdecay import AttentionNames

    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no attention"):
        audit(model, model(torch.ones(2)).sum(), names=AttentionNames(fused="nothing"))
