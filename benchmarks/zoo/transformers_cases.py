"""transformers in the zoo: every model type with an AutoModel that builds small and runs without help.

The default configuration of `llama` has 32 layers of width 4,096 and 6.7 billion parameters; shrunk, it has 4 layers
of width 64 and 180,000. Its attention still has groups if it had them, its layers are still of all the kinds that they
were of, and its special ids are still inside its vocabulary, which is 256 long.

Why rules and not a configuration per type: there are over 600 types, and each release adds some. A field's name says
what it is (`num_hidden_layers`, `encoder_layers`, `n_layer` are depths), so that one walk over a configuration, and
those that it holds, makes almost any of them small. Widths become equal, so that what must agree still does. Where that
is not enough, `FIELDS` says what a type needs in addition. Which inputs a model takes is read from the signature of its
forward, and `ENTRIES` has a line per kind of input; where images or sounds take the places of special ids in a text,
the batch is a text alone unless `PLACES` has the type. `LEFT_OUT` has the types that do not run, by the reason.

``python benchmarks/zoo/transformers_cases.py [TYPE ...]`` builds and runs them, and prints a line for each: family,
parameters, time of a forward, inputs or the error.
"""

from __future__ import annotations

import inspect
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from cases import Built, Case
from torch import nn

__all__ = ["cases"]

VOCABULARY = 256
DEPTH = 4
HIDDEN = 64
TOKENS = 16
IMAGE = 64
POSITIONS = 128
FRAMES = 128
SAMPLES = 4000

