"""config.json: which of the four architectures a checkpoint has, and every number it needs."""
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelConfig:
    """config.json of a supported checkpoint, validated; ValueError names the key that is wrong."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: dict  # rope_type, rope_theta and the numbers of its scaling
    windows: tuple[int | None, ...]  # per layer: a query sees this many keys, itself included
    tie_word_embeddings: bool
    max_position_embeddings: int
    raw: dict = field(repr=False)  # config.json as it was read; `save` writes it back

    @staticmethod
    def from_folder(folder: str | Path) -> "ModelConfig":
        """Reads folder/config.json.   ValueError for anything this file does not implement."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            found = sorted(os.listdir(folder))[:8] if Path(folder).is_dir() else "no such folder"
            raise ValueError(f"{folder} is not a model folder: config.json is missing (found: "
                             f"{found}). Give a folder as downloaded from Hugging Face")
        try:
            return ModelConfig.from_dict(json.loads(path.read_text("utf-8-sig")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from None

    @staticmethod
    def from_dict(raw: dict) -> "ModelConfig":
        """The config.json keys of transformers, old and new spellings; see ModelConfig."""
        kind = raw.get("model_type")
        if kind not in SUPPORTED:
            raise ValueError(f"model_type {kind!r} is not supported, only {', '.join(SUPPORTED)}")
        for key in ("quantization_config", "attention_bias", "mlp_bias", "num_local_experts"):
            if raw.get(key):
                raise ValueError(f"{key} = {raw[key]!r} is not implemented")
        if raw.get("hidden_act") != "silu":
            raise ValueError(f"hidden_act = {raw.get('hidden_act')!r}, only 'silu' is implemented")
        old = {"num_key_value_heads": raw.get("num_attention_heads")} if kind == "llama" else {}
        sizes = {}
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                    "num_attention_heads", "num_key_value_heads", "max_position_embeddings"):
            sizes[key] = raw.get(key, old.get(key))
            if type(sizes[key]) is not int or sizes[key] < 1:
                raise ValueError(f"{key} must be a positive integer, found {sizes[key]!r}")
        heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        default = 128 if kind == "qwen3" else sizes["hidden_size"] // heads
        head_dim, eps = raw.get("head_dim") or default, raw.get("rms_norm_eps")
        if heads % groups or type(head_dim) is not int or head_dim < 1 or head_dim % 2 or (
                "head_dim" not in raw and kind != "qwen3" and sizes["hidden_size"] % heads):
            raise ValueError(f"{heads} heads, {groups} kv heads, head size {head_dim} do not fit")
        if type(eps) is not float or not 0 < eps < 1:
            raise ValueError(f"rms_norm_eps must be a number between 0 and 1, found {eps!r}")
        return ModelConfig(model_type=kind, head_dim=head_dim, rms_norm_eps=eps, raw=raw, **sizes,
                           rope=rope_parameters(raw), windows=attention_windows(raw),
                           tie_word_embeddings=bool(raw.get("tie_word_embeddings")))


def rope_parameters(raw: dict) -> dict:
    """{rope_type, rope_theta, ...} from rope_parameters (new), or rope_theta and rope_scaling."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope = {"rope_type": rope.get("type", "default"), "rope_theta": raw.get("rope_theta")} | rope
    if rope["rope_theta"] is None and raw["model_type"] == "llama":
        rope["rope_theta"] = 10000.0  # what Llama 1 and 2 leave out
    needs = {"default": (), "linear": ("factor",), "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if rope["rope_type"] not in needs:
        raise ValueError(f"rope_type {rope['rope_type']!r} is not implemented, only {list(needs)}")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1)) != 1:
        raise ValueError("partial_rotary_factor is not implemented")
    for key in ("rope_theta", *needs[rope["rope_type"]]):
        if type(rope.get(key)) not in (int, float) or not 0 < rope[key] < math.inf:
            raise ValueError(f"rope: {key} must be a positive number, found {rope.get(key)!r}")
    return rope


def attention_windows(raw: dict) -> tuple[int | None, ...]:
    """The window of each layer, None for full attention; `layer_types` decides where present."""
    layers, kind = raw["num_hidden_layers"], raw["model_type"]
    window = raw.get("sliding_window", 4096 if kind == "mistral" else None)
    if kind == "llama" or (kind != "mistral" and not raw.get("use_sliding_window")):
        window = None
    first = raw.get("max_window_layers", 28) if kind != "mistral" else 0
    kinds = {"full_attention": False, "sliding_attention": True}
    slides = [kinds[t] for t in raw.get("layer_types") or ()] or [i >= first for i in range(layers)]
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"sliding_window must be a positive integer or null, found {window!r}")
    if len(slides) != layers:
        raise ValueError(f"layer_types names {len(slides)} layers, num_hidden_layers is {layers}")
    return tuple(window if s else None for s in slides)
