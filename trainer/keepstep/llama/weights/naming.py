"""One model, two vocabularies: keepstep's names and sizes, and Hugging Face's. No torch.

Both keep rotary pairs in the two halves of a head, so tensors are the same, element by element.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from keepstep.core.errors import InputError
from keepstep.llama.shape import ModelShape, RopeScaling

_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {  # of a layer
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
}
_OURS = {theirs: ours for ours, theirs in (_OUTSIDE | _INSIDE).items()}
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")


def hugging_face_name(name: str) -> str:
    """Of a canonical parameter."""
    if match := _LAYER.fullmatch(name):
        return f"model.layers.{match[1]}.{_INSIDE[match[2]]}"
    return _OUTSIDE[name]


def canonical_name(name: str) -> str | None:
    """Of a tensor in Hugging Face's files; None for one that is no parameter of a Llama model."""
    if match := _LAYER.fullmatch(name):
        inside = _OURS.get(match[2])
        return None if inside is None else f"layers.{match[1]}.{inside}"
    return _OURS.get(name)


def config_of(shape: ModelShape, *, dtype: str, special: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Hugging Face's config.json. `special`: bos, eos and pad tokens, where they are known."""
    scaling = shape.rope_scaling
    rope = {"rope_type": "default"} if scaling is None else {"rope_type": "llama3", **asdict(scaling)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.dim,
        "intermediate_size": shape.ffn_dim,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_seq,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,  # this and the next: read by transformers 4
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": {**rope, "rope_theta": shape.rope_theta},  # by 5
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": dtype,
        **{f"{name}_token_id": token for name, token in (special or {}).items()},
    }


def shape_of(config: Mapping[str, Any], where: str) -> ModelShape:
    """The sizes in a config.json. InputError for a model that the trainer would not compute alike."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    refused = [
        (config.get("model_type") != "llama", f"model_type is {config.get('model_type')}, not llama"),
        (kind not in {"default", "llama3"}, f"rotary positions are scaled ({kind})"),
        (config.get("hidden_act", "silu") != "silu", f"hidden_act is {config.get('hidden_act')}, not silu"),
        (bool(config.get("attention_bias")), "attention has biases"),
        (bool(config.get("mlp_bias")), "the feed-forward network has biases"),
    ]
    if reasons := [reason for is_so, reason in refused if is_so]:
        raise InputError(
            "the trainer does not compute this model",
            where=where,
            why="; ".join(reasons),
            next="Start from a Llama 3 or 3.1 model.",
        )
    try:
        heads = config["num_attention_heads"]
        shape = ModelShape(
            layers=config["num_hidden_layers"],
            dim=config["hidden_size"],
            ffn_dim=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            vocabulary=config["vocab_size"],
            max_seq=config.get("max_position_embeddings", 2048),  # this and the next two: their defaults
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_scaling=_scaling(rope) if kind == "llama3" else None,
        )
    except KeyError as error:
        raise InputError(f"the configuration has no {error}", where=where) from error
    if (config.get("head_dim") or shape.head_dim) != shape.head_dim:
        raise InputError(
            "the trainer does not compute this model",
            where=where,
            why=f"head_dim is {config['head_dim']}, not hidden_size / heads = {shape.head_dim}",
        )
    return shape


def _scaling(rope: Mapping[str, Any]) -> RopeScaling:
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=rope["original_max_position_embeddings"],
    )
