"""Model types of transformers whose default rotary positions rotate a stated share of a head; others rotate all of it.

Written by ``python -m tests.attention.unturned`` from the classes of every type, and compared with them there.
"""

PARTIAL_ROTARY_TYPES = frozenset(
    """
    bamba deepseek_v4 diffusion_gemma diffusion_gemma_text dots3_note dots3_note_audio_encoder dots3_note_text
    dots3_note_vision_encoder efficientloftr glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe glm4v_moe_text
    glm4v_moe_vision glm4v_text glm4v_vision glm_image glm_image_text glm_image_vision glm_image_vqmodel glm_ocr
    glm_ocr_text glm_ocr_vision glmasr glmasr_encoder gpt_neox gpt_neox_japanese laguna mellum mimo_v2_flash
    minimax_m2 minimax_m3_vl minimax_m3_vl_text minimax_m3_vl_vision moonshine moonshine_streaming
    moonshine_streaming_encoder musicflamingo nemo_speechlm nemotron nemotron3_5_transcribe_asr_audio
    nemotron3_5_transcribe_audio nemotron3_5_transcribe_word_timestamp nemotron3_diarization
    nemotron3_diarization_audio neomme persimmon phi phi3 phi4_multimodal phi4_multimodal_audio
    phi4_multimodal_vision qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_moe_vision qwen3_5_text qwen3_5_vision
    qwen3_next qwen4_exp qwen4_exp_text qwen4_exp_vision recurrent_gemma solar_open stablelm step3p5
    step3p5_vision step3p7 zaya
    """.split()  # noqa: SIM905 - a table of words
)
