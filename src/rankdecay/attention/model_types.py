"""Names of the settings that state heads and positions, and model types that leave some of it to their class.

A setting is an attribute of a module or of a configuration above it, or a key of a checkpoint's configuration.
"""

from __future__ import annotations

import re

#: Attributes that give the width of a query's and a key's head where that of the values, which follow in the fused
#: projection, is another.
KEY_DIM = ("key_dim", "dim_head_qk", "qk_dim")

#: Attributes of a module or its configuration: number of heads, head size, number of key heads.
NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "nheads", "num_q_heads",
             "n_q_heads", "num_query_heads", "num_attention_heads_per_partition", "attention_heads", "attn_heads",
             "resampler_n_heads", "conf_num_attention_heads", "decoder_self_attention_heads",
             "mit_num_attention_heads")  # fmt: skip
HEAD_DIM = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_head", "d_kv", "dim_head",
            "d_k", "hidden_size_per_attention_head", "kv_channels", "attention_head_dim", "per_head_dim",
            "resampler_head_dim")  # fmt: skip
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads", "n_query_groups",
             "n_local_heads", "num_query_groups_per_partition", "multi_query_group_num")  # fmt: skip
#: Number of layers of the model.
NUM_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
#: Width of the model, which its heads divide where their size is not stated.
WIDTH = ("hidden_size", "n_embd", "d_model", "dim")

#: Settings, or a submodule, that only models with rotary positions have.
ROTARY = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_emb_base", "rotary_dim", "rotary_pct", "rotary_emb",
          "rotary_value", "freqs_cis", "freqs_cos")  # fmt: skip
#: Settings that state the share of a head's coordinates that rotary positions rotate.
PARTIAL_ROTARY = ("partial_rotary_factor", "rotary_pct", "rope_pct", "rotary_percent", "rotary_percentage")
#: Model types whose rotary planes are neighbouring coordinates; elsewhere they are half a head apart.
INTERLEAVED = (
    "bailing_hybrid", "blt", "blt_global_transformer", "blt_local_decoder", "blt_local_encoder", "blt_patcher",
    "codegen", "cohere", "cohere2", "cohere2_moe", "deepseek_v2", "deepseek_v32", "deepseek_v4", "dots3_note_text",
    "efficientloftr", "ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe_text", "glm", "glm4", "glm4v_text",
    "glm_moe_dsa", "glm_ocr_text", "gptj", "helium", "inkling2_vision", "lightglue", "llama4_text",
    "llama4_vision_model", "longcat_flash", "mistral_large4_text", "moonshine", "moonshine_streaming",
    "moonshine_streaming_encoder", "openai_privacy_filter", "pe_audio_encoder", "pe_audio_video_encoder",
    "pe_video_encoder", "roformer", "sam2_video", "sam3_tracker_video", "sam3_vit_model",
)  # fmt: skip
#: Model types, with the kind of layer, whose layers of that kind are without rotary positions.
WITHOUT_ROTARY = {(kind, "full_attention") for kind in ("cohere2", "cohere2_moe", "exaone4", "exaone4_5_text",
                  "exaone_moe", "kolibri1", "flint", "muse_spark_text", "muse_glimmer_text")}  # fmt: skip
#: Model types that normalise queries and keys by norms without weights.
NORMS_WITHOUT_WEIGHTS = ("nanochat", "neomme", "yoso", "muse_glimmer_text", "muse_spark_text")
#: Model types that normalise values by norms without weights.
VALUE_NORMS_WITHOUT_WEIGHTS = (
    "gemma3n_text", "gemma4_text", "gemma4_unified_text", "gemma4_vision", "diffusion_gemma_text", "diffusion_gemma",
    "embedding_gemma2_text",
)  # fmt: skip
#: Model types with latent attention whose part for positions is not turned.
LATENT_WITHOUT_ROTARY = ("kimi_linear",)
#: Model types whose query projection holds a gate beside each head.
GATED = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "qwen4_exp_text")


#: What cross-attention is called: without rotary positions, though the model's self-attention has them.
CROSS = re.compile(
    r"cross_?att|encoder_attn|encoder_decoder_attention|(?:^|\.)adapter$"
    r"|(?:^|\.)(?:cross|cross_?mha|x_?attn|src_attn|enc_?dec_?att(?:n|ention))(?:\.(?:self|attn|attention|mha|fn))?$"
)
#: What cross-attention is called as well as a second self-attention: whether positions turn it is not known.
PERHAPS_CROSS = re.compile(r"(?:^|\.)(?:attn_?2|multihead_attn|memory_attn|context_attn)$")
#: Model types whose cross-attention has them too.
ROTARY_IN_CROSS = ("edgetam_video", "sam2_video", "sam3_tracker_video")
#: Model types whose cross-attention has norms called as those of queries and keys, before their projections.
NORMS_BEFORE_IN_CROSS = ("blt_local_encoder", "blt_local_decoder")
#: Parts of a model without rotary positions, whatever the model has.
WITHOUT_POSITIONS = re.compile(r"(?:^|\.)spatial_perceiver\.")  # EdgeTAM
#: Model types with rotary positions that no setting mentions.
ROTARY_UNSAID = ("lightglue",)
#: Model types whose classes turn nothing and read none of the rotary settings that files of theirs still have.
ROTARY_UNREAD = ("jamba", "nemotron_h")
#: Model types that turn queries and keys by positions, but not plane by plane.
TURNED = ("vjepa2", "clvp_encoder")
#: Model types with a mixture of attention in stages, the first layer of which pools its queries over tokens.
POOLING = ("hiera", "sam2_hiera_det_model", "edgetam_vision_model")
#: Model types every fourth of whose layers has no rotary positions, if the configuration does not say which.
EVERY_FOURTH = ("smollm3", "llama4_text")
#: Share of a head's coordinates that positions turn, where a configuration leaves it to the class.
DEFAULT_SHARES = {"glm": 0.5, "glm4": 0.5, "persimmon": 0.5, "nemotron": 0.5, "stablelm": 0.25, "stablelm_epoch": 0.25}
#: Model types some of whose layers have no projection to values, because the keys are.
VALUES_ARE_KEYS = ("gemma4_text", "diffusion_gemma", "diffusion_gemma_text")


#: Model types with rotary positions that older configurations do not mention.
ROTARY_TYPES = ("llama", "mistral", "mixtral", "qwen", "gemma", "phi", "gpt_neox", "gptj", "codegen", "falcon", "olmo",
                 "persimmon", "stablelm", "cohere", "glm", "granite", "starcoder2", "modernbert", "dbrx")  # fmt: skip


def is_rotary_type(kind: str) -> bool:
    """Whether a model type has rotary positions though older configurations do not mention them."""
    return kind.startswith(ROTARY_TYPES) and not re.search("vision|audio|speech|asr|image|docling|encoder", kind)


#: What the parts of a model are called in the paths of its modules, beside the name of their configuration.
PARTS = {
    "vision_config": ("visual", "image", "video_tower", "vit"),
    "text_config": ("language", "llm", "image_to_text", "cross_modal"),  # the latter of Kosmos-2 and BridgeTower
    "audio_config": ("speech",), "semantic_model_config": ("semantic_encoder",),
    "adapter_config": ("image_pooling", "vision_backbone.image_pooling"),
    "backbone_config": ("pixel_level_module.encoder", "conv_encoder", "swin"), "perceiver_config": ("resampler",),
}  # fmt: skip

#: Model types that initialise the projections into the residual stream by 1/√(2 · layers) smaller.
SCALED_OUTPUT = ("gpt2", "gpt_bigcode")
