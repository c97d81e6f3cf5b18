"""config.json: which of the four architectures a checkpoint has, and every number it needs."""
from dataclasses import dataclass, field
from pathlib import Path

import bounds
import strict

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
        if not Path(folder).is_dir() or not strict.exists(path):
            raise ValueError(f"{folder} is not a model folder: config.json is missing "
                             f"({strict.found(folder)}). Give one as downloaded from Hugging Face")
        raw = strict.read_json(path)
        try:
            return ModelConfig.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @staticmethod
    def from_dict(raw: dict) -> "ModelConfig":
        """The config.json keys of transformers, old and new spellings; see ModelConfig."""
        kind = raw.get("model_type")
        if kind not in SUPPORTED:
            raise ValueError(f"model_type {strict.show(kind)} is none of {', '.join(SUPPORTED)}")
        for key in ("quantization_config", "attention_bias", "mlp_bias", "num_local_experts"):
            if raw.get(key):
                raise ValueError(f"{key} = {strict.show(raw[key])} is not implemented")
        if (act := raw.get("hidden_act")) != "silu":
            raise ValueError(f"hidden_act = {strict.show(act)}, only 'silu' is implemented")
        old = {"num_key_value_heads": raw.get("num_attention_heads")} if kind == "llama" else {}
        sizes = {key: bounds.whole(key, raw.get(key, old.get(key))) for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings")}
        heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        default = 128 if kind == "qwen3" else sizes["hidden_size"] // heads
        given = raw.get("head_dim") is not None
        head_dim = bounds.whole("head_dim", raw["head_dim"]) if given else default
        if heads % groups or head_dim < 2 or head_dim % 2 or (
                not given and kind != "qwen3" and sizes["hidden_size"] % heads):
            raise ValueError(f"{heads} heads, {groups} kv heads, head_dim {head_dim} do not fit")
        eps = bounds.positive("rms_norm_eps", raw.get("rms_norm_eps"), 1)
        return ModelConfig(model_type=kind, head_dim=head_dim, rms_norm_eps=eps, raw=raw, **sizes,
                           rope=rope_parameters(raw), windows=attention_windows(raw),
                           tie_word_embeddings=bounds.boolean(raw, "tie_word_embeddings"))


def rope_parameters(raw: dict) -> dict:
    """{rope_type, rope_theta, ...} from rope_parameters (new), or rope_theta and rope_scaling."""
    name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    rope = raw.get(name) or {}
    if type(rope) is not dict or any(type(value) is dict for value in rope.values()):
        raise ValueError(f"{name} must be an object of numbers, found {strict.show(rope)}")
    rope = {"rope_type": rope.get("type", "default"), "rope_theta": raw.get("rope_theta")} | rope
    if rope["rope_theta"] is None and raw["model_type"] == "llama":
        rope["rope_theta"] = 10000.0  # what Llama 1 and 2 leave out
    needs = {"default": (), "linear": ("factor",), "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if (kind := str(rope["rope_type"])) not in needs:
        raise ValueError(f"rope_type {kind!r:.99} is not implemented, only {list(needs)}")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1)) != 1:
        raise ValueError("partial_rotary_factor is not implemented")
    for key in ("rope_theta", *needs[kind]):
        bounds.positive(key, rope.get(key), 1e30)
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(f"low_freq_factor must be below high_freq_factor, found {rope}")
    return rope


def attention_windows(raw: dict) -> tuple[int | None, ...]:
    """The window of each layer, None for full attention; `layer_types` decides where present."""
    layers, kind, types = raw["num_hidden_layers"], raw["model_type"], raw.get("layer_types")
    window = raw.get("sliding_window", 4096 if kind == "mistral" else None)
    if kind == "llama" or (kind != "mistral" and not bounds.boolean(raw, "use_sliding_window")):
        window = None
    first = raw.get("max_window_layers", 28) if kind != "mistral" else 0
    if window is not None:
        bounds.whole("sliding_window", window)
    if type(first) is not int:
        raise ValueError(f"max_window_layers must be an integer, found {strict.show(first)}")
    kinds = {"full_attention": False, "sliding_attention": True}
    if types and (type(types) is not list or len(types) != layers
                  or any(str(t) not in kinds for t in types)):
        raise ValueError(f"layer_types names {strict.show(types)}, expected {layers} of "
                         f"{', '.join(kinds)}, for num_hidden_layers is {layers}")
    slides = [kinds[t] for t in types] if types else [i >= first for i in range(layers)]
    return tuple(window if s else None for s in slides)
