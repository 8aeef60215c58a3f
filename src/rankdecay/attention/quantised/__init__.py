"""Quantised weights, in files and in live modules: read as the numbers they stand for, or refused by name.

A quantised weight is a matrix of codes with tensors beside it that say what the codes mean. :func:`dequantised` turns
the tensors of a file into weights with their own names and shapes, read on demand; :func:`live_weights` does the same
for the modules of a model. Codes are never returned as a weight: what no row of the table knows is refused.

=========================  ======================================================  ==================================
format                     tensors beside, or instead of, ``weight``               weight
=========================  ======================================================  ==================================
FP8, int8                  ``weight_scale_inv``, ``weight_scale``, ``scale``,      (codes - zero point) · scale, by
                           ``scale_weight``; ``weight_zero_point``                 tensor, row, group or block
LLM.int8 (bitsandbytes)    ``SCB``, ``weight_format``                              codes · SCB / 127
4-bit (bitsandbytes)       ``weight.absmax``, ``.quant_map``, ``.nested_*``,       quant_map[code] · absmax
                           ``.quant_state.bitsandbytes__nf4`` or ``fp4``
GPTQ (2, 3, 4, 8 bits)     ``qweight``, ``qzeros``, ``scales``, ``g_idx``          (codes - zero - 1) · scale; version
                                                                                   2 has no 1
AWQ (GEMM)                 ``qweight``, ``qzeros``, ``scales``                     (codes - zero) · scale
pack-quantized             ``weight_packed``, ``weight_shape``, ``weight_scale``,  (codes - zero point) · scale
(compressed-tensors)       ``weight_zero_point``, ``weight_g_idx``
NVFP4, MXFP4               ``weight_packed`` or ``weight``, ``weight_scale``,      E2M1 · scale / ``global_scale``, or
                           ``weight_global_scale`` or ``weight_scale_2``           · ``scale_2``
MLX, Metal                 ``scales``, ``biases`` or ``qbiases``                   codes · scale + bias
BitNet                     ``weight_scale``                                        ternary, / or · scale
HQQ                        ``W_q``, ``scale``, ``zero``, ``shape``, ``nbits``      (codes - zero) · scale
quanto (8 bits)            ``weight._data``, ``weight._scale``                     codes · scale
torchao                    ``_weight_qdata``, …, and the header of the file        by torchao
=========================  ======================================================  ==================================

Experts, feed-forward layers and embeddings are left alone: nothing here reads them, and there can be a hundred
thousand. Sizes that contradict each other are an error that names the tensor. The products are formed in float32,
whatever the precision of the scales.
"""

from rankdecay.attention.quantised.files import dequantised
from rankdecay.attention.quantised.live import live_weights
from rankdecay.attention.quantised.stored import Weight

__all__ = ["Weight", "dequantised", "live_weights"]
