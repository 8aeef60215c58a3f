"""Model types whose smaller head has been compared with the original, and what stands in the way of others.

Both tables hold what ``tests/compress/test_families.py`` finds on a small model of every type.
"""

from __future__ import annotations

from rankdecay.checks import suggestion
from rankdecay.compress.reduction import NotReducible

#: Types whose logits are the same when nothing but zeros is dropped.
CHECKED = frozenset(
    """
    apertus arcee aria_text bamba cohere cohere2 cohere2_moe cohere_compass_text cwm dots1 ernie4_5 ernie4_5_moe exaone4
    exaone_moe falcon_h1 flex_olmo flint gemma gemma2 gemma3_text glm glm4 glm4_moe gpt_oss granite granite_swa
    granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax
    internlm3 iquestcoder jais2 jamba jetmoe kolibri1 laguna lfm2 lfm2_moe lfm3 llama mellum minimax_m2 ministral
    ministral3 mistral mixtral moshi nemotron nemotron_h olmo olmo2 olmo3 phi qwen2 qwen2_moe qwen3 qwen3_moe seed_oss
    smollm3 solar_open starcoder2 vaultgemma
    """.split()  # noqa: SIM905 - a table of words
)

_GROUPS = {
    "its class takes the size of a head from the width, so that a smaller head cannot be written in it": """
        bart bert bert-generation big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom camembert codegen
        ctrl data2vec-text dbrx electra ernie falcon git gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese
        gptj helium marian mbart megatron-bert modernbert-decoder mpt musicgen musicgen_melody mvp olmoe openai-gpt opt
        pegasus persimmon plbart prophetnet rembert roberta roberta-prelayernorm roc_bert roformer stablelm trocr
        whisper xglm xlm xlm-roberta xlm-roberta-xl xmod""",
    "its configuration checks the number of frequencies against the width": "phi3 phi4_multimodal phimoe",
    "its attention is latent, and its cache holds no keys of heads": """
        axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots3_note_text glm4_moe_lite glm_moe_dsa hy_v4
        longcat_flash minicpm3 youtu""",
    "it has layers of linear attention, whose state is not a cache of keys and values": """
        bailing_hybrid kimi_linear minimax olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text xlstm""",
    "it has no attention over keys and values": "falcon_mamba mamba mamba2 rwkv",
    "its recurrent layers take the size of a head from the width": "recurrent_gemma",
    "it gates each coordinate of what a head gives, so that values cannot be given others": "afmoe beam hrm_text",
    "it normalises values or what a head gives, coordinate by coordinate": """
        bitnet gemma3n_text gemma4_assistant gemma4_text gemma4_unified_assistant gemma4_unified_text""",
    "it chooses the tokens that are seen by its values": "doge",
    "convolutions stand between its projections and the scores": "inkling2_text inkling_text zaya",
    "its scores are the difference of two softmaxes": "diffllama",
    "its norm of queries and keys has no gains to make up for a smaller root mean square": "llama4_text nanochat",
    "an indexer of its own turns by the frequencies of the model": "minimax_m3_vl_text",
    "its values have heads of another size than its keys": "mimo_v2_flash",
    "its layers share their attention": "zamba zamba2",
    "its parts have heads of several sizes": "blt",
    "its configuration has a name of its own for the size of a head, and its scores a bias of positions": "cpmant",
    "it hashes its queries, or adds positions to its scores": "reformer xlnet",
    "it has parts beside a language model: compress that alone, as docs/guides/compress.md takes it out": """
        dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified got_ocr2 llama4 mllama moss_transcribe_diarize qwen3_5
        qwen3_5_moe qwen4_exp""",
}
#: Types that cannot be written with a smaller head, and why.
REASONS: dict[str, str] = {kind: reason for reason, kinds in _GROUPS.items() for kind in kinds.split()}


def check_type(model_type: str) -> None:
    """Refuse a model type that has not been compared with its original, with what stands in the way.

    Raises:
        NotReducible: If it has not.
    """
    if model_type in CHECKED:
        return
    reason, near = REASONS.get(model_type), ""
    if reason is None and _is_another_model(model_type):
        reason = "it is not a causal language model, whose cache of keys and values a smaller head would make smaller"
    if reason is None:
        reason = "a smaller head of it has not been compared with its original"
        near = suggestion(model_type, sorted(CHECKED))
    raise NotReducible(f"model type {model_type!r} cannot be compressed: {reason}. {near}".strip())


def _is_another_model(model_type: str) -> bool:
    """Whether transformers, if it is installed, knows a type and has no causal language model of it."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
    except ImportError:  # `inspect` asks in the base install too
        return False
    return model_type in MODEL_MAPPING_NAMES and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