# The types by family, as they are named in transformers.
FAMILIES: dict[str, str] = {
    "text encoder": (
        "albert bert big_bird camembert canine clip_text_model convbert data2vec-text deberta deberta-v2 "
        "distilbert dpr electra embedding_gemma2_text ernie esm esmc eurobert flaubert fnet funnel gte ibert "
        "jina_embeddings_v3 longformer luke markuplm megatron-bert mobilebert modernbert mpnet mra nomic_bert "
        "nystromformer perceiver reformer rembert roberta roberta-prelayernorm roc_bert roformer splinter squeezebert "
        "tapas tipsv2_text_model ultrabert xlm xlm-roberta xlm-roberta-xl xmod yoso"
    ),
    "decoder": (
        "apertus apertus1p5_text arcee bert-generation biogpt bitnet bloom codegen cohere cohere2 cosmos3_edge_text "
        "cpmant ctrl cwm decision_transformer diffllama dory ernie4_5 exaone exaone4 falcon gemma gemma2 gemma3_text "
        "gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4v_text glm_image_text glm_ocr_text gpt-sw3 gpt2 "
        "gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj granite granite_docling_text granite_swa helium hrm_text "
        "hunyuan_v1_dense hunyuan_v1_moe hyperclovax imagegpt internlm3 iquestcoder jais2 llama minicpm3 ministral "
        "ministral3 mistral modernbert-decoder molmo2_text mpt muse_glimmer_text nanochat nemotron olmo olmo2 olmo3 "
        "openai-gpt opt persimmon phi phi3 qwen2 qwen2_5_vl_text qwen2_vl_text qwen3 qwen3_vl_text seed_oss smollm3 "
        "stablelm starcoder2 vaultgemma xglm xlnet youtu"
    ),
    "encoder-decoder": (
        "bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe "
        "pegasus pegasus_x plbart prophetnet seamless_m4t seamless_m4t_v2 switch_transformers t5 t5gemma t5gemma2 "
        "umt5"
    ),
    "mixture of experts": (
        "afmoe aria_text axk1 axk2 beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 doge dots1 "
        "dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite glm4v_moe_text glm_moe_dsa "
        "gpt_oss granitemoe granitemoe_swa granitemoeshared hy_v3 hy_v4 hy_v4_vl_text inkling2_loop_text "
        "inkling2_text inkling_text jetmoe kolibri1 laguna llama4_text longcat_flash mellum mimo_v2_flash minimax_m2 "
        "minimax_m3_vl_text mistral4 mistral_large4_text mixtral muse_spark_text olmoe openai_privacy_filter phimoe "
        "qwen2_moe qwen3_moe qwen3_vl_moe_text sarvam_mla sarvam_moe solar_open zaya"
    ),
    "state space": (
        "bailing_hybrid bamba falcon_h1 falcon_mamba glm5_next_text granitemoehybrid jamba kimi_linear lara_mini lfm2 "
        "lfm2_moe lfm3 mamba mamba2 minimax nemo_speechlm nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text "
        "qwen3_next recurrent_gemma rwkv xlstm zamba zamba2"
    ),
    "vision": (
        "aimv2_vision_model beit bit chinese_clip_vision_model clip_vision_model conditional_detr convnext convnextv2 "
        "cvt d_fine dab-detr data2vec-vision deformable_detr deimv2 deit detr dinov2 dinov2_with_registers "
        "dinov3_convnext dinov3_vit donut-swin dpt efficientnet focalnet glpn hgnet_v2 hiera ijepa internvl_vision "
        "levit mask2former maskformer maskformer-swin mgp-str mlcd mlcd_vision_model mobilenet_v1 mobilenet_v2 "
        "mobilevit mobilevitv2 oneformer pixio pixtral poolformer pp_doclayout_v3 pp_doclayout_v4 pp_ocrv5_server_rec "
        "pp_ocrv6_small_rec pp_ocrv6_tiny_rec pvt pvt_v2 qianfan_ocr_vision radio regnet resnet rf_detr rt_detr "
        "rt_detr_v2 sam3_vision_model sam3_vit_model sam_hq_vision_model sam_vision_model sapiens2 segformer "
        "siglip2_vision_model siglip_vision_model swiftformer swin swin2sr swinv2 table-transformer textnet "
        "timesformer timm_wrapper tipsv2_vision_model videomae videoprism_vision_model vit vit_mae vit_msn vitdet "
        "vivit vjepa2 yolos"
    ),
    "audio": (
        "csm audio-spectrogram-transformer audioflamingo3_encoder canary cohere_asr dac data2vec-audio dia encodec "
        "fastspeech2_conformer fastspeech2_conformer_with_hifigan gemma3n_audio gemma4_audio glmasr_encoder "
        "gradium_phonon_tts granite_speech5_ctc granite_speech5_encoder hubert kyutai_speech_to_text lasr_ctc "
        "lasr_encoder mimi mimi_encoder moonshine moss_transcribe_diarize_audio muse_spark_audio nemotron3_5_asr "
        "nemotron3_5_transcribe_asr_audio nemotron3_5_transcribe_audio nemotron3_5_transcribe_word_timestamp "
        "nemotron3_diarization nemotron3_diarization_audio nemotron_asr_streaming nemotron_asr_streaming_encoder "
        "omniasr_audio omniasr_ctc parakeet_ctc parakeet_encoder parakeet_rnnt parakeet_tdt pe_audio_encoder "
        "pocket_tts pocket_tts_audio_tokenizer_encoder qwen2_audio_encoder qwen3_asr_encoder sew sew-d speech_to_text "
        "speecht5 unispeech unispeech-sat univnet vits voxtral_encoder voxtral_realtime_encoder wav2vec2 "
        "wav2vec2-bert wav2vec2-conformer wavlm whisper"
    ),
    "multimodal": (
        "aimv2 altclip aria audioflamingo3 aya_vision blip blip_2_qformer bridgetower bros chinese_clip clap clip "
        "clipseg cohere2_vision cosmos3_edge cosmos3_omni deepseek_vl deepseek_vl_hybrid embedding_gemma2 exaone4_5 "
        "flava florence2 fun_asr_nano fuyu gemma3 gemma4 gemma4_unified git glm46v glm4v glm4v_moe glm5_next "
        "glm_image glm_ocr glmasr glmga got_ocr2 granite_docling granite_docling_vision granite_speech "
        "granite_speech_plus grounding-dino groupvit higgs_audio_v2 hy_v4_vl hyperclovax_vision_v2 idefics2 idefics3 "
        "idefics3_vision inkling2 inkling2_loop inkling_mm_model internvl kimi_k25 kosmos-2.5 layoutlm layoutlmv3 "
        "lfm2_vl lfm3_vl lighton_ocr lilt llava llava_next llava_next_video llava_onevision lxmert metaclip_2 "
        "minicpm_ocr minicpmv4_6 minicpmv4_7 minimax_m3_vl mistral3 mistral_large4 mllama mm-grounding-dino "
        "modernvbert molmo2 moshi moss_transcribe_diarize muse_glimmer muse_spark musicflamingo neomme omniasr ovis2 "
        "owlv2 owlvit paddleocr_vl paligemma pe_audio phi4_multimodal qianfan_ocr qwen2_5_vl qwen2_audio qwen2_vl "
        "qwen3_5 qwen3_5_moe qwen3_asr qwen3_vl qwen3_vl_moe sam3 sam3_lite_text sam3_lite_text_text_model siglip "
        "siglip2 smolvlm smolvlm_vision step3p7 t5gemma2_encoder tipsv2 udop ultravbert unlimited_ocr video_llama_3 "
        "video_llava videoprism vilt vipllava visual_bert voxtral xclip"
    ),
    "time series": "patchtsmixer patchtst timesfm2_5",
}

