"""Quantised weights against the library that defines the format, or against its definition in float64."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import rankdecay as rd
from rankdecay.attention.checkpoints import CheckpointError
from rankdecay.attention.quantised import dequantised
from tests import needs

D = 256
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
PREFIX = "model.layers.0.self_attn."


def weight(seed: int) -> Tensor:
    """A matrix whose blocks differ in size: read without its scales it has another stable rank."""
    w = torch.randn(D, D, generator=torch.Generator().manual_seed(seed)) * 0.02
    w.view(2, 128, 2, 128).mul_(torch.tensor([[1.0, 0.1], [0.03, 0.3]])[:, None, :, None])
    return w


WEIGHTS = {name: weight(seed) for seed, name in enumerate(PROJECTIONS)}


class Attention(nn.Module):
    num_heads = 4

    def __init__(self, make: Callable[[Tensor], nn.Module] | None = None) -> None:
        super().__init__()
        for name, w in WEIGHTS.items():
            layer = nn.Linear(D, D, bias=False)
            layer.weight.data = w.clone()
            setattr(self, name, make(w.clone()) if make else layer)


def model(make: Callable[[Tensor], nn.Module] | None = None) -> nn.Module:
    return nn.ModuleDict({"self_attn": Attention(make)})


def write(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, **config: object) -> Path:
    held = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(held, folder / "model.safetensors", metadata=metadata)
    base = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": D}
    (folder / "config.json").write_text(json.dumps(base | config))
    return folder


def each(quantise: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every projection, quantised to its tensors by the part of the name that follows the module's."""
    return {PREFIX + n + part: t for n, w in WEIGHTS.items() for part, t in quantise(w).items()}


def query(source: nn.Module | Path) -> Tensor:
    [layer] = rd.find_attention(source)
    assert layer.query.shape == (D, D)
    return layer.query.tensor()


