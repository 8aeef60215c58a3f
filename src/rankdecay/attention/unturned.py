"""Model types without rotary positions; of any other a file says so only by having no setting of them.

Written by ``python -m tests.attention.unturned`` from what live models of every type say, and compared with them there.
"""

NO_ROTARY_TYPES = frozenset(
    """
    aimv2_text_model aimv2_vision_model albert align_text_model altclip_text_model altclip_vision_model aria
    audio-spectrogram-transformer audioflamingo3_encoder bart beit bert bert-generation big_bird bigbird_pegasus
    biogpt blenderbot blenderbot-small blip_2_qformer blip_2_vision_model blip_text_model blip_vision_model bloom
    bridgetower_text_model bridgetower_vision_model bros camembert canary_decoder canine chinese_clip_text_model
    chinese_clip_vision_model clap_audio_model clap_text_model clip_text_model clip_vision_model
    clipseg_text_model clipseg_vision_model clvp clvp_encoder coarse_acoustics cohere_asr conditional_detr
    convbert cosmos3_edge_vision cpmant ctrl cvt d_fine dab-detr data2vec-audio data2vec-text data2vec-vision
    deberta deberta-v2 decision_transformer deepseek_ocr2_sam_vision_model deformable_detr deimv2 deit depth_pro
    detr dinat dinov2 dinov2_with_registers distilbert donut-swin dpr dpt edgetam_mask_decoder electra emu3_vqgan
    ernie fastspeech2_conformer fine_acoustics flaubert flava_image_model flava_multimodal_model flava_text_model
    florence_vision fsmt fun_asr_nano fun_asr_nano_encoder funnel gemma3n_audio gemma4_audio git git_vision_model
    glm5_next_text glm_image_vision glpn got_ocr2_vision gpt2 gpt_bigcode gpt_neo granite_docling_vision
    granite_speech5_encoder granite_speech_encoder granite_speech_plus_encoder grounding-dino groupvit_text_model
    groupvit_vision_model hiera hubert hunyuan_vl_vision ibert idefics2_perceiver idefics2_vision idefics3_vision
    ijepa imagegpt informer inkling2_text inkling_text instructblip_qformer instructblip_vision_model
    instructblipvideo_qformer instructblipvideo_vision_model internvl_vision jamba janus_vision_model janus_vqgan
    kimi_linear kosmos_2_5_text_model kosmos_2_5_vision_model kosmos_2_text_model kosmos_2_vision_model layoutlm
    layoutlmv3 led levit lilt longformer longt5 luke lw_detr lw_detr_vit lxmert m2m_100 marian markuplm
    mask2former maskformer-swin mbart megatron-bert metaclip_2_text_model metaclip_2_vision_model mgp-str
    minicpm_ocr_vision minicpmv4_6_vision minicpmv4_7_vision mllama_vision_model mm-grounding-dino mobilebert
    mobilevit molmo2_adapter molmo2_vision moss_transcribe_diarize_audio mpnet mpt mra mt5 musicgen_decoder
    musicgen_melody_decoder mvp nemotron_asr_streaming_encoder nemotron_h nllb-moe nystromformer omdet-turbo
    oneformer openai-gpt opt ovis2_vision owlv2_text_model owlv2_vision_model owlvit_text_model
    owlvit_vision_model parakeet_encoder patchtst pegasus pegasus_x perceiver pixio plbart pp_doclayout_v3
    pp_doclayout_v4 prophetnet pvt pvt_v2 qianfan_ocr_vision qwen2_5_omni_audio_encoder qwen2_audio_encoder
    qwen3_asr_encoder qwen3_omni_moe_audio_encoder radio reformer rembert rf_detr rf_detr_dinov2 roberta
    roberta-prelayernorm roc_bert rt_detr rt_detr_v2 sam2_hiera_det_model sam2_mask_decoder sam3_detr_decoder
    sam3_detr_encoder sam3_geometry_encoder sam3_lite_text_detr_decoder sam3_lite_text_detr_encoder
    sam3_lite_text_geometry_encoder sam3_lite_text_mask_decoder sam3_lite_text_text_model sam3_mask_decoder
    sam3_tracker_mask_decoder sam_hq_mask_decoder sam_hq_vision_model sam_mask_decoder sam_vision_model
    seamless_m4t seamless_m4t_v2 segformer seggpt semantic sew sew-d siglip2_text_model siglip2_vision_model
    siglip_text_model siglip_vision_model smolvlm_vision speech_to_text speecht5 splinter swin swin2sr swinv2
    switch_transformers t5 table-transformer tapas time_series_transformer timesfm timesformer tipsv2_text_model
    tipsv2_vision_model tvp udop umt5 unispeech unispeech-sat unlimited_ocr_sam_vision_model
    unlimited_ocr_vision_encoder videomae videoprism videoprism_text_model videoprism_vision_model vilt
    visual_bert vit vit_mae vit_msn vitdet vits vivit vjepa2 voxtral_encoder wav2vec2 wav2vec2-bert
    wav2vec2-conformer wavlm whisper xclip xclip_text_model xclip_vision_model xglm xlm xlm-roberta xlm-roberta-xl
    xlnet xmod yolos yoso zamba
    """.split()  # noqa: SIM905 - a table of words
)