# What is left out, by the reason.
LEFT_OUT: dict[str, str] = {
    "the parts of the shrunk configuration do not fit each other": (
        "align clvp depth_pro edgetam edgetam_vision_model ernie4_5_vl_moe fun_asr_nano_encoder lw_detr "
        "pp_ocrv5_mobile_rec pp_ocrv6_small_det sam sam2 sam2_hiera_det_model sam2_vision_model sam3_tracker sam_hq "
        "uvdoc vision-text-dual-encoder wavtokenizer_encoder xcodec"
    ),
    "stays larger than 30 million parameters: its widths have names of their own": (
        "apertus1p5 blt dots3_note janus neucodec omdet-turbo vibevoice vibevoice_acoustic_tokenizer "
        "vibevoice_acoustic_tokenizer_decoder vibevoice_acoustic_tokenizer_encoder vibevoice_asr xcodec2"
    ),
    "the default configuration is no model, or the class has no forward": (
        "bark chameleon cohere_compass cohere_compass_text dbrx deepseek_ocr2 diffusion_gemma emu3 evolla "
        "glm_image_vqmodel granite4_vision hunyuan_vl hunyuan_vl_text moonshine_streaming musicgen musicgen_melody "
        "pp_ocrv6_medium_det qwen2_5_omni_thinker qwen3_omni_moe_thinker qwen4_exp qwen4_exp_text "
        "voxtral_realtime_text wavtokenizer"
    ),
    "takes inputs that belong together (prompts, places of images, latents, several series)": (
        "autoformer blip-2 efficientloftr idefics informer instructblip instructblipvideo kosmos-2 lightglue llama4 "
        "mimi_decoder muse_glimmer_assistant pi0 pocket_tts_audio_tokenizer pocket_tts_audio_tokenizer_decoder seggpt "
        "time_series_transformer timesfm tvp voxtral_realtime"
    ),
    "takes the patches of all images in one row, so that no dimension counts the objects": (
        "cohere_compass_vision cosmos3_edge_vision exaone4_5_vision gemma4_vision glm4v_moe_vision glm4v_vision "
        "glm5_next_vision glm_image_vision glm_ocr_vision hunyuan_vl_vision hy_v4_vl_vision inkling2_vision "
        "kimi_k25_vision lfm3_vl_vision minicpm_ocr_vision minicpmv4_7_vision muse_glimmer_vision muse_spark_vision "
        "qwen2_5_vl_vision qwen3_5_moe_vision qwen3_5_vision qwen3_vl_moe_vision qwen3_vl_vision qwen4_exp_vision "
        "video_llama_3_vision"
    ),
    "needs a package that is not installed (natten, detectron2, torchaudio)": (
        "dinat higgs_audio_v2_tokenizer layoutlmv2"
    ),
    "takes a session of a video and not a batch": "edgetam_video sam2_video sam3_tracker_video sam3_video",
    "wraps a model of timm, which is in the zoo by itself or too large": (
        "fast_vlm gemma3n gemma3n_vision pe_audio_video pe_audio_video_encoder pe_video pe_video_encoder "
        "perception_lm timm_backbone"
    ),
}

# Fields that no rule gets right, by type; a dot leads into an inner configuration or a dict.
FIELDS: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": FRAMES},
    "bit": {"num_groups": 8},
    "bros": {"dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_projection": 16},
    "clap": {"audio_config.hidden_size": 512},
    "cvt": {"depth": (1, 2, 4)},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320},
    "encodec": {"codebook_dim": 64},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "funnel": {"architectures": ["FunnelModel"]},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "lilt": {"hidden_size": 96},
    "lxmert": {"visual_feat_dim": 64},
    "mobilebert": {"embedding_size": 64, "true_hidden_size": 64, "intra_bottleneck_size": 64},
    "mobilevit": {"hidden_sizes": [32, 48, 64]},
    "owlv2": {"text_config.max_position_embeddings": POSITIONS},
    "owlvit": {"text_config.max_position_embeddings": POSITIONS},
    "deepseek_vl": {"vision_config.image_size": 32},
    "llava": {"vision_config.image_size": 32},
    "ovis2": {"vision_config.image_size": 32},
    "paligemma": {"vision_config.image_size": 32},
    "video_llava": {"vision_config.image_size": 32},
    "perceiver": {"d_latents": 64, "num_latents": 16},
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (8, 16)},
    "rt_detr": {"backbone_config.hidden_sizes": [32, 64, 128, 256], "encoder_in_channels": [64, 128, 256]},
    "rt_detr_v2": {"backbone_config.hidden_sizes": [32, 64, 128, 256], "encoder_in_channels": [64, 128, 256]},
    "swin2sr": {"image_size": 32},
    "sapiens2": {"num_key_value_heads_per_layer": [4, 4, 2, 2]},
    "t5gemma2_encoder": {"text_config.dropout_rate": 0.0},
    "textnet": {"hidden_sizes": [64, 64, 128, 256, 512]},
    "timesfm2_5": {"context_length": 128},
    "xmod": {"default_language": "en_XX"},
    "step3p7": {"text_config.sliding_window": 8},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
}

# -- shrinking: a field's name says what it is -------------------------------------------------------------------------

Rule = int | Callable[[int], int]


