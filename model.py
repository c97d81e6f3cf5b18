"""A decoder-only transformer that is Mistral, Qwen2, Qwen3 or Llama by its config.json.

Parameter names are the checkpoint's own, so loading is one strict assignment on a meta-device
model and saving its inverse. Rows are padded on the right and attention is causal, so no position
sees padding and there is no attention-mask argument. Norms, rotary tables and log-probs are
computed in float32 at least, whatever the weights are; a float64 model is float64 throughout.
Letters: B rows, T tokens, V vocabulary, D width, H heads, G kv heads, K head size, N scored tokens.
"""
import json
import math
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
HEAD_CHUNK = 1024  # positions whose logits exist at one time
Cache = list[tuple[Tensor, Tensor]]  # per layer: keys and values, (B, G, T, K)


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


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the division in float32 at least."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_tables(config: ModelConfig, positions_T: Tensor, dtype: torch.dtype) -> tuple:
    """cos and sin of position * frequency, (T, K) each: K/2 frequencies, stated twice."""
    rope, wide = config.rope, torch.promote_types(dtype, torch.float32)
    steps = torch.arange(0, config.head_dim, 2, device=positions_T.device).to(wide)
    inverse = 1.0 / rope["rope_theta"] ** (steps / config.head_dim)
    if rope["rope_type"] == "linear":
        inverse = inverse / rope["factor"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * inverse / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast, as trained; 0: slow, stretched
        inverse = inverse * (keep + (1 - keep) / rope["factor"])
    angles = torch.outer(positions_T.to(wide), inverse).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Turns the plane (i, i + K/2) of each head by its angle: the half-split layout."""
    first, second = x_BHTK.chunk(2, -1)
    return x_BHTK * cos_TK + torch.cat((-second, first), -1) * sin_TK


def attention_mask(queries: int, keys: int, window: int | None,
                   device: torch.device) -> Tensor | None:
    """(queries, keys) True where the last `queries` positions may look; None for plain causal."""
    if queries in (1, keys) and (window is None or window >= keys):
        return None
    key = torch.arange(keys, device=device)
    query = key[keys - queries:, None]
    return (key <= query) & (key > query - (window or keys))


class Attention(nn.Module):
    """Grouped-query attention: biases for qwen2, normed heads for qwen3, a window or none."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        width, size, bias = config.hidden_size, config.head_dim, config.model_type == "qwen2"
        self.window, self.size = window, size
        self.q_proj = nn.Linear(width, config.num_attention_heads * size, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * size, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * size, width, bias=False)
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(size, config.rms_norm_eps)
            self.k_norm = RMSNorm(size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, tables: tuple, past: tuple | None) -> tuple:
        split = (*x_BTD.shape[:2], -1, self.size)
        q, k, v = (p(x_BTD).view(split) for p in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = rotate(q, *tables), rotate(k, *tables)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        mask = attention_mask(q.shape[2], k.shape[2], self.window, q.device)
        y_BHTK = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None and len(x_BTD[0]) > 1, enable_gqa=True)
        return self.o_proj(y_BHTK.transpose(1, 2).flatten(2)), (k, v)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); also returns the layer's keys and values."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config, window), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, tables: tuple, past: tuple | None = None) -> tuple:
        attended, kept = self.self_attn(self.input_layernorm(x_BTD), tables, past)
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), kept


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what checkpoints call `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, window) for window in config.windows)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """The language model; a tied one has no lm_head and reads its embedding instead."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.model = config, Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids_BT: Tensor, checkpointing: bool = False) -> Tensor:
        """Hidden states (B, T, D) after the final norm. Checkpointing keeps one tensor a block
        and runs the block again in backward: the same numbers for less memory."""
        x_BTD, tables = self.embed(ids_BT, 0)
        for block in self.model.layers:
            x_BTD = (checkpoint(block, x_BTD, tables, use_reentrant=False) if checkpointing
                     else block(x_BTD, tables))[0]
        return self.model.norm(x_BTD)

    def extend(self, ids_BT: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Hidden states of T new positions behind those in `cache`, and the longer cache."""
        x_BTD, tables = self.embed(ids_BT, cache[0][0].shape[2] if cache else 0)
        longer = []
        for i, block in enumerate(self.model.layers):
            x_BTD, kept = block(x_BTD, tables, cache[i] if cache else None)
            longer.append(kept)
        return self.model.norm(x_BTD), longer

    def embed(self, ids_BT: Tensor, start: int) -> tuple[Tensor, tuple]:
        """Embeddings (B, T, D) and the rotary tables of positions start .. start + T - 1."""
        x_BTD = self.model.embed_tokens(ids_BT)
        positions_T = torch.arange(start, start + ids_BT.shape[1], device=ids_BT.device)
        return x_BTD, rotary_tables(self.config, positions_T, x_BTD.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), float32 at least. Only ever call it on the positions you need."""
        tied = self.config.tie_word_embeddings
        logits = F.linear(hidden, self.model.embed_tokens.weight) if tied else self.lm_head(hidden)
        return logits.to(torch.promote_types(hidden.dtype, torch.float32))

    def response_logps(self, ids_BT: Tensor, response_mask_BT: Tensor,
                       checkpointing: bool = False) -> tuple[Tensor, Tensor]:
        """log pi(y_t | x, y_<t) of every response token: (token_logps, mask), both (B, T).

        Zero outside the mask, float32 at least. The head runs on the positions before response
        tokens only, HEAD_CHUNK at a time and again in backward: no (B, T, V) tensor ever exists.
        """
        assert not response_mask_BT[:, 0].any(), "position 0 has nothing before it to predict it"
        hidden_BTD = self(ids_BT, checkpointing)
        row, position = response_mask_BT.nonzero(as_tuple=True)
        hidden_ND, target_N = hidden_BTD[row, position - 1], ids_BT[row, position]
        chunks = zip(hidden_ND.split(HEAD_CHUNK), target_N.split(HEAD_CHUNK), strict=True)
        logps_N = torch.cat([checkpoint(self.token_logps, h, t, use_reentrant=False)
                             for h, t in chunks])
        token_logps_BT = logps_N.new_zeros(ids_BT.shape).index_put((row, position), logps_N)
        return token_logps_BT, response_mask_BT

    def token_logps(self, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
        """log softmax(logits)[target], (N,)."""
        return -F.cross_entropy(self.logits(hidden_ND), target_N, reduction="none")


def resolve(name: str) -> Path:
    """A folder as given, or a Hugging Face id (`Qwen/Qwen2.5-0.5B`) fetched into its cache."""
    if Path(name).exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return Path(name)
    from huggingface_hub import snapshot_download  # slow to import
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "model*", "*.jinja"]))
    except Exception as error:  # the library raises many kinds, all of them "could not fetch"
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} is not a folder here, and fetching it failed: {reason}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the one, or those its index lists."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder} holds both {single.name} and {index.name}: remove one")
    try:
        shards = dict(json.loads(index.read_text("utf-8"))["weight_map"]) if index.is_file() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of shards ({error!r}): download it again") from None
    for name in set(shards.values()) or [single.name]:
        if Path(name).name != name:
            raise ValueError(f"{index}: shard {name!r} points outside the folder")
        if not (folder / name).is_file():
            found = "only pickles, which are never loaded: convert them once with transformers' " \
                "save_pretrained" if any(folder.glob("*.bin")) else sorted(os.listdir(folder))[:8]
            raise ValueError(f"{folder} has no {name}, found {found}")
    return sorted({folder / name for name in shards.values()} or {single})


def check_tensors(state: dict[str, Tensor], want: dict[str, Tensor], tied: bool) -> None:
    """ValueError unless `state` holds exactly the tensors of `want`, finite and of their shape."""
    for problem, names in (("are missing from", want.keys() - state.keys()),
                           ("have no place in", state.keys() - want.keys())):
        if names:
            where = "the files" if names <= want.keys() else "the model"
            raise ValueError(f"{len(names)} tensors {problem} {where}, first: {min(names)} "
                             f"(tie_word_embeddings is {tied}; a tied model has no lm_head.weight)")
    for name, tensor in state.items():
        if tensor.shape != want[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, config.json asks for "
                             f"{tuple(want[name].shape)}")
        if not torch.isfinite(torch.stack(tensor.aminmax())).all():
            raise ValueError(f"{name} holds NaN or infinity: the file is damaged")


def load(folder: str | Path, dtype: torch.dtype, device: str | torch.device = "cpu") -> Transformer:
    """The checkpoint in `folder` as a frozen model in `dtype`: memory-mapped, never held twice.

    ValueError names missing, unexpected, misshapen, quantised or non-finite tensors.
    """
    folder = Path(folder)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_folder(folder))
    state, want = {}, model.state_dict()
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118  (safe_open is no dict)
                    tensor = file.get_tensor(name)
                    if name in state:
                        raise ValueError(f"{path}: {name} lies in another shard too")
                    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
                        raise ValueError(f"{path}: {name} is quantised to {tensor.dtype}")
                    state[name] = tensor.to(dtype)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error}): download it "
                             "again, a Git LFS pointer with `git lfs pull`") from None
    state = {n: t for n, t in state.items() if not n.endswith("rotary_emb.inv_freq")}
    tied, twins = model.config.tie_word_embeddings, ("lm_head.weight", "model.embed_tokens.weight")
    if tied and all(n in state for n in twins) and torch.equal(*(state[n] for n in twins)):
        del state["lm_head.weight"]
    check_tensors(state, want, tied)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def save(model: Transformer, folder: str | Path, source: str | Path | None = None) -> None:
    """Writes a Hugging Face folder; `source`, a model folder, lends its tokenizer files.

    config.json is the one that was read plus dtype and both spellings of the rotary keys.
    """
    folder, config = Path(folder), model.config
    with torch.device("meta"):
        names = Transformer(config).state_dict().keys()
    state = {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
    if extra := state.keys() - names:
        raise ValueError(f"{min(extra)} is no tensor of the checkpoint: merge and remove adapters")
    dtype, rope = str(next(iter(state.values())).dtype).split(".")[1], config.rope
    scaling = None if rope["rope_type"] == "default" else rope
    raw = config.raw | {"architectures": [config.model_type.capitalize() + "ForCausalLM"],
                        "dtype": dtype, "torch_dtype": dtype, "rope_parameters": rope,
                        "rope_scaling": scaling, "rope_theta": rope["rope_theta"]}
    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(source).iterdir() if source else ():
        if file.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in file.name:
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
    save_file(state, folder / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")  # may be mapped
