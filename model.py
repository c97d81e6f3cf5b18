"""A decoder-only transformer that is Mistral, Qwen2, Qwen3 or Llama by its config.json.

Parameter names are the checkpoint's own, so loading is one strict assignment on a meta-device
model and saving its inverse. `forward` takes rows padded on the right and attention is causal, so
no position sees padding; scoring packs rows (packing.py). Norms, rotary tables and log-probs are
computed in float32 at least, whatever the weights are; a float64 model is float64 throughout.
Letters: B rows, T tokens, V vocabulary, D width, H heads, G kv heads, K head size, N scored tokens.
"""
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import backward
import heads
import strict
import weights
from architecture import ModelConfig
from packing import Packed, Segment, attend, attend_packed, pack, send

ROOM = 128  # positions that a cache gets room for at one time


class Past(NamedTuple):
    """One layer's keys and, behind them, values, (B, 2G, T, K), the start of a `store` whose room
    takes the next. A row begins at position first_B1, all at 0 if that is no tensor."""

    kept: Tensor
    first_B1: Tensor | int = 0
    store: Tensor | None = None

    def grow(self, new: Tensor) -> "Past":
        """With the next ones, (B, 2G, T, K). Copies where no room is left, once in ROOM."""
        start, end, store = self.kept.shape[2], self.kept.shape[2] + new.shape[2], self.store
        if store is None or end > store.shape[2]:
            store = new.new_empty(*new.shape[:2], end + ROOM, new.shape[3])
            store[:, :, :start] = self.kept
        store[:, :, start:end] = new
        return Past(store[:, :, :end], self.first_B1, store)


Cache = list[Past]  # one for each layer


class Embedding(nn.Embedding):
    """A row of the weight per id."""

    def reset_parameters(self) -> None:
        """Draws no numbers on the meta device, which would load a second's worth of imports."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(nn.Linear):
    """y = x W^T + b."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return backward.Linear.apply(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the division in float32 at least."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return backward.RMSNorm.apply(x, self.weight, self.eps)


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