def at_most(limit: int) -> Callable[[int], int]:
    """A rule that leaves small numbers, and the special values 0 and -1, as they are."""
    return lambda old: min(old, limit)


# The first pattern that matches a whole field name decides.
DEPTHS = re.compile(
    r"((\w+_)?(en|de)coder_(num_)?(hidden_)?layers|num_(en|de)coder_layers|num_hidden_layers|n_layers?|depth|layers"
    r"|(\w+_)?num_(hidden_)?layers|num_layers_per_stack|(qformer|resampler|aligner)_depth|num_attention_layers"
    r"|num_blocks|num_self_attends_per_block|num_(spatial|temporal|global)_layers|[lxr]_layers)"
)
RULES: tuple[tuple[str, Rule], ...] = (
    (DEPTHS.pattern, at_most(DEPTH)),
    (r"n_(input|recurrent|output)_layers|aligner_num_add_layers", at_most(2)),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_kv_shared_layers", at_most(1)),
    (r"num_(first|last)_\w+", at_most(1)),
    (r"moe_layer_end_index|max_window_layers", at_most(DEPTH - 1)),
    (r"\w+_(period|frequency)|full_attention_interval|\w+_every_n_layers|layer_group_size|n_layers_per\w+", at_most(2)),
    (r"\w+_layer_offset", at_most(1)),
    (r"num_nextn_predict_layers", 0),
    # heads
    (r"(\w+_)?num_key_value_heads|num_kv_heads|n_head_kv|linear_num_key_heads", at_most(2)),
    (r"(\w+_)?(num_)?attention_heads|(\w+_)?(num|n)_(mamba_)?heads?|linear_num_\w*heads|num_heads_\w+", at_most(4)),
    (r"rotary_dim", at_most(8)),
    (r"(\w+_)?head_(dim|size)|d_kv|\w+_d_head|\w*headdim", at_most(16)),
    (r"\w+_rank", at_most(16)),
    # experts
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts|num_routed_experts", at_most(4)),
    (r"(num_)?experts?_(per_tok\w*|top_?k|used)|moe_(top_?k|k)|top_?k_?experts?", at_most(2)),
    (r"(mamba_)?n_groups", at_most(1)),
    (r"num_queries", at_most(10)),
    (r"n_group|topk_group|num_expert_group\w*|(moe_)?(n|num)_shared_experts", at_most(1)),
    # widths
    (r"(\w+_)?(intermediate|ffn|ff)_(size|dim|hidden_size)|\w*intermediate_dim|d_ff|n_inner", at_most(2 * HIDDEN)),
    (r"d_inner|inner_dim|(\w+_)?mlp_dim|mamba_d_ssm", at_most(2 * HIDDEN)),
    (r"(\w+_)?(hidden|embedding|embed|projection|model|proj|emb)_(size|dim|dims)|d_model|n_embd", at_most(HIDDEN)),
    (
        r"hidden_size_per_layer_input|embeddings_size|hidden_dim|dim|width|upsample_groups|output_channels"
        r"|(en|de)coder_dim|output_dim",
        at_most(HIDDEN),
    ),
    # vocabularies and positions
    (r"(\w+_)?vocab_size|vocab_size_per_layer_input|n_words", at_most(VOCABULARY)),
    (r"max_position_embeddings|n_positions|max_seq(uence)?_len(gth)?|n_ctx|seq_length", at_most(POSITIONS)),
    (r"max_target_positions", at_most(POSITIONS)),
    (r"max_source_positions", at_most(FRAMES // 2)),
    # images
    (r"(\w+_)?image_size|img_size|crop_size|input_resolution|(frame|video)_size", at_most(IMAGE)),
    (r"patch_size", lambda old: 16 if old > 8 else old),
)
COMPILED = tuple((re.compile(pattern), rule) for pattern, rule in RULES)


def shrink(config: Any) -> None:
    """Make a configuration small, and those that it holds, in place."""
    fields = vars(config)
    for inner in _inner(config):
        shrink(inner)
    before = {name: value for name, value in fields.items() if type(value) is int}
    for name, value in before.items():
        rule = next((rule for pattern, rule in COMPILED if pattern.fullmatch(name)), None)
        if rule is not None and not name.endswith("token_id"):
            fields[name] = rule(value) if callable(rule) else rule
    _shrink_lists(fields, {v for name, v in before.items() if DEPTHS.fullmatch(name) and v > DEPTH})
    _place_special_ids(fields)
    _agree(config, before)
    if "use_cache" in fields:
        fields["use_cache"] = False


def _inner(config: Any) -> list[Any]:
    return [value for value in vars(config).values() if hasattr(value, "model_type") and hasattr(value, "to_dict")]


# Lists of one integer per stage: what to do with each entry, given the smallest.
STAGES: tuple[tuple[str, Callable[[int, int], int]], ...] = (
    (r"\w*depths?|num_block_repeats|blocks_per_stage|stage_num_blocks", lambda entry, _: min(entry, 2)),
    (r"(\w+_)?(hidden_sizes|embed_dims?|dims)|embed_dim_per_stage", lambda entry, least: entry // max(least // 16, 1)),
    (r"conv_dim", lambda entry, _: min(entry, 32)),
    (r"decoder_in_channels", lambda entry, _: min(entry, HIDDEN)),
    (r"image_size|img_size|input_size", lambda entry, _: min(entry, IMAGE)),
)


def _shrink_lists(fields: dict[str, Any], depths: set[int]) -> None:
    """A list with an entry per layer follows the depth; one with an entry per stage becomes narrow and shallow."""
    lists = {name: v for name, v in fields.items() if isinstance(v, (list, tuple)) and v and name != "stage_names"}
    for depth in depths:
        per_layer = {name: value for name, value in lists.items() if len(value) == depth}
        kinds = [tuple(str(value[i]) for value in per_layer.values()) for i in range(depth)]
        for name, value in per_layer.items():
            fields[name] = type(value)(value[i] for i in _one_of_each_kind(kinds))
    for name, value in lists.items():
        if len(value) in depths or not all(type(entry) is int for entry in value):
            continue
        if depths and re.search(r"ind(ex|ices|exes)|layer_ids|feature_layer|_layers$|blocks$|hook_ids", name):
            last = max(depths)
            scaled = {entry if entry < 0 else min(entry, last - 1) * DEPTH // last for entry in value}
            fields[name] = type(value)(sorted(scaled))
        for pattern, change in STAGES:
            if re.fullmatch(pattern, name) and "stage_out_channels" not in fields:
                fields[name] = type(value)(change(entry, min(value)) for entry in value)


def _one_of_each_kind(kinds: Sequence[Any]) -> list[int]:
    """The layers that stay: the first of each kind (window, global, recurrent), then the earliest others."""
    first = [i for i, kind in enumerate(kinds) if kinds.index(kind) == i][:DEPTH]
    others = [i for i in range(len(kinds)) if i not in first]
    return sorted([*first, *others[: DEPTH - len(first)]])


def _place_special_ids(fields: dict[str, Any]) -> None:
    """Ids beyond the small vocabulary move to its end, each to a place of its own."""
    size = fields.get("vocab_size") or VOCABULARY
    moved: dict[int, int] = {}
    for name, value in fields.items():
        ids = value if isinstance(value, list) else [value]
        if re.search(r"(token_id|token_index|token)$", name) and all(type(i) is int for i in ids):
            new = [i if i < size - 32 else moved.setdefault(i, size - 1 - len(moved)) for i in ids]
            fields[name] = new if isinstance(value, list) else new[0]


def _agree(config: Any, before: dict[str, int]) -> None:
    """What follows from other fields."""
    fields = vars(config)
    heads, width = fields.get("num_heads"), fields.get("hidden_size")
    if isinstance(heads, (list, tuple)) and type(fields.get("embed_dim")) is int:  # Swin and its kind
        fields["embed_dim"] = 16 * heads[0]
        if width is not None:
            fields["hidden_size"] = 16 * heads[0] * 2 ** (len(heads) - 1)
        if type(fields.get("window_size")) is int:
            fields["window_size"] = min(fields["window_size"], 2)
    if "embed_dim_per_stage" in fields:  # Hiera and its kind
        fields["hidden_size"] = fields["embed_dim_per_stage"][0]
    if "backbone_channel_list" in fields:
        fields["backbone_channel_list"] = _first(config, "embed_dim_per_stage", "backbone_channel_list")[::-1]
    _agree_heads(fields, before)
    if type(fields.get("kv_lora_rank")) is int:  # multi-head latent attention
        fields["num_key_value_heads"] = fields.get("num_attention_heads")
        if before.get("head_dim") and before.get("qk_rope_head_dim"):
            fields["qk_rope_head_dim"] = fields["head_dim"] * before["qk_rope_head_dim"] // before["head_dim"]
        if "qk_head_dim" in fields:
            fields["qk_head_dim"] = (fields.get("qk_nope_head_dim") or 0) + (fields.get("qk_rope_head_dim") or 0)
    expand = fields.get("mamba_expand", fields.get("expand"))
    if isinstance(expand, (int, float)) and width:
        for name in ("mamba_d_head", "mamba_headdim", "mamba_head_dim", *(("head_dim",) if "expand" in fields else ())):
            count = next(
                (fields[n] for n in ("mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "num_heads") if n in fields),
                4,
            )
            if name in fields:
                fields[name] = int(expand * width) // count
    _agree_rope(config)
    _agree_stages(fields)


def _agree_heads(fields: dict[str, Any], before: dict[str, int]) -> None:
    """Attention without groups stays so; what a class leaves open is what a checkpoint's configuration would say."""
    for name in fields:
        if name.endswith("num_key_value_heads"):
            heads = name.replace("key_value", "attention")
            if heads in before and before.get(name, before[heads]) == before[heads]:
                fields[name] = fields[heads]
    if "head_dim" in fields and fields["head_dim"] is None and fields.get("num_attention_heads"):
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]


def _agree_rope(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        section = part.get("mrope_section") or ([8, 12, 12] if MROPE.match(config.model_type) else None)
        if section:
            head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            total = int(head * part.get("partial_rotary_factor", 1.0)) // 2
            scaled = [entry * total // sum(section) for entry in section]
            part["mrope_section"] = [scaled[0] + total - sum(scaled), *scaled[1:]]


# Their default configuration has no sections of the rotary embedding for time, height and width; the model has.
MROPE = re.compile(r"glm4v|glm46v|glm_image|glm_ocr|glmga|paddleocr_vl|qwen2(_5)?_vl")


def _agree_stages(fields: dict[str, Any]) -> None:
    """A backbone names its stages; without these names it cannot say what it gives out."""
    names = fields.get("stage_names")
    layers = [fields.get(n) for n in ("num_hidden_layers", "depths", "depth", "num_layers")]
    count = next((len(v) if isinstance(v, (list, tuple)) else v for v in layers if v is not None), None)
    if names and count is not None and len(names) > count + 1:
        fields["stage_names"] = names[: count + 1]
        fields["_out_features"], fields["_out_indices"] = [names[count]], [count]


def _set(config: Any, path: str, value: Any) -> None:
    *way, name = path.split(".")
    for step in way:
        config = getattr(config, step)
    vars(config)[name] = value


def small_config(name: str) -> Any:
    """The shrunk configuration of a model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[name]()
    shrink(config)
    for path, value in FIELDS.get(name, {}).items():
        _set(config, path, value)
    return config


# -- batches -----------------------------------------------------------------------------------------------------------


class Draw:
    """The random inputs of one batch."""

    def __init__(self, name: str, config: Any, objects: int, tokens: int, seed: int) -> None:
        self.name, self.config, self.objects, self.tokens = name, config, objects, tokens
        self.generator = torch.Generator().manual_seed(seed)

    def ids(self, length: int, config: Any) -> torch.Tensor:
        """Ids that are not special."""
        size = min(_first(config, "vocab_size", "n_words") or VOCABULARY, VOCABULARY)
        special = _special_ids(self.config) | _special_ids(config)
        free = torch.tensor([i for i in range(3, max(size - 32, size // 2)) if i not in special])
        return free[self.integers(len(free), length)]

    def text(self) -> torch.Tensor:
        """Ids, after the places of the image where the model wants them."""
        ids = self.ids(self.tokens, self.config.get_text_config())
        if self.name in PLACES:
            ids[:, : PLACES[self.name]] = _first(self.config, "image_token_id", "image_token_index")
        return ids

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, (self.objects, *shape), generator=self.generator)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.objects, *shape, generator=self.generator)

    def ones(self, *shape: int) -> torch.Tensor:
        return torch.ones(self.objects, *shape, dtype=torch.long)


def _special_ids(config: Any) -> set[int]:
    found = set()
    for part in (config, *_inner(config)):
        for name, value in vars(part).items():
            if re.search(r"(token_id|token_index|token)$", name):
                found |= {i for i in (value if isinstance(value, list) else [value]) if type(i) is int}
    return found


def _first(config: Any, *names: str) -> Any:
    """The first field of one of these names, in the configuration or in those that it holds."""
    deeper = [deep for inner in _inner(config) for deep in _inner(inner)]
    for part in (config, *_inner(config), *deeper):
        for name in names:
            value = getattr(part, name, None)
            if value is not None and value != [] and value != ():
                return value
    return None


def _image(draw: Draw, *before: int) -> torch.Tensor:
    size = _first(draw.config, "image_size", "img_size", "crop_size", "input_size") or IMAGE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = _first(draw.config, "num_channels", "in_chans", "in_channels")
    return draw.normal(*before, channels if type(channels) is int else 3, height, width)


def _video(draw: Draw) -> torch.Tensor:
    return _image(draw, _first(draw.config, "num_frames", "frames_per_clip") or 4)


def _boxes(draw: Draw) -> torch.Tensor:
    corners = draw.integers(32, draw.tokens, 2)
    return torch.cat([corners, corners + draw.integers(31, draw.tokens, 2)], -1)


def _mel(draw: Draw) -> torch.Tensor:
    bands = _first(draw.config, *BANDS.split()) or 80
    return draw.normal(bands, FRAMES) if draw.name in BANDS_FIRST.split() else draw.normal(FRAMES, bands)


def _waveform(draw: Draw) -> torch.Tensor:
    return draw.normal(1, SAMPLES) if draw.name in WITH_CHANNEL.split() else draw.normal(SAMPLES)


BANDS = "feature_projection_input_dim num_mel_bins n_mels feature_size num_mels input_feat_per_channel input_dim"
BANDS_FIRST = (
    "audioflamingo3_encoder glmasr_encoder moss_transcribe_diarize_audio qwen2_audio_encoder voxtral_encoder "
    "voxtral_realtime_encoder whisper"
)
WITH_CHANNEL = (
    "dac encodec mimi mimi_encoder omniasr_audio omniasr_ctc pe_audio_encoder pocket_tts_audio_tokenizer_encoder"
)
SEVERAL = "idefics3 smolvlm"  # images per text
VIDEOS = "timesformer videomae vivit xclip"

ENTRIES: dict[str, Callable[[Draw], torch.Tensor]] = {
    "input_ids": Draw.text,
    "attention_mask": lambda d: d.ones(d.tokens),
    "bbox": _boxes,
    "decoder_input_ids": lambda d: d.ids(d.tokens // 2, d.config.get_text_config(decoder=True)),
    "pixel_values": lambda d: (
        _video(d) if d.name in VIDEOS.split() else _image(d, *([1] if d.name in SEVERAL.split() else []))
    ),
    "pixel_values_videos": _video,
    "input_values": _waveform,
    "input_features": _mel,
}
# What some types take instead, by "type:input".
ENTRIES |= {
    "audio-spectrogram-transformer:input_values": lambda d: d.normal(FRAMES, 128),
    "audioflamingo3_encoder:input_features_mask": lambda d: d.ones(FRAMES),
    "blip_2_qformer:query_embeds": lambda d: d.normal(8, d.config.hidden_size),
    "blip_2_qformer:encoder_hidden_states": lambda d: d.normal(16, d.config.encoder_hidden_size),
    "clap:input_features": lambda d: d.normal(1, FRAMES, 64),
    "clap:is_longer": lambda d: torch.zeros(d.objects, 1, dtype=torch.bool),
    "decision_transformer:states": lambda d: d.normal(d.tokens, d.config.state_dim),
    "decision_transformer:actions": lambda d: d.normal(d.tokens, d.config.act_dim),
    "decision_transformer:rewards": lambda d: d.normal(d.tokens, 1),
    "decision_transformer:returns_to_go": lambda d: d.normal(d.tokens, 1),
    "decision_transformer:timesteps": lambda d: torch.arange(d.tokens).expand(d.objects, -1),
    "dia:decoder_input_ids": lambda d: d.integers(200, d.tokens // 2, d.config.decoder_config.num_channels),
    "qwen3_asr_encoder:input_features": lambda d: d.normal(128, 200),
    "qwen3_asr_encoder:input_features_mask": lambda d: d.ones(200),
    "kyutai_speech_to_text:input_ids": lambda d: d.integers(200, d.tokens, d.config.num_codebooks + 1),
    "gemma3n_audio:audio_mel": lambda d: d.normal(FRAMES, d.config.input_feat_size),
    "gemma3n_audio:audio_mel_mask": lambda d: d.ones(FRAMES) == 0,
    "gemma4_audio:input_features": lambda d: d.normal(FRAMES, 128),
    "granite_speech5_ctc:input_features": lambda d: d.normal(FRAMES, 320),
    "granite_speech5_encoder:input_features": lambda d: d.normal(FRAMES, 320),
    "lxmert:visual_feats": lambda d: d.normal(8, d.config.visual_feat_dim),
    "lxmert:visual_pos": lambda d: d.normal(8, 4),
    "muse_spark_audio:input_values": lambda d: d.normal(3840),
    "nemotron3_5_transcribe_word_timestamp:inputs_embeds": lambda d: d.normal(d.tokens, d.config.hidden_size),
    "oneformer:task_inputs": lambda d: d.ids(d.config.task_seq_len, d.config),
    "patchtsmixer:past_values": lambda d: d.normal(d.config.context_length, d.config.num_input_channels),
    "patchtst:past_values": lambda d: d.normal(d.config.context_length, d.config.num_input_channels),
    "pe_audio:input_values": lambda d: d.normal(1, SAMPLES),
    "perceiver:inputs": lambda d: d.normal(d.tokens, d.config.d_model),
    "speecht5:input_values": lambda d: d.normal(FRAMES, HIDDEN),
    "speecht5:decoder_input_values": lambda d: d.normal(8, HIDDEN),
    "timesfm2_5:past_values": lambda d: d.normal(128),
    "univnet:input_features": lambda d: _mel(d)[:, :16],
    "siglip2:pixel_values": lambda d: d.normal(16, 768),
    "siglip2_vision_model:pixel_values": lambda d: d.normal(16, 768),
    "pixel_attention_mask": lambda d: d.ones(16),
    "spatial_shapes": lambda d: torch.full((d.objects, 2), 4),
}
INPUTS: dict[str, str] = {
    "audioflamingo3_encoder": "input_features input_features_mask",
    "blip_2_qformer": "query_embeds encoder_hidden_states",
    "clap": "input_ids attention_mask input_features is_longer",
    "decision_transformer": "states actions rewards returns_to_go timesteps attention_mask",
    "gemma3n_audio": "audio_mel audio_mel_mask",
    "lxmert": "input_ids attention_mask visual_feats visual_pos",
    "pe_audio": "input_ids attention_mask input_values",
    "qwen3_asr_encoder": "input_features input_features_mask",
    "seamless_m4t": "input_ids attention_mask decoder_input_ids",
    "seamless_m4t_v2": "input_ids attention_mask decoder_input_ids",
    "siglip2": "input_ids attention_mask pixel_values pixel_attention_mask spatial_shapes",
    "siglip2_vision_model": "pixel_values pixel_attention_mask spatial_shapes",
    "speecht5": "input_values decoder_input_values",
    "voxtral": "input_ids attention_mask",
}
# How many places in the text an image takes; the other types that combine both are given a text alone.
PLACES = {"aya_vision": 4, "cohere2_vision": 4, "deepseek_vl": 4, "florence2": 5, "got_ocr2": 1, "internvl": 4}
PLACES |= {
    "idefics3": 4,
    "llava": 4,
    "ovis2": 4,
    "paligemma": 4,
    "qianfan_ocr": 4,
    "smolvlm": 4,
    "step3p7": 1,
    "video_llava": 4,
}
PADDED = ("input_ids", "attention_mask", "bbox")


def entries_of(model: Any, config: Any) -> list[str]:
    """The names of the inputs that a model is given, from the signature of its forward."""
    taken = inspect.signature(model.forward).parameters
    names = ["input_ids"] if "input_ids" in taken else []
    if names and "attention_mask" in taken:
        names.append("attention_mask")
    main = model.main_input_name
    names += [name for name in (main if isinstance(main, list) else [main]) if name not in names]
    if "bbox" in taken and "input_ids" in names:
        names.append("bbox")
    if "decoder_input_ids" in taken:
        names.append("decoder_input_ids")
    for name, places in ("pixel_values", "image"), ("input_features", "audio"):
        placed = _first(config, f"{places}_token_id", f"{places}_token_index") is not None
        if name in taken and name not in names and "input_ids" in names and (not placed or config.model_type in PLACES):
            names.append(name)
    return names


# -- building ----------------------------------------------------------------------------------------------------------


def build(name: str) -> Built:
    """A small model of a type, with random weights under a fixed seed, and its batches."""
    from transformers import AutoModel

    config = small_config(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModel.from_config(config).eval()
        names = INPUTS[name].split() if name in INPUTS else entries_of(model, config)
        batch = partial(_batch, name, config, names)
        _enliven(model, batch)
    text = "input_ids" in names
    padded = tuple(entry for entry in PADDED if entry in names) if text and "attention_mask" in names else ()
    return Built(model, batch, TOKENS if text else None, padded, "attention_mask" if padded else None)


def _batch(
    name: str, config: Any, names: Sequence[str], objects: int, *, tokens: int | None = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    draw = Draw(name, config, objects, tokens or TOKENS, seed)
    return {entry: (ENTRIES.get(f"{name}:{entry}") or ENTRIES[entry])(draw) for entry in names}


@torch.no_grad()
def _enliven(model: nn.Module, batch: Callable[..., Any]) -> None:
    """Parameters that begin at nothing (gates, biases, layer scales) would hide a layer that was left out."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not (parameter.abs() > 1e-3).any():
            parameter.normal_(0, 0.02)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms:  # random weights let the signal die out; statistics of its own keep it alive, as in a trained network
        before = [(norm.momentum, norm.training) for norm in norms]
        for norm in norms:
            norm.momentum, norm.training = 1.0, True
        model(**batch(4))
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum, norm.training = momentum, training


def cases() -> Iterator[Case]:
    """The model types that run, cheap to list."""
    for family, names in FAMILIES.items():
        for name in names.split():
            yield Case("transformers", name, partial(build, name), family)


def _report(name: str, family: str) -> str:
    try:
        built = build(name)
        batch = built.batch(2)
        began = time.perf_counter()
        with torch.no_grad():
            built.model(**batch)
        seconds = time.perf_counter() - began
    except Exception as error:
        return f"{name:<40} {family:<20} {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    parameters = sum(parameter.numel() for parameter in built.model.parameters())
    return f"{name:<40} {family:<20} {parameters:>12,} {seconds * 1000:>8.1f} ms  ok  {', '.join(batch)}"


def main() -> None:
    """Build and run the types that are named, or all."""
    from transformers import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    families = {case.name: case.module for case in cases()}
    for name in sys.argv[1:] or families:
        print(_report(name, families.get(name, "")), flush=True)
    if not sys.argv[1:]:
        for reason, names in LEFT_OUT.items():
            print(f"left out, because it {reason}: {names}")


if __name__ == "__main__":
    main()
