"""param_groups against the decay that transformers' own Trainer gives, over tiny random models.

Every parameter on which the two differ is listed below with the reason; the README counts them.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import regwrap as rw
from regwrap import sites

transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)

# Set wherever the architecture's configuration has the field.
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 37,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "d_ff": 37,
    "d_kv": 8,
    "image_size": 32,
    "patch_size": 8,
    "embedding_size": 32,
    "dim": 32,
    "n_heads": 4,
    "n_layers": 2,
    "hidden_dim": 37,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "state_size": 4,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPEECH = {
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "num_codevectors_per_group": 8,
    "codevector_dim": 8,
}
TOWER = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1}
SWIN = {"patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
OWN: dict[str, dict[str, Any]] = {
    "swin": SWIN,
    "swinv2": SWIN,
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "convnextv2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "segformer": {
        "hidden_sizes": [8, 16, 16, 16],
        "depths": [1] * 4,
        "num_attention_heads": [1, 2, 2, 2],
    },
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "mobilevit": {
        "image_size": 64,
        "hidden_sizes": [8, 8, 8],
        "neck_hidden_sizes": [8] * 7,
        "num_attention_heads": 2,
    },
    "poolformer": {"depths": [1] * 4, "hidden_sizes": [8] * 4, "patch_size": 7},
    "clip": {
        "text_config": {**TOWER, "num_attention_heads": 4, "vocab_size": 99},
        "vision_config": {**TOWER, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        "projection_dim": 16,
    },
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32},
    "wav2vec2": SPEECH,
    "hubert": SPEECH,
    "wavlm": SPEECH,
}
ARCHITECTURES = [
    "bert",
    "roberta",
    "distilbert",
    "albert",
    "electra",
    "gpt2",
    "gpt_neox",
    "gptj",
    "opt",
    "bloom",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "phi",
    "phi3",
    "mpt",
    "t5",
    "mt5",
    "bart",
    "mbart",
    "pegasus",
    "marian",
    "blenderbot",
    "longformer",
    "deberta",
    "deberta-v2",
    "mpnet",
    "layoutlm",
    "fnet",
    "nystromformer",
    "mobilebert",
    "mamba",
    "rwkv",
    "switch_transformers",
    "vit",
    "deit",
    "beit",
    "swin",
    "swinv2",
    "dinov2",
    "convnext",
    "convnextv2",
    "segformer",
    "resnet",
    "mobilevit",
    "poolformer",
    "clip",
    "wav2vec2",
    "hubert",
    "wavlm",
    "whisper",
    "rembert",
    "ernie",
    "cohere",
    "olmo",
    "stablelm",
    "starcoder2",
    "granite",
]

FLAT = (
    "fewer than 2 dimensions: a scale, a shift or a token; the Trainer looks for names, and decays"
)
NORM = "a norm by its class (BatchNorm, MambaRMSNorm); the Trainer knows LayerNorm and names"
NAMED = "a weight of 2 dimensions whose name has 'bias' in it, which is why the Trainer spares it"

RELATIVE = {"*.SelfAttention.relative_attention_bias.weight": NAMED}
DIFFERENT: dict[str, dict[str, str]] = {
    "t5": RELATIVE,
    "mt5": RELATIVE,
    "switch_transformers": RELATIVE,
    "mpnet": {"encoder.relative_attention_bias.weight": NAMED},
    "swin": {"*.relative_position_bias.relative_position_bias_table": NAMED},
    "swinv2": {"*.continuous_position_bias_mlp.#.weight": NAMED},
    "mamba": {"layers.#.mixer.D": FLAT, "norm_f.weight": NORM},
    "rwkv": {"blocks.#.attention.time_decay": FLAT, "blocks.#.attention.time_first": FLAT},
    "beit": {"layers.#.lambda_1": FLAT, "layers.#.lambda_2": FLAT},
    "dinov2": {"*.layer_scale1.lambda1": FLAT, "*.layer_scale2.lambda1": FLAT},
    "convnext": {"*.layer_scale_parameter": FLAT},
    "poolformer": {"*.layer_scale_1": FLAT, "*.layer_scale_2": FLAT},
    "clip": {"logit_scale": FLAT, "vision_model.embeddings.class_embedding": FLAT},
    "wav2vec2": {"masked_spec_embed": FLAT},
    "hubert": {"masked_spec_embed": FLAT},
    "wavlm": {"masked_spec_embed": FLAT},
    "resnet": {"*.normalization.weight": NORM},
    "mobilevit": {"*.normalization.weight": NORM},
}


def build(architecture: str) -> torch.nn.Module:
    kind = transformers.CONFIG_MAPPING[architecture]
    usual = {k: v for k, v in TINY.items() if hasattr(kind(), k)}
    alone = architecture not in ("mobilebert", "wav2vec2", "hubert", "wavlm")
    own = OWN.get(architecture, {})
    config = kind(**(own if own and alone else {**usual, **own}))
    model: torch.nn.Module = transformers.AutoModel.from_config(config)
    return model


def matches(pattern: str, name: str) -> bool:
    """`*` is anything, `#` a number."""
    parts = (re.escape(c) for c in pattern)
    text = "".join(parts).replace(r"\*", ".*").replace(r"\#", r"\d+")
    return re.fullmatch(text, name) is not None


def holds(reason: str, model: torch.nn.Module, name: str, decayed: bool) -> bool:
    """Whether the reason is true of the parameter, and `decayed` is what follows from it."""
    owner, _, own = name.rpartition(".")
    tensor = model.get_parameter(name)
    if reason == FLAT:
        return tensor.dim() < 2 and not decayed
    if reason == NORM:
        return sites.is_norm(model.get_submodule(owner)) and not decayed
    return tensor.dim() >= 2 and "bias" in name and not sites.is_bias(own) and decayed


def test_there_are_enough() -> None:
    assert len(ARCHITECTURES) == len(set(ARCHITECTURES)) >= 40
    assert set(DIFFERENT) <= set(ARCHITECTURES)


@functools.cache
def compared(architecture: str) -> tuple[int, dict[str, str]]:
    """How many trainable parameters there are, and the reason of each that differs, checked."""
    model = build(architecture)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = rw.param_groups(model, weight_decay=0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)

    ours = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    theirs = set(transformers.Trainer.get_decay_parameter_names(None, model))
    theirs &= {names[i] for i in held}
    listed = DIFFERENT.get(architecture, {})
    found = {}
    for name in ours ^ theirs:
        reasons = [reason for pattern, reason in listed.items() if matches(pattern, name)]
        assert len(reasons) == 1, f"{name}: Trainer {name in theirs}, ours {name in ours}"
        assert holds(reasons[0], model, name, name in ours)
        found[name] = reasons[0]
    return len(held), found


@pytest.mark.filterwarnings("ignore")  # transformers' own, on configurations and kernels
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decay_is_the_trainers_but_for_what_is_listed(architecture: str) -> None:
    _, found = compared(architecture)
    for pattern in DIFFERENT.get(architecture, {}):
        assert any(matches(pattern, name) for name in found), f"{pattern} is out of date"


@pytest.mark.filterwarnings("ignore")
def test_the_readme_has_the_counts() -> None:
    """Prints them too (pytest -s)."""
    every = {architecture: compared(architecture) for architecture in ARCHITECTURES}
    reasons = [reason for _, found in every.values() for reason in found.values()]
    trainable = sum(count for count, _ in every.values())
    told = [f"{len(reasons)} of {trainable:,} parameters in {len(every)} architectures"]
    for kind, reason in {"flat": FLAT, "norm": NORM, "named": NAMED}.items():
        where = [a for a, (_, found) in every.items() if reason in found.values()]
        told.append(f"{reasons.count(reason)} parameters in {len(where)} architectures")
        print(f"{kind}: {told[-1]} ({', '.join(where)})")
    print(told[0])
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    unwrapped = " ".join(readme.split())
    assert [line for line in told if line not in unwrapped] == []
