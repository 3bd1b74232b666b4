"""Hugging Face architectures from tiny random configs: real bodies, no download.

`HF_ZOO[name]()` gives `(model, inputs)`: a model in eval with random weights under a fixed seed,
and the keyword arguments of its forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, dict[str, Any]]

HF_ZOO: dict[str, Callable[[], Made]] = {}

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {**TEXT, "num_key_value_heads": 2}
GPT = {
    "vocab_size": 99,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
SPEECH = {
    "vocab_size": 33,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}


def _ids() -> torch.Tensor:
    return torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def text() -> dict[str, Any]:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


def ids() -> dict[str, Any]:
    return {"input_ids": _ids()}


def pair() -> dict[str, Any]:
    return {**text(), "decoder_input_ids": _ids()[:, :7]}


def image(size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": _normal(2, 3, size, size)}


def speech() -> dict[str, Any]:
    return {"input_values": _normal(2, 1600)}


def both(size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {**text(), **image(size)()}


def _enter(
    name: str,
    model: str,
    config: str,
    settings: dict[str, Any],
    inputs: Callable[[], dict[str, Any]] = text,
) -> None:
    def build() -> Made:
        import transformers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return made.eval(), inputs()

    HF_ZOO[name] = build


def _text(name: str, prefix: str, task: str = "Model", **more: Any) -> None:
    _enter(name, f"{prefix}{task}", f"{prefix}Config", {**TEXT, **more})


def _decoder(name: str, prefix: str, **more: Any) -> None:
    _enter(name, f"{prefix}ForCausalLM", f"{prefix}Config", {**DECODER, **more})


def _vision(name: str, prefix: str, task: str = "ForImageClassification", **more: Any) -> None:
    _enter(name, f"{prefix}{task}", f"{prefix}Config", {**VISION, **more}, image())


# encoders of text
_text("bert", "Bert", "ForSequenceClassification")
_text("roberta", "Roberta", "ForTokenClassification")
_text("xlm_roberta", "XLMRoberta", "ForMaskedLM")
_text("electra", "Electra", "ForPreTraining", embedding_size=32)
_text("albert", "Albert", "ForMaskedLM", embedding_size=16)
_text("camembert", "Camembert", "ForSequenceClassification")
_text("ernie", "Ernie", "ForSequenceClassification")
_text("mpnet", "MPNet", "ForSequenceClassification")
_text(
    "mobilebert",
    "MobileBert",
    "ForSequenceClassification",
    embedding_size=32,
    intra_bottleneck_size=32,
    num_feedforward_networks=2,
    true_hidden_size=32,
)
_text("squeezebert", "SqueezeBert", "ForSequenceClassification", embedding_size=32)
_text("convbert", "ConvBert", "ForSequenceClassification", embedding_size=32)
_text("fnet", "FNet", "ForSequenceClassification")
_text(
    "deberta",
    "Deberta",
    "ForSequenceClassification",
    relative_attention=True,
    pos_att_type=["c2p", "p2c"],
)
_text(
    "deberta_v2",
    "DebertaV2",
    "ForSequenceClassification",
    relative_attention=True,
    pos_att_type=["c2p", "p2c"],
)
_text("layoutlm", "LayoutLM", "ForSequenceClassification")
_text("megatron_bert", "MegatronBert", "ForSequenceClassification")
_text("roformer", "RoFormer", "ForSequenceClassification")
_text("modernbert", "ModernBert", "ForSequenceClassification")
_text("longformer", "Longformer", "ForSequenceClassification", attention_window=[4, 4])
_text("big_bird", "BigBird", "ForSequenceClassification", attention_type="original_full")
_text("canine", "Canine", "ForSequenceClassification", num_hash_buckets=16)
_text("esm", "Esm", "ForSequenceClassification", position_embedding_type="absolute")
_text("xmod", "Xmod", "ForSequenceClassification", default_language="en_XX")
_text("ibert", "IBert", "ForSequenceClassification")
_enter(
    "distilbert",
    "DistilBertForSequenceClassification",
    "DistilBertConfig",
    {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
)
_enter(
    "xlnet",
    "XLNetForSequenceClassification",
    "XLNetConfig",
    {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
)
_enter(
    "xlm",
    "XLMForSequenceClassification",
    "XLMConfig",
    {"vocab_size": 99, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
)
_enter(
    "funnel",
    "FunnelForSequenceClassification",
    "FunnelConfig",
    {
        "vocab_size": 99,
        "d_model": 32,
        "n_head": 4,
        "d_head": 8,
        "d_inner": 48,
        "block_sizes": [1, 1],
    },
)
_enter(
    "perceiver",
    "PerceiverForMaskedLM",
    "PerceiverConfig",
    {
        "vocab_size": 99,
        "d_model": 32,
        "d_latents": 32,
        "num_latents": 8,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "max_position_embeddings": 12,
    },
)

# decoders of text
_decoder("llama", "Llama")
_decoder("qwen2", "Qwen2")
_decoder("qwen3", "Qwen3", head_dim=8)
_decoder("mistral", "Mistral")
_decoder("mixtral", "Mixtral", num_local_experts=4)
_decoder(
    "qwen2_moe",
    "Qwen2Moe",
    num_experts=4,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)
_decoder("gemma", "Gemma", head_dim=8)
_decoder("gemma2", "Gemma2", head_dim=8)
_decoder("phi", "Phi")
_decoder("phi3", "Phi3")
_decoder("olmo", "Olmo")
_decoder("olmo2", "Olmo2")
_decoder("granite", "Granite")
_decoder("cohere", "Cohere")
_decoder("stablelm", "StableLm")
_decoder("starcoder2", "Starcoder2")
_decoder("glm", "Glm", head_dim=8)
_decoder("persimmon", "Persimmon")
_decoder(
    "deepseek_v3",
    "DeepseekV3",
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=16,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    num_key_value_heads=4,
)
_enter("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT)
_enter("gptj", "GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4})
_enter("openai_gpt", "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT)
_enter("codegen", "CodeGenForCausalLM", "CodeGenConfig", {**GPT, "rotary_dim": 4})
_enter("gpt_bigcode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT)
_enter("ctrl", "CTRLLMHeadModel", "CTRLConfig", {**GPT, "dff": 48})
_enter(
    "gpt_neo",
    "GPTNeoForCausalLM",
    "GPTNeoConfig",
    {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64,
    },
)
_enter("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT)
_enter(
    "bloom",
    "BloomForCausalLM",
    "BloomConfig",
    {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4},
)
_enter(
    "falcon",
    "FalconForCausalLM",
    "FalconConfig",
    {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
)
_enter(
    "mpt",
    "MptForCausalLM",
    "MptConfig",
    {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
)
_enter(
    "opt",
    "OPTForCausalLM",
    "OPTConfig",
    {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
)
_enter(
    "xglm",
    "XGLMForCausalLM",
    "XGLMConfig",
    {
        "vocab_size": 99,
        "d_model": 32,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 64,
    },
)
_enter(
    "mamba",
    "MambaForCausalLM",
    "MambaConfig",
    {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ids,
)
_enter(
    "mamba2",
    "Mamba2ForCausalLM",
    "Mamba2Config",
    {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 4,
    },
    ids,
)
_enter(
    "rwkv",
    "RwkvForCausalLM",
    "RwkvConfig",
    {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    ids,
)

# encoder and decoder
_enter("t5", "T5ForConditionalGeneration", "T5Config", T5, pair)
_enter(
    "t5_gated",
    "T5ForConditionalGeneration",
    "T5Config",
    {**T5, "feed_forward_proj": "gated-gelu"},
    pair,
)
_enter("mt5", "MT5ForConditionalGeneration", "MT5Config", T5, pair)
_enter("umt5", "UMT5ForConditionalGeneration", "UMT5Config", T5, pair)
_enter("longt5", "LongT5ForConditionalGeneration", "LongT5Config", T5, pair)
_enter(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    "SwitchTransformersConfig",
    {**T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    pair,
)
_enter("bart", "BartForConditionalGeneration", "BartConfig", BART, pair)
_enter("mbart", "MBartForConditionalGeneration", "MBartConfig", BART, pair)
_enter("marian", "MarianMTModel", "MarianConfig", BART, pair)
_enter("pegasus", "PegasusForConditionalGeneration", "PegasusConfig", BART, pair)
_enter("blenderbot", "BlenderbotForConditionalGeneration", "BlenderbotConfig", BART, pair)
_enter("m2m_100", "M2M100ForConditionalGeneration", "M2M100Config", BART, pair)
_enter(
    "led",
    "LEDForConditionalGeneration",
    "LEDConfig",
    {
        **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
        "attention_window": 4,
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
    },
    pair,
)
_enter(
    "prophetnet",
    "ProphetNetForConditionalGeneration",
    "ProphetNetConfig",
    {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
    },
    pair,
)

# images
_vision("vit", "ViT")
_vision("deit", "DeiT")
_vision("beit", "Beit")
_vision("dinov2", "Dinov2")
_vision(
    "vit_mae",
    "ViTMAE",
    "ForPreTraining",
    decoder_hidden_size=32,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=4,
    decoder_intermediate_size=48,
)
_vision("yolos", "Yolos", "ForObjectDetection", image_size=[32, 32], num_detection_tokens=4)
_vision("ijepa", "IJepa")
_SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
_enter("swin", "SwinForImageClassification", "SwinConfig", _SWIN, image())
_enter("swinv2", "Swinv2ForImageClassification", "Swinv2Config", _SWIN, image())
_enter(
    "convnext",
    "ConvNextForImageClassification",
    "ConvNextConfig",
    {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    image(),
)
_enter(
    "poolformer",
    "PoolFormerForImageClassification",
    "PoolFormerConfig",
    {
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "strides": [4, 2],
        "patch_sizes": [7, 3],
        "padding": [2, 1],
    },
    image(),
)
_enter(
    "segformer",
    "SegformerForImageClassification",
    "SegformerConfig",
    {
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "sr_ratios": [2, 1],
        "strides": [4, 2],
        "patch_sizes": [7, 3],
        "num_attention_heads": [2, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 16,
    },
    image(),
)
_enter(
    "pvt",
    "PvtForImageClassification",
    "PvtConfig",
    {
        "image_size": 32,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "num_encoder_blocks": 2,
        "sequence_reduction_ratios": [2, 1],
        "strides": [4, 2],
        "patch_sizes": [4, 2],
        "num_attention_heads": [2, 2],
        "mlp_ratios": [2, 2],
    },
    image(),
)
_enter(
    "levit",
    "LevitForImageClassification",
    "LevitConfig",
    {
        "image_size": 64,
        "hidden_sizes": [16, 32, 32],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    image(64),
)
_enter(
    "mobilevit",
    "MobileViTForImageClassification",
    "MobileViTConfig",
    {
        "image_size": 32,
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
        "num_attention_heads": 2,
    },
    image(),
)
_enter(
    "resnet",
    "ResNetForImageClassification",
    "ResNetConfig",
    {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    image(),
)

# speech
_enter("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", SPEECH, speech)
_enter("hubert", "HubertForCTC", "HubertConfig", SPEECH, speech)
_enter("wavlm", "WavLMForCTC", "WavLMConfig", SPEECH, speech)
_enter("unispeech", "UniSpeechForCTC", "UniSpeechConfig", {**SPEECH, "num_ctc_classes": 33}, speech)
_enter(
    "data2vec_audio",
    "Data2VecAudioForCTC",
    "Data2VecAudioConfig",
    {**SPEECH, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3},
    speech,
)
_enter("sew", "SEWForCTC", "SEWConfig", {**SPEECH, "squeeze_factor": 2}, speech)
_enter(
    "whisper",
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
    lambda: {"input_features": _normal(2, 8, 32), "decoder_input_ids": _ids()[:, :7]},
)
_enter(
    "speech_to_text",
    "Speech2TextForConditionalGeneration",
    "Speech2TextConfig",
    {
        **BART,
        "input_feat_per_channel": 8,
        "input_channels": 1,
        "conv_channels": 16,
        "max_source_positions": 32,
        "max_target_positions": 16,
    },
    lambda: {"input_features": _normal(2, 32, 8), "decoder_input_ids": _ids()[:, :7]},
)
_enter(
    "audio_spectrogram_transformer",
    "ASTForAudioClassification",
    "ASTConfig",
    {**VISION, "num_mel_bins": 16, "max_length": 24, "frequency_stride": 8, "time_stride": 8},
    lambda: {"input_values": _normal(2, 24, 16)},
)

# several kinds of input
_CLIP = {
    "text_config": {**TEXT, "projection_dim": 16},
    "vision_config": {**VISION, "projection_dim": 16},
    "projection_dim": 16,
}
_enter("clip", "CLIPModel", "CLIPConfig", _CLIP, both())
_enter("siglip", "SiglipModel", "SiglipConfig", _CLIP, both())
_enter(
    "altclip",
    "AltCLIPModel",
    "AltCLIPConfig",
    {**_CLIP, "text_config": {**TEXT, "project_dim": 16}},
    both(),
)
_enter("chinese_clip", "ChineseCLIPModel", "ChineseCLIPConfig", _CLIP, both())
_enter("vilt", "ViltModel", "ViltConfig", {**TEXT, **VISION}, both())
_enter(
    "time_series_transformer",
    "TimeSeriesTransformerModel",
    "TimeSeriesTransformerConfig",
    {
        "prediction_length": 4,
        "context_length": 8,
        "lags_sequence": [1, 2],
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_time_features": 1,
    },
    lambda: {
        "past_values": _normal(2, 10),
        "past_time_features": _normal(2, 10, 1),
        "past_observed_mask": torch.ones(2, 10),
        "future_values": _normal(2, 4),
        "future_time_features": _normal(2, 4, 1),
    },
)
_enter(
    "decision_transformer",
    "DecisionTransformerModel",
    "DecisionTransformerConfig",
    {"state_dim": 5, "act_dim": 3, "hidden_size": 32, "n_layer": 2, "n_head": 4, "max_ep_len": 20},
    lambda: {
        "states": _normal(2, 6, 5),
        "actions": _normal(2, 6, 3),
        "rewards": _normal(2, 6, 1),
        "returns_to_go": _normal(2, 6, 1),
        "timesteps": torch.arange(6).repeat(2, 1),
        "attention_mask": torch.ones(2, 6),
    },
)