class Attention(nn.Module):
    """Grouped-query attention: biases for qwen2, normed heads for qwen3, a window or none."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        width, size, bias = config.hidden_size, config.head_dim, config.model_type == "qwen2"
        self.window, self.size = window, size
        self.q_proj = Linear(width, config.num_attention_heads * size, bias=bias)
        self.k_proj = Linear(width, config.num_key_value_heads * size, bias=bias)
        self.v_proj = Linear(width, config.num_key_value_heads * size, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * size, width, bias=False)
        if config.model_type == "qwen3":
            self.q_norm = RMSNorm(size, config.rms_norm_eps)
            self.k_norm = RMSNorm(size, config.rms_norm_eps)

    def project(self, x_BTD: Tensor, name: str) -> Tensor:
        """q, k or v of x by head, (B, T, H, K); qwen3 norms queries and keys."""
        x_BTHK = getattr(self, name + "_proj")(x_BTD).unflatten(-1, (-1, self.size))
        return getattr(self, name + "_norm")(x_BTHK) if hasattr(self, name + "_norm") else x_BTHK

    def forward(self, x_BTD: Tensor, tables: tuple, past: Past | None) -> tuple:
        q, k, v = (self.project(x_BTD, name).transpose(1, 2) for name in "qkv")
        q, k = (backward.Rotate.apply(x, *tables) for x in (q, k))
        past = past.grow(torch.cat((k, v), 1)) if past else Past(torch.cat((k, v), 1))
        y_BHTK = attend(q, *past.kept.chunk(2, 1), self.window, past.first_B1)
        return self.o_proj(y_BHTK.transpose(1, 2).flatten(2)), past

    def packed(self, x_1ND: Tensor, tables: tuple, segments: list[Segment],
               kept: Tensor | None) -> Tensor:
        """The same over packed rows; with `kept`, of these tokens' queries only."""
        tables = [t_NK[:, None] for t_NK in tables]
        k, v = backward.Rotate.apply(self.project(x_1ND, "k"), *tables), self.project(x_1ND, "v")
        if kept is not None:
            x_1ND, tables = x_1ND.index_select(1, kept), [t[kept] for t in tables]
        q = backward.Rotate.apply(self.project(x_1ND, "q"), *tables)
        return self.o_proj(attend_packed(q[0], k[0], v[0], segments, self.window).flatten(1)[None])


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(backward.SwiGLU.apply(self.gate_proj(x_BTD), self.up_proj(x_BTD)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); also returns the layer's keys and values."""

    def __init__(self, config: ModelConfig, window: int | None) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config, window), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, tables: tuple, past: tuple | None = None) -> tuple:
        attended, seen = self.self_attn(self.input_layernorm(x_BTD), tables, past)
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), seen

    def packed(self, x_1ND: Tensor, tables: tuple, segments: list[Segment],
               kept: Tensor | None) -> Tensor:
        """The same over packed rows; with `kept`, for these tokens only, (1, M, D)."""
        attended = self.self_attn.packed(self.input_layernorm(x_1ND), tables, segments, kept)
        x_1ND = attended + (x_1ND if kept is None else x_1ND.index_select(1, kept))
        return x_1ND + self.mlp(self.post_attention_layernorm(x_1ND))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what checkpoints call `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, window) for window in config.windows)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


def judges(config: ModelConfig) -> bool:
    """Whether config.json is a reward model's, with one score instead of a next token."""
    return "ForSequenceClassification" in str(config.raw.get("architectures"))


class Transformer(nn.Module):
    """The language model; a tied one has no lm_head and reads its embedding instead."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.model = config, Decoder(config)
        if judges(config):
            heads.attach(self, "score")
        elif not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Hidden states (B, T, D) after the final norm."""
        return self.extend(ids_BT, None)[0]

    def packed(self, packed: Packed, checkpointing: bool) -> Tensor:
        """Hidden states (M, D) of the tokens that predict. Checkpointing keeps one tensor a block
        and runs the block again in backward: the same numbers for less memory."""
        x_1ND, tables = self.embed(packed.ids, packed.positions)
        for i, block in enumerate(self.model.layers):
            last = i + 1 == len(self.model.layers)
            rest = (packed.final, packed.kept) if last else (packed.segments, None)
            x_1ND = (checkpoint(block.packed, x_1ND, tables, *rest, use_reentrant=False)
                     if checkpointing else block.packed(x_1ND, tables, *rest))
        return self.model.norm(x_1ND)[0]

    def extend(self, ids_BT: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Hidden states of T positions behind `cache`, and the longer cache, which replaces it."""
        start, longer = cache[0][0].shape[2] if cache else 0, []
        positions_T = torch.arange(start, start + ids_BT.shape[1], device=ids_BT.device)
        positions_BT = positions_T[None] - (cache[0].first_B1 if cache else 0)
        x_BTD, tables = self.embed(ids_BT, positions_BT.flatten())
        tables = [t.view(*positions_BT.shape, 1, -1).transpose(1, 2) for t in tables]
        for i, block in enumerate(self.model.layers):
            x_BTD, kept = block(x_BTD, tables, cache[i] if cache else None)
            longer.append(kept)
        return self.model.norm(x_BTD), longer

    def embed(self, ids_BT: Tensor, positions_T: Tensor) -> tuple[Tensor, tuple]:
        """Embeddings (B, T, D) and the rotary tables of the positions."""
        x_BTD = self.model.embed_tokens(ids_BT)
        return x_BTD, rotary_tables(self.config, positions_T, x_BTD.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), float32 at least. Only ever call it on the positions you need."""
        tied = self.config.tie_word_embeddings
        logits = F.linear(hidden, self.model.embed_tokens.weight) if tied else self.lm_head(hidden)
        return logits.to(torch.promote_types(hidden.dtype, torch.float32))

    def states(self, ids_BT: Tensor, mask_BT: Tensor, checkpointing: bool) -> tuple[Tensor, Packed]:
        """Hidden states (S, D) that predict the S tokens of the mask, and where those stand.

        Only what they need is run (packing.py).
        """
        packed = pack(ids_BT, mask_BT, self.model.embed_tokens.weight.device)
        return self.packed(packed, checkpointing)[packed.source], packed

    def token_logps(self, hidden_SD: Tensor, target_S: Tensor, temperature: float) -> Tensor:
        """log softmax(logits / temperature) of the targets, (S,): the head runs in tiles."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        hidden_SD = hidden_SD if temperature == 1 else hidden_SD / temperature  # logits are linear
        weight_VD = head.weight
        if hasattr(head, "widened"):  # it is adapted
            hidden_SD, weight_VD = head.widened(hidden_SD)
        return backward.TargetLogps.apply(hidden_SD, weight_VD, target_S)

    def response_logps(
        self, ids_BT: Tensor, response_mask_BT: Tensor, checkpointing: bool = False,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """log pi(y_t | x, y_<t) of every response token: (token_logps, mask), both (B, T).

        Zero outside the mask, float32 at least; pi is the softmax of logits / temperature.
        """
        hidden_SD, packed = self.states(ids_BT, response_mask_BT, checkpointing)
        logps_S = self.token_logps(hidden_SD, packed.target, temperature)
        return spread(logps_S, packed, ids_BT.shape), send(response_mask_BT, hidden_SD.device)

    def response_values(
        self, ids_BT: Tensor, response_mask_BT: Tensor, checkpointing: bool = False,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(token_logps, values, mask), all (B, T): `response_logps`, and what the head `value` says
        before each response token, of (x, y_<t)."""
        hidden_SD, packed = self.states(ids_BT, response_mask_BT, checkpointing)
        parts = self.token_logps(hidden_SD, packed.target, temperature), self.value(hidden_SD)
        return (*(spread(x, packed, ids_BT.shape) for x in parts),
                send(response_mask_BT, hidden_SD.device))

    def end_states(self, ids_BT: Tensor, response_mask_BT: Tensor,
                   checkpointing: bool = False) -> Tensor:
        """The hidden state (B, D) of every row's last response token, which sees all of the row."""
        mask_BT, ids_BT = response_mask_BT.cpu(), F.pad(ids_BT, (0, 1))
        last_B = mask_BT.shape[1] - 1 - mask_BT.flip(1).int().argmax(1)
        behind_BT = F.one_hot(last_B + 1, mask_BT.shape[1] + 1).bool()  # what it would predict
        return self.states(ids_BT, behind_BT, checkpointing)[0]


def spread(x_S: Tensor, packed: Packed, shape: torch.Size) -> Tensor:
    """One number per scored token at its place in (B, T), zero elsewhere."""
    return x_S.new_zeros(shape.numel()).index_put((packed.place,), x_S).view(shape)


def resolve(name: str) -> Path:
    """A folder as given, or a Hugging Face id (`Qwen/Qwen2.5-0.5B`) fetched into its cache."""
    if Path(name).exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return Path(name)
    from huggingface_hub import snapshot_download  # slow to import
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "model*", "*.jinja"]))
    except Exception as error:  # noqa: BLE001  (the library raises many kinds)
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} is not a folder here, and fetching it failed: {reason}") from None


def weight_files(folder: Path) -> list[Path]:
    return sorted(weights.headers(folder))


def check_tensors(state: dict[str, Tensor], want: dict[str, Tensor],
                  found: dict[Path, weights.Header], tied: bool) -> None:
    """ValueError unless `state` holds exactly the tensors of `want`, finite and of their shape."""
    for problem, names in (("are missing from", want.keys() - state.keys()),
                           ("have no place in", state.keys() - want.keys())):
        if names:
            where = "the files" if names <= want.keys() else "the model"
            raise ValueError(f"{min(found).parent}: {len(names)} tensors {problem} {where}, first: "
                             f"{min(names)} (tie_word_embeddings is {tied}; a tied model has no "
                             "lm_head.weight)")
    for name, tensor in state.items():
        path = next(path for path, header in found.items() if name in header)
        if tensor.shape != want[name].shape:
            asks = "a reward model" if name == "score.weight" else "config.json"
            raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, {asks} asks for "
                             f"{tuple(want[name].shape)}")
        weights.check_finite(path, name, tensor)


def load(folder: str | Path, dtype: torch.dtype, device: str | torch.device = "cpu",
         judge: bool = False) -> Transformer:
    """The checkpoint in `folder` as a frozen model in `dtype`: memory-mapped, never held twice.

    A reward model is loaded as a `judge` only. ValueError names missing, unexpected, misshapen,
    quantised or non-finite tensors.
    """
    config, found = ModelConfig.from_folder(folder), weights.headers(Path(folder))
    if judges(config) and not judge:
        raise ValueError(f"{folder} is a reward model, which says no tokens: give it as --reward")
    if config.num_hidden_layers > (held := sum(map(len, found.values()))):
        raise ValueError(f"{Path(folder) / 'config.json'}: num_hidden_layers is "
                         f"{config.num_hidden_layers}, but the files hold {held} tensors in all")
    with torch.device("meta"):
        model = Transformer(config)
    state, want = {}, model.state_dict()
    for path, header in found.items():
        with safe_open(path, "pt", device=str(device)) as file:
            for name in (n for n in header if not n.endswith("rotary_emb.inv_freq")):
                state[name] = file.get_tensor(name).to(dtype)
    tied, twins = config.tie_word_embeddings, ("lm_head.weight", "model.embed_tokens.weight")
    if tied and all(n in state for n in twins) and torch.equal(*(state[n] for n in twins)):
        del state["lm_head.weight"]
    check_tensors(state, want, found, tied)
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
    kind = "ForSequenceClassification" if judges(config) else "ForCausalLM"
    raw = config.raw | {"architectures": [config.model_type.capitalize() + kind],
                        "dtype": dtype, "torch_dtype": dtype, "rope_parameters": rope,
                        "rope_scaling": scaling, "rope_theta": rope["rope_theta"]}
    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(source).iterdir() if source else ():
        wanted = file.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in file.name
        if wanted and strict.exists(file):
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
    save_file(state, folder / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")  # may be mapped
