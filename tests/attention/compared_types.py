"""What the comparison of every type with what its model does cannot say, or says otherwise, with the reason.

By the class of the attention module, and after ``:`` a projection if it is the module's second attention.
"""

from __future__ import annotations

#: Types whose small model is not built.
NOT_BUILT = {
    "dinat": "its attention is natten's, a package that is not there",
    "inkling_mm_model": "its narrowest model takes 23 GB",
    "qwen3_omni_moe_thinker": "its positions have sections as wide as its heads are; the parts are types of their own",
    "zamba": "its attention is shared by 76 layers, which the lists of its configuration count",
}

_VIDEO = "its memory holds positions of several images, which only a session of a whole video has"
_POSITIONS = "it takes positions or a mask that only the whole model makes"
_PROJECTIONS = "it takes two or three inputs of its own, which only the whole model makes"
#: Modules that are not run on random input: neither the model nor the module by itself.
NOT_RUN = {
    "ClapAudioSelfAttention": "its windows are of the whole spectrogram",
    "EdgeTamVideoRoPECrossAttention": _VIDEO, "EdgeTamVideoRoPESelfAttention": _VIDEO,
    "Sam2VideoRoPEAttention": _VIDEO, "Sam3TrackerVideoRoPEAttention": _VIDEO,
    "EfficientLoFTRAttention": _POSITIONS, "EvollaSequenceCompressorAttention": _POSITIONS,
    "FunAsrNanoAttention": _POSITIONS, "Gemma3nAudioAttention": _POSITIONS, "Gemma4AudioAttention": _POSITIONS,
    "GraniteSpeech5EncoderAttention": _POSITIONS, "LayoutLMv3SelfAttention": _POSITIONS,
    "LwDetrAttention": _POSITIONS, "RfDetrAttention": _POSITIONS, "OneFormerAttention": _POSITIONS,
    "NeuCodecAttention": _POSITIONS, "Xcodec2Attention": _POSITIONS,
    "MuseGlimmerAssistantAttention": "it takes keys and values of another model",
    "PerceiverSelfAttention": _PROJECTIONS,
    "Qwen4ExpTextAttention": "its indexer takes a mask that only the whole model makes",
}  # fmt: skip

_SCORES, _VALUES, _WRITES, _HEADS = "W_Kᵀ W_Q", "values:", "W_O W_V", "heads:"
_RELATIVE = "queries also meet positions, whose scores are added to those of queries and keys"
_GLOBAL = "only tokens that are marked attend so, and none of random input is"
#: Modules in which a comparison finds something else than is said: how its text begins, and why that is right.
DIFFERS: dict[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(
        (
            "BrosSelfAttention", "ConditionalDetrDecoderCrossAttention", "ConditionalDetrDecoderSelfAttention",
            "DabDetrDecoderLayerCrossAttention", "DabDetrDecoderLayerSelfAttention", "DeepseekOcr2SamVisionAttention",
            "FastSpeech2ConformerAttention", "GotOcr2VisionAttention", "GraniteSpeechConformerAttention",
            "GraniteSpeechPlusConformerAttention", "NemotronAsrStreamingEncoderAttention", "ParakeetEncoderAttention",
            "SamHQVisionAttention", "SamVisionAttention", "SeamlessM4TConformerSelfAttention",
            "SeamlessM4Tv2ConformerSelfAttention", "SegGptAttention", "SpeechT5Attention",
            "UnlimitedOcrSamVisionAttention", "Wav2Vec2BertSelfAttention", "Wav2Vec2ConformerSelfAttention",
            "XLNetRelativeAttention",
        ),
        ((_SCORES,), _RELATIVE),
    ),
    **dict.fromkeys(
        ("VideoPrismMultiheadAttentionPoolingHead", "TimesFmAttention"),
        ((_SCORES,), "its scale of each coordinate is the same for all of them in a new model"),
    ),
    "VitsAttention": ((_SCORES, _VALUES, _WRITES), "positions are added to keys and to values"),
    "Dots3NoteTextAttention": ((_SCORES,), "it normalises the part of the keys alone that positions turn"),
    "ClvpSelfAttention": ((_WRITES,), "it turns values by positions, too"),
    "DiffusionGemmaDecoderTextAttention": ((_VALUES,), "it also attends to values of the encoder"),
    "DiffusionGemmaEncoderTextAttention": ((_VALUES,), "the keys of some layers are the values"),
    "DogeAttention": ((_VALUES,), "values also say which tokens are seen"),
    "LevitAttention": ((_VALUES,), "a norm and an activation stand between values and output"),
    "LevitAttentionSubsample": ((_VALUES,), "a norm and an activation stand between values and output"),
    "LEDEncoderSelfAttention:query_global": ((_HEADS, _VALUES, _WRITES), _GLOBAL),
    "LongformerSelfAttention:query_global": ((_HEADS, _VALUES, _WRITES), _GLOBAL),
    "LiltSelfAttention:layout_query": ((_VALUES,), "what it gives is the second output of its module"),
    "InformerProbSparseAttention": ((_HEADS, _VALUES, _WRITES), "it draws at random which keys it looks at"),
    "JetMoeAttention": ((_HEADS,), "queries are in the order of experts, which each token chooses"),
    "GroupViTAssignAttention": ((_HEADS,), "it takes its softmax over queries, and of all heads in one"),
    "FunnelRelMultiheadAttention": ((_HEADS,), "heads are the third dimension of its scores, of as many tokens"),
    "EvollaSequenceAlignerCrossAttention": (("no softmax",), "it attends to proteins, which random text has none of"),
    "LocalSelfAttention": (("no softmax",), "it takes its softmax by logarithms"),
    "MraSelfAttention": (("no softmax",), "it takes its softmax block by block, at two resolutions"),
    "YosoSelfAttention": (("no softmax",), "it takes the chance of equal hashes for a softmax"),
}  # fmt: skip