def same(read: Tensor, expected: Tensor, ulps: float = 1) -> None:
    """Equal to within a rounding of float32, and with the rank of the expected matrix."""
    read, expected = read.double(), expected.detach().double()
    assert ((read - expected).abs() <= ulps * 2**-23 * expected.abs()).all()
    ranks = [float(rd.spectrum(matrix.float()).stable_rank) for matrix in (read, expected)]
    assert ranks[0] == pytest.approx(ranks[1], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# FP8 and int8


def block_fp8(w: Tensor, rows: int = 128, columns: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and the weight they mean, in float64."""
    cut = w.view(w.shape[0] // rows, rows, w.shape[1] // columns, columns)
    scale = cut.abs().amax((1, 3)) / 448
    codes = (cut / scale[:, None, :, None]).reshape(w.shape).to(torch.float8_e4m3fn)
    meant = codes.double() * scale.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return codes, scale, meant


@pytest.mark.parametrize("name", [".weight_scale_inv", ".weight_scale", ".scale", ".scale_weight"])
@pytest.mark.parametrize("block", [(128, 128), (D, D), (1, D), (1, 64)])
def test_fp8_scales(tmp_path: Path, name: str, block: tuple[int, int]) -> None:
    def quantise(w: Tensor) -> dict[str, Tensor]:
        codes, scale, _ = block_fp8(w, *block)
        return {".weight": codes, name: scale.reshape(()) if block == (D, D) else scale}

    same(query(write(tmp_path, each(quantise))), block_fp8(WEIGHTS["q_proj"], *block)[2])


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, "float8_e4m3fn codes"), ({"quantization_config": {"quant_method": "fp8"}}, "fp8 (float8_e4m3fn)")],
)
def test_the_format_of_what_was_dequantised_is_said(tmp_path: Path, config: dict, expected: str) -> None:
    def quantise(w: Tensor) -> dict[str, Tensor]:
        codes, scale, _ = block_fp8(w)
        return {".weight": codes, ".weight_scale_inv": scale}

    report = rd.inspect(write(tmp_path, each(quantise), **config))
    assert any(f"weights are stored as {expected}, and shown dequantised" in note for note in report.notes)
    assert not any("stored as" in note for note in rd.inspect(model()).notes)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_the_format_of_a_live_module_is_said() -> None:
    from torch.ao.nn.quantized.dynamic import Linear

    def make(w: Tensor) -> nn.Module:
        layer = Linear(D, D, bias_=False)
        layer.set_weight_bias(torch.quantize_per_tensor(w, 0.001, 0, torch.qint8), None)
        return layer

    assert any("weights are stored as Linear (qint8)" in note for note in rd.inspect(model(make)).notes)


def test_fp8_block_cut_short(tmp_path: Path) -> None:
    """The last block of DeepSeek's scales is smaller than the others; the configuration has to say which are."""
    w = weight(0)[:192]
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    meant = w.to(torch.float8_e4m3fn).double() * scale.double().repeat_interleave(128, 0)[:192].repeat_interleave(
        128, 1
    )
    tensors = each(lambda w: {".weight": w.to(torch.float8_e4m3fn), ".weight_scale_inv": torch.ones(2, 2)})
    tensors[PREFIX + "q_proj.weight"] = w.to(torch.float8_e4m3fn)
    tensors[PREFIX + "q_proj.weight_scale_inv"] = scale
    tensors[PREFIX + "k_proj.weight"] = tensors[PREFIX + "k_proj.weight"][:192]
    tensors[PREFIX + "v_proj.weight"] = tensors[PREFIX + "v_proj.weight"][:192]
    tensors[PREFIX + "o_proj.weight"] = tensors[PREFIX + "o_proj.weight"][:, :192]
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    read = rd.find_attention(write(tmp_path, tensors, head_dim=48, quantization_config=said))[0].query.tensor()
    assert torch.equal(read.double(), meant)
    with pytest.raises(CheckpointError, match=r"q_proj.weight.*blocks of 96 and of 128; config.json must say which"):
        rd.find_attention(write(tmp_path, {PREFIX + "q_proj" + p: tensors[PREFIX + "q_proj" + p]
                                           for p in (".weight", ".weight_scale_inv")}))  # fmt: skip


def test_scales_that_are_exponents(tmp_path: Path) -> None:
    """MXFP8: a byte b as a scale is 2^(b - 127), and not b."""
    exponents = torch.randint(110, 125, (D, D // 32), dtype=torch.uint8)
    tensors = each(lambda w: {".weight": (w * 1000).to(torch.float8_e4m3fn), ".weight_scale_inv": exponents})
    codes = tensors[PREFIX + "q_proj.weight"].double()
    meant = codes * torch.exp2(exponents.double() - 127).repeat_interleave(32, 1)
    same(query(write(tmp_path, tensors, quantization_config={"quant_method": "mxfp8"})), meant)


def test_plain_fp8_is_a_cast_unless_something_speaks_of_scales(tmp_path: Path) -> None:
    tensors = each(lambda w: {".weight": w.to(torch.float8_e4m3fn)})
    same(query(write(tmp_path, tensors)), WEIGHTS["q_proj"].to(torch.float8_e4m3fn).double())
    for extra, config in (({}, {"quantization_config": {"quant_method": "fp8"}}), ({"scaled_fp8": torch.ones(2)}, {})):
        with pytest.raises(CheckpointError, match=r"k_proj.weight.*float8_e4m3fn numbers without their scale"):
            rd.find_attention(write(tmp_path, tensors | extra, **config))


def test_transformers_modules(tmp_path: Path) -> None:
    needs.package("transformers")
    from transformers.integrations.bitnet import BitLinear, pack_weights
    from transformers.integrations.finegrained_fp8 import FP8Linear

    def fp8(w: Tensor) -> nn.Module:
        layer = FP8Linear(D, D, block_size=(128, 128))
        layer.weight.data, layer.weight_scale_inv.data, _ = block_fp8(w)
        return layer

    ternary = torch.randint(-1, 2, (D, D), generator=torch.Generator().manual_seed(0)).float()

    def bitnet(w: Tensor) -> nn.Module:
        layer = BitLinear(D, D, False)
        layer.weight, layer.weight_scale = pack_weights(ternary.clone()), torch.tensor([3.5])
        return layer

    same(query(model(fp8)), block_fp8(WEIGHTS["q_proj"])[2])
    same(query(model(bitnet)), ternary.double() / 3.5)
    held = {"model.layers.0." + name: tensor for name, tensor in model(bitnet).state_dict().items()}
    for kind, expected in (("bitlinear", ternary.double() / 3.5), ("autobitlinear", ternary.double() * 3.5)):
        said = {"quant_method": "bitnet", "linear_class": kind}
        same(query(write(tmp_path, held, quantization_config=said)), expected)


# ---------------------------------------------------------------------------------------------------------------------
# The format's own library


def files_of(live: nn.Module) -> dict[str, Tensor]:
    return {f"model.layers.0.{name}": tensor for name, tensor in live.state_dict().items()}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4bit(tmp_path: Path, kind: str, nested: bool) -> None:
    bitsandbytes = needs.package("bitsandbytes")

    def make(w: Tensor) -> nn.Module:
        layer = bitsandbytes.nn.Linear4bit(D, D, bias=False)
        layer.weight = bitsandbytes.nn.Params4bit(w, requires_grad=False, quant_type=kind, compress_statistics=nested)
        return layer.to("cpu")

    live = model(make)
    held = live["self_attn"].q_proj.weight
    expected = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state)
    same(query(live), expected)
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path = write(tmp_path, files_of(live), quantization_config=said)
    same(query(path), expected)
    groups = rd.param_groups(live)  # frozen: nothing decays them
    assert sum(len(group["params"]) for group in groups) == 4

    held.quant_state.packing_format_for_cpu = True  # as the first forward pass leaves it on processors with AVX512-BF16
    with pytest.raises(ValueError, match=r"q_proj.weight was reordered for bitsandbytes' CPU kernel"):
        query(live)


def test_bitsandbytes_4bit_stored_as_bfloat16(tmp_path: Path) -> None:
    """FSDP shards only floating types, so the codes of QLoRA may lie in a bfloat16 tensor."""
    bitsandbytes = needs.package("bitsandbytes")

    def make(w: Tensor) -> nn.Module:
        layer = bitsandbytes.nn.Linear4bit(D, D, bias=False)
        layer.weight = bitsandbytes.nn.Params4bit(w, requires_grad=False, quant_storage=torch.bfloat16)
        return layer.to("cpu")

    live = model(make)
    held = live["self_attn"].q_proj.weight
    assert held.dtype == torch.bfloat16
    expected = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state)
    same(query(live), expected)
    same(query(write(tmp_path, files_of(live))), expected)


def test_bitsandbytes_8bit(tmp_path: Path) -> None:
    bitsandbytes = needs.package("bitsandbytes")

    def make(w: Tensor) -> nn.Module:
        layer = bitsandbytes.nn.Linear8bitLt(D, D, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(w, requires_grad=False, has_fp16_weights=False)
        return layer.to("cpu")

    live = model(make)
    held = live["self_attn"].q_proj.weight
    expected = bitsandbytes.functional.int8_vectorwise_dequant(held.data, held.SCB)
    same(query(live), expected, ulps=2)
    tensors = files_of(live)
    said = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    same(query(write(tmp_path, tensors, quantization_config=said)), expected, ulps=2)
    tensors[PREFIX + "q_proj.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"q_proj.weight is quantised as LLM.int8 in the tiled order"):
        query(write(tmp_path, tensors, quantization_config=said))
    held.SCB = None
    with pytest.raises(ValueError, match=r"q_proj.weight holds int8 codes of bitsandbytes without their SCB"):
        query(live)


@pytest.mark.parametrize(
    ("form", "arguments"),
    [
        ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor"}),
        ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
        ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}),
        ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}),
        ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}),
        ("pack-quantized", {"num_bits": 3, "type": "int", "strategy": "channel", "symmetric": False}),
        ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        ("pack-quantized", {"num_bits": 5, "type": "int", "strategy": "group", "group_size": 64}),
        ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
        ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
        ("mxfp8-quantized", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())),
)  # fmt: skip
def test_compressed_tensors(tmp_path: Path, form: str, arguments: dict[str, object]) -> None:
    needs.package("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    if form.startswith("mx"):
        arguments = arguments | {"scale_dtype": torch.uint8}
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    compressor = BaseCompressor.get_value_from_registry(form)

    def compress(w: Tensor) -> dict[str, Tensor]:
        cells = {
            "tensor": lambda: w.reshape(1, -1).aminmax(dim=1),
            "channel": lambda: w.aminmax(dim=1, keepdim=True),
            "block": lambda: w.view(2, 128, 2, 128).transpose(1, 2).flatten(2).aminmax(dim=-1),
        }
        low, high = cells.get(args.strategy, lambda: w.view(D, -1, args.group_size).aminmax(dim=-1))()
        overall = generate_gparam(w.min(), w.max()) if form.startswith("nvfp4") else None
        scale, zero = calculate_qparams(low, high, args, global_scale=overall)
        held = {
            "weight": w,
            "weight_scale": scale if form.startswith("mx") else scale.float(),
            "weight_zero_point": zero,
        }
        return compressor.compress(held | ({} if overall is None else {"weight_global_scale": overall}), scheme)

    stored = compress(WEIGHTS["q_proj"].clone())
    if form.startswith("nvfp4"):  # the library forms the product in bfloat16; in float32, by its own parts:
        codes = unpack_fp4_from_uint8(stored["weight_packed"], D, D, dtype=torch.float32)
        scale = stored["weight_scale"].float()
        expected = dequantize(codes, scale, args=args, global_scale=stored["weight_global_scale"])
    else:
        expected = compressor.decompress(dict(stored), scheme)["weight"]
    groups = {"group_0": {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}}
    said = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    tensors = each(lambda w: {f".{name}": tensor for name, tensor in compress(w.clone()).items()})
    same(query(write(tmp_path, tensors, quantization_config=said)), expected)

    def make(w: Tensor) -> nn.Module:
        layer = nn.Linear(D, D, bias=False)
        del layer.weight
        for name, tensor in compress(w).items():
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        layer.quantization_scheme = scheme
        return layer

    same(query(model(make)), expected)


@pytest.mark.parametrize("kind", ["int8", "float8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    needs.torchao()
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )

    config = {
        "int8": lambda: Int8WeightOnlyConfig(version=2),
        "float8": Float8WeightOnlyConfig,
        "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4),
    }[kind]()
    live = model().to(dtype)
    quantize_(live, config)
    expected = live["self_attn"].q_proj.weight.dequantize()
    same(query(live), expected)
    tensors, header = flatten_tensor_state_dict(files_of(live))
    said = {"quant_method": "torchao"}
    same(query(write(tmp_path, tensors, header, quantization_config=said)), expected)
    with pytest.raises(CheckpointError, match=r"k_proj.weight is quantised as torchao, whose description is missing"):
        query(write(tmp_path, tensors, quantization_config=said))
    broken = header | {PREFIX + "k_proj.weight": '{"_type": "Thing", "_data": {}, "_tensor_data_names": []}'}
    with pytest.raises(CheckpointError, match=r"k_proj.weight is quantised as torchao's Thing"):
        query(write(tmp_path, tensors, broken, quantization_config=said))


def test_torch_dynamic(recwarn: pytest.WarningsRecorder) -> None:
    live = torch.ao.quantization.quantize_dynamic(model(), {nn.Linear}, dtype=torch.qint8)
    same(query(live), live["self_attn"].q_proj.weight().dequantize())


# ---------------------------------------------------------------------------------------------------------------------
# Formats by their definition


def pack(codes: np.ndarray, bits: int) -> Tensor:
    """Pack the last axis into 32-bit words, bit by bit, the least significant first."""
    stream = (codes[..., None].astype(np.int64) >> np.arange(bits) & 1).reshape(*codes.shape[:-1], -1)
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % 32)])
    words = stream.reshape(*stream.shape[:-1], -1, 32) @ (1 << np.arange(32))
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def integers(bits: int, *shape: int, low: int = 0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 2**bits, shape)


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ordered", [False, True])
def test_gptq(tmp_path: Path, bits: int, form: str | None, ordered: bool) -> None:
    """Codes lie (inputs, outputs), packed along the inputs; zeros (groups, outputs), packed along the outputs."""
    groups = 4
    codes, zeros = integers(bits, D, D), integers(bits, groups, D, low=1, seed=1)
    scales = (torch.rand(groups, D) + 0.1).half() * 0.01
    group = np.arange(D) // (D // groups)
    if ordered:  # desc_act: the groups are not in sequence
        group = np.random.default_rng(2).permutation(group)
    meant = (codes - zeros[group]) * scales.double().numpy()[group]
    stored = zeros if form == "gptq_v2" else zeros - 1
    tensors = {".qweight": pack(codes.T, bits).t(), ".qzeros": pack(stored, bits), ".scales": scales}
    tensors |= {".g_idx": torch.from_numpy(group).int()}
    said = {"quant_method": "gptq", "bits": bits, "group_size": D // groups}
    said |= {} if form is None else {"checkpoint_format": form}
    expected = torch.from_numpy(meant.T.copy())
    same(query(write(tmp_path, each(lambda _: tensors), quantization_config=said)), expected)
    if not ordered:
        del tensors[".g_idx"]
        same(query(write(tmp_path, each(lambda _: tensors), quantization_config=said)), expected)


def test_gptq_packs_three_bits_across_words() -> None:
    """As AutoGPTQ writes it: eleven codes begin in the first word, the eleventh's last bit is in the second."""
    codes = integers(3, 32)
    first = sum(int(code) << 3 * i for i, code in enumerate(codes[:10])) | (int(codes[10]) & 3) << 30
    second = int(codes[10]) >> 2 | sum(int(code) << 3 * i + 1 for i, code in enumerate(codes[11:21]))
    second |= (int(codes[21]) & 1) << 31
    third = int(codes[21]) >> 1 | sum(int(code) << 3 * i + 2 for i, code in enumerate(codes[22:]))
    assert [word & 0xFFFFFFFF for word in pack(codes, 3).tolist()] == [first, second, third]


def test_awq(tmp_path: Path) -> None:
    """Codes lie (inputs, outputs), packed along the outputs, in each word the columns 0, 2, 4, 6, 1, 3, 5, 7."""
    groups = 4
    codes, zeros = integers(4, D, D), integers(4, groups, D, seed=1)
    scales = (torch.rand(groups, D) + 0.1).half() * 0.01
    group = np.arange(D) // (D // groups)
    meant = (codes - zeros[group]) * scales.double().numpy()[group]

    def interleaved(values: np.ndarray) -> Tensor:
        return pack(values.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(values), -1), 4)

    tensors = {".qweight": interleaved(codes), ".qzeros": interleaved(zeros), ".scales": scales}
    said = {"quant_method": "awq", "bits": 4, "group_size": D // groups, "version": "gemm"}
    path = write(tmp_path, each(lambda _: tensors), quantization_config=said)
    same(query(path), torch.from_numpy(meant.T.copy()))
    with pytest.raises(CheckpointError, match=r"k_proj.weight is quantised as AWQ in the order 'gemv'"):
        query(write(tmp_path, each(lambda _: tensors), quantization_config=said | {"version": "gemv"}))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_mlx(tmp_path: Path, bits: int) -> None:
    codes = integers(bits, D, D)
    scale, bias = torch.rand(D, D // 64) * 0.01, torch.randn(D, D // 64) * 0.01
    meant = torch.from_numpy(codes).double().view(D, -1, 64) * scale.double()[..., None] + bias.double()[..., None]
    tensors = {".weight": pack(codes, bits).view(torch.uint32), ".scales": scale, ".biases": bias}
    path = write(tmp_path, each(lambda _: tensors), quantization={"group_size": 64, "bits": bits})
    torch.testing.assert_close(query(path).double(), meant.flatten(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_hqq(tmp_path: Path, bits: int, axis: int) -> None:
    """The matrix is cut into groups of 64 of consecutive numbers: rows (axis 1), or columns of as many (axis 0)."""
    shape = (D * D // 64, 64) if axis else (64, D * D // 64)
    codes = integers(bits, *shape).astype(np.uint8)
    parts = np.split(codes, 8 // bits)  # the first rows in the highest bits
    packed = sum(part.astype(np.int64) << 8 - bits * (i + 1) for i, part in enumerate(parts))
    lines = (shape[0], 1) if axis else (1, shape[1])
    scale, zero = torch.rand(lines) * 0.01, torch.rand(lines) * 2**bits
    meant = ((torch.from_numpy(codes).double() - zero.double()) * scale.double()).reshape(D, D)
    tensors = {".W_q": torch.from_numpy(np.asarray(packed, dtype=np.uint8)), ".scale": scale, ".zero": zero}
    tensors |= {".shape": torch.tensor([D, D]), ".nbits": torch.tensor(bits)}
    path = write(tmp_path, each(lambda _: tensors), quantization_config={"quant_method": "hqq"})
    torch.testing.assert_close(query(path).double(), meant, rtol=1e-6, atol=1e-6)


def test_modelopt_nvfp4(tmp_path: Path) -> None:
    """Two numbers a byte, the first in the low half; scales of 16 numbers, times one of the tensor."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    codes = integers(4, D, D)
    scale = (torch.rand(D, D // 16) * 100 + 1).to(torch.float8_e4m3fn)
    factor = torch.tensor(3e-5)
    meant = table[torch.from_numpy(codes)] * (scale.double() * factor.double()).repeat_interleave(16, 1)
    packed = torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))
    tensors = {".weight": packed, ".weight_scale": scale, ".weight_scale_2": factor, ".input_scale": torch.tensor(1.0)}
    path = write(tmp_path, each(lambda _: tensors), quantization_config={"quant_method": "modelopt"})
    same(query(path), meant, ulps=2)


def test_quanto(tmp_path: Path) -> None:
    scale = torch.rand(D, 1) * 0.01
    codes = torch.from_numpy(integers(7, D, D)).to(torch.int8)
    tensors = {".weight._data": codes, ".weight._scale": scale, ".input_scale": torch.ones(())}
    same(query(write(tmp_path, each(lambda _: tensors))), codes.double() * scale.double())


# ---------------------------------------------------------------------------------------------------------------------
# Refused by name

BYTES = torch.zeros(D, D, dtype=torch.uint8)
INT8 = BYTES.to(torch.int8)
ROWS = torch.ones(D, 1)


@pytest.mark.parametrize(
    ("tensors", "config", "kind"),
    [
        ({"codes": torch.zeros(D, D // 8, 1, dtype=torch.int8), "codebooks": torch.ones(1, 256, 1, 8)}, {}, "AQLM"),
        ({"trellis": torch.zeros(16, 16, 64, dtype=torch.int16)}, {}, "EXL3"),
        ({"q_weight": BYTES.int()}, {}, "EXL2"),
        ({"Qidxs": BYTES.long()}, {}, "QuIP#"),
        ({"weight": INT8, "weight_scales": ROWS}, {"quant_method": "eetq"}, "int8 codes of quant_method='eetq'"),
        ({"weight": BYTES}, {}, "uint8 codes of an unknown format"),
        ({"weight": BYTES.int()}, {"quant_method": "higgs"}, "int32 codes of quant_method='higgs'"),
        ({"weight": INT8, "weight_scale": ROWS}, {"quant_method": "quark"}, "codes of quant_method='quark'"),
        ({"weight_blob": BYTES}, {"quant_method": "new"}, "uint8 codes of quant_method='new'"),
        ({"qweight": BYTES.int()}, {"quant_method": "gptq"}, "codes in a tensor named qweight"),
        ({"weight_packed": BYTES.int(), "scale_packed": torch.ones(2, D)}, {}, "compressed-tensors' marlin-24"),
        ({"weight": INT8, "weight_scale": torch.ones(D), "pre_quant_scale": torch.ones(D)}, {}, "pre_quant_scale"),
        ({"weight": torch.ones(D, D), "weight_scale": torch.ones(D)}, {}, "float32 numbers with .*weight_scale beside"),
        (
            {"weight": INT8, "weight_scale": torch.ones(D, 1)},
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"a": {}}}},
            "rotated weights",
        ),
        ({"weight._data._data": BYTES, "weight._scale": torch.ones(D, 1)}, {}, "quanto of less than 8 bits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_formats_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, object], kind: str
) -> None:
    held = each(lambda _: {f".{name}": tensor for name, tensor in tensors.items()})
    path = write(tmp_path, held, **({"quantization_config": config} if config else {}))
    with pytest.raises(CheckpointError, match=rf"\w_proj.weight\w* is quantised as .*{kind}.*dequantise it first"):
        rd.find_attention(path)


def test_bits_in_a_configuration_of_its_own(tmp_path: Path) -> None:
    """ChatGLM's int4 looks like int8 of half the width."""
    held = each(lambda _: {".weight": INT8, ".weight_scale": torch.ones(D)})
    with pytest.raises(CheckpointError, match=r"int8 codes of quant_method='quantization_bit'"):
        rd.find_attention(write(tmp_path, held, quantization_bit=4))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({".qzeros": torch.zeros(4, 7, dtype=torch.int32)}, "the configuration states 4 bits.*allow none"),
        ({".scales": torch.ones(4, D - 1)}, "255 columns for 256 outputs"),
        ({".g_idx": torch.full((D,), 4, dtype=torch.int32)}, "names group 4 of 4"),
        ({".g_idx": torch.arange(D // 2, dtype=torch.int32)}, "the configuration states 4 bits"),
        ({".qweight": torch.zeros(D // 8, D, dtype=torch.int64)}, "not packed into int32"),
    ],
)
def test_sizes_that_contradict_each_other(tmp_path: Path, changes: dict[str, Tensor], said: str) -> None:
    tensors = {".qweight": torch.zeros(D // 8, D, dtype=torch.int32), ".scales": torch.ones(4, D)}
    tensors |= {".qzeros": torch.zeros(4, D // 8, dtype=torch.int32)}
    tensors |= {".g_idx": torch.arange(D, dtype=torch.int32) // 64} | changes
    path = write(tmp_path, each(lambda _: tensors), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=rf"\w_proj.weight is quantised .*{said}"):
        query(path)


def test_zero_points_that_the_configuration_promises(tmp_path: Path) -> None:
    args = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}
    said = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": args}}}
    held = each(lambda _: {".weight": INT8, ".weight_scale": ROWS})
    with pytest.raises(CheckpointError, match=r"k_proj.weight is quantised .* its zero_point is missing"):
        rd.find_attention(write(tmp_path, held, quantization_config=said))


@pytest.mark.parametrize(
    "state",
    [
        b"{",
        b"[1]",
        b'{"shape": [9, 9], "blocksize": 64}',
        b'{"shape": [256, 256], "blocksize": 0}',
        b'{"shape": 256}',
    ],
)
def test_damaged_description_of_4bit(tmp_path: Path, state: bytes) -> None:
    tensors = {
        ".weight": torch.zeros(D * D // 2, 1, dtype=torch.uint8),
        ".weight.absmax": torch.ones(D * D // 64),
        ".weight.quant_map": torch.linspace(-1, 1, 16),
        ".weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    }
    with pytest.raises(CheckpointError, match=r"k_proj.weight is quantised and cannot be read"):
        rd.find_attention(write(tmp_path, each(lambda _: tensors)))


def test_experts_and_masks_do_not_disturb(tmp_path: Path) -> None:
    """MXFP4 experts as gpt-oss stores them, a quantised feed-forward, and the masks of old GPT-2 files."""
    tensors = each(lambda w: {".weight": w})
    tensors |= {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(2, 64, 8, 16, dtype=torch.uint8),
        "model.layers.0.mlp.experts.gate_up_proj_scales": torch.zeros(2, 64, 8, dtype=torch.uint8),
        "model.layers.0.mlp.up_proj.codes": torch.zeros(D, D // 8, 1, dtype=torch.int8),
        "model.layers.0.mlp.up_proj.codebooks": torch.ones(1, 256, 1, 8),
        PREFIX + "bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8),
        PREFIX + "relative_position_index": torch.zeros(49, 49, dtype=torch.int64),
    }
    same(query(write(tmp_path, tensors, quantization_config={"quant_method": "mxfp4"})), WEIGHTS["q_proj"])


@pytest.mark.parametrize("name", ["q_weight", "qweight", "codes", "indices", "trellis", "B", "Qidxs", "dqweight"])
def test_numbers_by_the_name_of_codes_are_numbers(name: str, tmp_path: Path) -> None:
    """A parameter of one's own that is called as a format calls its codes, somewhere in the model."""
    attention = nn.ModuleDict({n: nn.Linear(8, 8, bias=False) for n in ("q_proj", "k_proj", "v_proj", "o_proj")})
    attention.register_parameter(name, nn.Parameter(torch.randn(3, 8)))
    attention.register_parameter("scales", nn.Parameter(torch.randn(3)))
    attention.num_heads = 2
    torch.save(attention.state_dict(), tmp_path / "model.pt")
    for model in (attention, tmp_path / "model.pt"):
        [layer] = rd.find_attention(model, num_heads=2)
        assert torch.equal(layer.query.tensor(), attention["q_proj"].weight)


def test_codes_are_never_returned_under_their_own_name() -> None:
    held = {"mask": torch.ones(4, 4, dtype=torch.int32), "weight": torch.ones(4, 4)}
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    dtypes = {name: tensor.dtype for name, tensor in held.items()}
    read_shapes, load, _ = dequantised(shapes, dtypes, {}, held.__getitem__)
    assert read_shapes == shapes
    assert load("weight") is held["weight"]
    with pytest.raises(ValueError, match="mask is quantised as int32 codes of an unknown format"):
        load("mask")


def test_live_modules_that_are_not_read_state_their_shape() -> None:
    """An adapter on such a base can be trained; only reading its values is refused."""

    class Packed(nn.Module):
        def __init__(self, w: Tensor) -> None:
            super().__init__()
            self.out_features, self.in_features = w.shape
            self.register_buffer("qweight", torch.zeros(D // 8, D, dtype=torch.int32))
            self.register_buffer("scales", torch.ones(4, D))

    live = model(Packed)
    assert rd.find_attention(live)[0].query.parameter_name == "self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=r"self_attn.q_proj.weight is quantised as Packed, which is not read"):
        query(live)
