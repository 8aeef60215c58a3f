"""Windows: what they show is what they write, and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rankdecay as rd
from rankdecay.attention import Window
from rankdecay.attention.layer import WHOLE

from .families import build


@st.composite
def windows(draw) -> tuple[Window, tuple[int, int]]:
    head_dim = draw(st.integers(1, 4))
    heads = [draw(st.integers(0, 2)), draw(st.integers(1, 3)), draw(st.integers(0, 2))]
    groups = draw(st.integers(1, 3))
    start, stop, size = (head_dim * sum(heads[: i + 1]) for i in range(3))
    if draw(st.booleans()):  # a line of each in turn
        start, size, groups = draw(st.integers(0, 2)), 3, head_dim * draw(st.integers(1, 3))
        stop = start + 1
    window = Window(draw(st.sampled_from(["rows", "columns"])), start, stop, size, head_dim, groups,
                    draw(st.booleans()))  # fmt: skip
    shape = (groups * size, draw(st.integers(1, 5)))
    return window, shape if (window.lines == "rows") != window.transposed else shape[::-1]


@given(windows())
def test_a_window_writes_where_it_reads(case):
    window, shape = case
    parameter = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    before = parameter.clone()
    for read in (window.matrix, window.heads):
        shown = read(parameter).clone()
        window.write(parameter, -shown)
        assert torch.equal(read(parameter), -shown)
        changed = (parameter != before).sum()
        assert changed == (shown != 0).sum()
        window.write(parameter, shown)
        assert torch.equal(parameter, before)


@given(windows())
def test_heads_are_the_matrix_cut_in_order(case):
    window, shape = case
    parameter = torch.randn(shape)
    matrix, heads = window.matrix(parameter), window.heads(parameter)
    assert len(heads) == window.num_heads
    assert torch.equal(torch.cat(list(heads), dim=0 if window.lines == "rows" else 1), matrix)


@given(windows())
def test_a_window_survives_being_written_down(case):
    window, _ = case
    assert Window.parse(str(window)) == window


def test_a_bias_is_cut_as_the_rows_are():
    window = Window("rows", 2, 4, 6, 2, groups=2)
    assert window.vector(torch.arange(12.0)).tolist() == [2, 3, 8, 9]
    assert window.matrix(torch.arange(12.0)[:, None]).flatten().tolist() == [2, 3, 8, 9]


def test_a_window_on_the_wrong_parameter_says_so():
    window = Window("rows", 0, 768, 2304, 64, transposed=True)
    with pytest.raises(ValueError, match=r"shape \(768, 768\), which does not have the 2304 rows"):
        window.matrix(torch.zeros(768, 768))
    with pytest.raises(ValueError, match=r"flattened, as DeepSpeed ZeRO and FSDP1 do.*FSDP2"):
        window.matrix(torch.zeros(768 * 2304))
    with pytest.raises(ValueError, match=r"'rows 0:3' is not a window"):
        Window.parse("rows 0:3")


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (2, 1, 3, 4)])
def test_the_whole_parameter_is_a_window_of_any_shape(shape):
    parameter = torch.randn(shape)
    value = torch.randn(shape)
    assert WHOLE.matrix(parameter) is parameter
    assert torch.equal(WHOLE.heads(parameter), parameter[None])
    assert WHOLE.num_heads == 1
    assert WHOLE.is_whole
    assert not WHOLE.has_heads
    for new in (value, value[None]):
        parameter.zero_()
        WHOLE.write(parameter, new)
        assert torch.equal(parameter, value)


def test_nothing_is_written_down_of_the_whole_parameter():
    assert str(WHOLE) == ""
    assert Window.parse("") is WHOLE
    bias = torch.arange(3.0)
    assert WHOLE.vector(bias) is bias


@given(windows())
def test_lines_are_along_the_side_that_is_cut(case):
    window, shape = case
    lines = shape[window.line_dim(2)]
    assert lines == window.groups * window.size
    assert window.extent(lines) == window.num_heads * window.head_dim
    assert WHOLE.extent(lines) == lines


def test_normalised_queries_have_no_product():
    layer = rd.find_attention(build("qwen3"))[0]
    with pytest.raises(ValueError, match=r"normalises queries and keys, so its scores are not.*query.tensor\(\)"):
        layer.query_key()
    assert layer.value_output().num_heads == 4


def test_without_an_output_projection_there_is_no_product_of_values():
    attention = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q", "k", "v")})
    attention.num_heads = 2
    [layer] = rd.find_attention(attention)
    assert [view.role for view in layer.views] == ["query", "key", "value"]
    with pytest.raises(ValueError, match="has no output projection, so there is no product"):
        layer.value_output()


class _Separate(nn.Module):
    def __init__(self, **more: nn.Module) -> None:
        super().__init__()
        self.num_heads = 2
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(8, 8))
        for name, module in more.items():
            self.add_module(name, module)


@pytest.mark.parametrize(
    ("child", "module", "reason"),
    [
        ("gate_proj", nn.Linear(8, 8), "gates what its heads give"),
        ("inner_attn_ln", nn.LayerNorm(8), "normalises what its heads give"),
        ("v_norm", nn.RMSNorm(4), "normalises values"),
        ("v_sconv", nn.Conv1d(8, 8, 3, groups=8), "convolves values"),
    ],
)
def test_what_stands_before_the_output_projection_leaves_no_product_of_values(child, module, reason):
    model = _Separate(**{child: module})
    [layer] = rd.find_attention(model)
    assert not layer.has_value_product
    with pytest.raises(ValueError, match=rf"{reason}.*output is not W_O W_V.*value.tensor\(\)"):
        layer.value_output()
    report = rd.inspect(model)
    assert {row.get("matrix") for row in report.rows if row.get("matrix")} == {"value", "output"}
    assert len(report.of("value")) == len(report.of("output")) == 2
    assert any(reason in note for note in report.notes)
    assert not any("value_output" in name for name in rd.Monitor(model).measure())


def test_a_gate_with_one_number_for_each_head_leaves_the_product_of_values():
    [layer] = rd.find_attention(_Separate(g_proj=nn.Linear(8, 2)))
    assert layer.value_output().num_heads == 2


def test_what_is_added_to_queries_that_meet_keys_is_of_their_bias():
    model = _Separate()
    model.bias_u, model.bias_v = (nn.Parameter(torch.randn(2, 4)) for _ in range(2))
    [layer] = rd.find_attention(model)
    torch.testing.assert_close(layer.query.bias(), (model.q_proj.bias + model.bias_u.flatten()).detach())
    assert layer.query.bias_name == "q_proj.bias"
    model.q_proj.bias = None
    [layer] = rd.find_attention(model)
    torch.testing.assert_close(layer.query.bias(), model.bias_u.flatten().detach())


def test_a_view_is_of_the_present_value_and_detached():
    attention = nn.MultiheadAttention(8, 2)
    [layer] = rd.find_attention(attention)
    with torch.no_grad():
        attention.in_proj_weight.fill_(3)
        attention.in_proj_bias.copy_(torch.arange(24.0))
    assert layer.key.tensor().unique().tolist() == [3]
    assert not layer.key.tensor().requires_grad
    assert layer.key.bias().tolist() == list(range(8, 16))
    assert (layer.key.num_heads, layer.key.shape, layer.key.heads().shape) == (2, (8, 8), (2, 4, 8))
    assert layer.output.heads().shape == (2, 8, 4)
