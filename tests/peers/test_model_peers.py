"""Logits against transformers on random models of every family, saved by transformers itself.

Run with transformers installed; `-rP` prints the largest difference of each comparison.
"""
import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import model

STORIES = Path(__file__).resolve().parents[2].parent / "shared/data/models/stories260k"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
SLIDES = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
CASES = {
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-4096": {"model_type": "mistral"},
    "mistral-window": {"model_type": "mistral", "sliding_window": 7, "head_dim": 24},
    "mistral-tied": {"model_type": "mistral", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-slides": {"model_type": "qwen2", "tie_word_embeddings": True} | SLIDES,
    "qwen2-not-sliding": {"model_type": "qwen2"} | SLIDES | {"use_sliding_window": False},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3-128": {"model_type": "qwen3", "rms_norm_eps": 1e-6},
    "qwen3-slides": {"model_type": "qwen3", "head_dim": 32} | SLIDES,
    "llama": {"model_type": "llama"},
    "llama-one-kv-head": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 8},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-linear": {"model_type": "llama", "rope_parameters": LINEAR},
    "llama-llama3": {"model_type": "llama", "rope_parameters": LLAMA3, "head_dim": 32},
}
every_case = pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
SHAPES = ((1, 1), (1, 31), (3, 17), (2, 90))


def near(got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    error = (got - want).abs().max().item()
    print(f"largest difference {error:.1e}, limit {limit:.0e}")
    assert got.shape == want.shape and got.dtype == want.dtype and error <= limit


def ids(shape: tuple[int, int], vocab: int = 97) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(sum(shape)))


def random_peer(folder: Path, **changes) -> None:
    """Writes a random transformers model whose logits have standard deviation 3."""
    config = AutoConfig.for_model(**{
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "eos_token_id": 2, "pad_token_id": None} | changes)
    net = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
        net.model.norm.weight.mul_(3 / net(ids((3, 17))).logits.std())
    net.save_pretrained(folder)


def peer(folder: Path, dtype: torch.dtype | str, attention: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention).eval()


@contextlib.contextmanager
def float64_islands(net: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Inside, what transformers computes in float32 (norms, rotary tables, softmax) is float64."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("float32", "float"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        net.model.rotary_emb = type(net.model.rotary_emb)(net.config)
        yield net


@every_case
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_float32_logits_are_those_of_transformers(tmp_path, changes, attention):
    """Within 1e-4 at standard deviation 3: planted bugs start at 1.2e-3.

    Red: model.py:rotary_tables: `rope["rope_theta"] **` -> `(1.001 * rope["rope_theta"]) **`
    """
    random_peer(tmp_path, **copy.deepcopy(changes))
    theirs, ours = peer(tmp_path, torch.float32, attention), model.load(tmp_path, torch.float32)
    for shape in SHAPES:
        want = theirs(ids(shape), use_cache=False).logits
        assert shape[1] == 1 or 2 < want.std() < 4
        near(ours.logits(ours(ids(shape))), want, 1e-4)


@every_case
@torch.no_grad()
def test_float64_logits_are_those_of_transformers_computed_in_float64(tmp_path, changes):
    """Within 1e-10: one weight off by 1e-6 shows as 1e-8, a wrong epsilon as 1e-4.

    Red: model.py:RMSNorm.forward: `self.eps` -> `1.0001 * self.eps`
    """
    random_peer(tmp_path, **copy.deepcopy(changes))
    ours = model.load(tmp_path, torch.float64)
    with float64_islands(peer(tmp_path, torch.float64, "eager")) as theirs:
        wants = [theirs(ids(shape), use_cache=False).logits for shape in SHAPES]
    for shape, want in zip(SHAPES, wants, strict=True):
        near(ours.logits(ours(ids(shape))), want, 1e-10)


@every_case
@torch.no_grad()
def test_token_logps_are_those_of_transformers(tmp_path, changes):
    """A right-padded batch here against each row alone there, within 5e-5.

    Red: packing.py:pack: `where - 1 - lead` -> `where - lead`
    """
    random_peer(tmp_path, **copy.deepcopy(changes))
    theirs, ours = peer(tmp_path, torch.float32, "sdpa"), model.load(tmp_path, torch.float32)
    text, lengths = ids((3, 40)), torch.tensor([40, 23, 9])
    place = torch.arange(40)
    got, _ = ours.response_logps(text, (place >= 4) & (place < lengths[:, None]))
    for row, length, logps in zip(text, lengths.tolist(), got, strict=True):
        table = theirs(row[None, :length], use_cache=False).logits[0].log_softmax(-1)
        near(logps[4:length], table[3:-1].gather(-1, row[4:length, None]).squeeze(-1), 5e-5)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_folder_written_here_opens_in_transformers(tmp_path, changes, dtype):
    """No tensor missing or left over; dtype, tying and logits are the original's bit for bit.

    Red: model.py:save: `"dtype": dtype, ` -> ``
    """
    random_peer(tmp_path / "theirs", **copy.deepcopy(changes))
    model.save(model.load(tmp_path / "theirs", dtype), tmp_path / "ours")
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto",
                                                          output_loading_info=True)
    assert opened.dtype == dtype and not any(report.values())
    twins = opened.lm_head.weight is opened.model.embed_tokens.weight
    assert twins == changes.get("tie_word_embeddings", False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=dtype)
    assert torch.equal(opened(ids((3, 17))).logits, theirs(ids((3, 17))).logits)


@every_case
@torch.no_grad()
def test_a_config_in_the_old_spelling_reads_the_same(tmp_path, changes):
    """rope_theta and rope_scaling as transformers 4 wrote them.

    Red: architecture.py:rope_parameters: `else "rope_scaling"` -> `else "none"`
    """
    random_peer(tmp_path, **copy.deepcopy(changes))
    new, path = model.load(tmp_path, torch.float64), tmp_path / "config.json"
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": raw.pop("dtype")}
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    path.write_text(json.dumps(raw))
    assert torch.equal(model.load(tmp_path, torch.float64)(ids((2, 90))), new(ids((2, 90))))


@every_case
@torch.no_grad()
def test_cached_steps_are_those_of_transformers(tmp_path, changes):
    """A prefix of 20 tokens, then one at a time past every window, within 1e-4.

    Red: model.py:Transformer.extend: `cache[0][0].shape[2] if cache else 0` -> `0`
    """
    random_peer(tmp_path, **copy.deepcopy(changes))
    theirs, ours = peer(tmp_path, torch.float32, "sdpa"), model.load(tmp_path, torch.float32)
    text, past, cache = ids((2, 40)), None, None
    for piece in text.split([20] + [1] * 20, 1):
        out = theirs(piece, past_key_values=past, use_cache=True)
        hidden, cache = ours.extend(piece, cache)
        past = out.past_key_values
        near(ours.logits(hidden), out.logits, 1e-4)


@pytest.mark.skipif(not STORIES.is_dir(), reason="shared data is not here")
@torch.no_grad()
def test_a_real_model_generates_what_transformers_generates():
    """200 greedy tokens after "<s> Once upon a time", token for token."""
    theirs, ours = peer(STORIES, torch.float32, "sdpa"), model.load(STORIES, torch.float32)
    text = torch.tensor([[1, 403, 407, 261, 378]])
    settings = transformers.GenerationConfig(max_new_tokens=200, do_sample=False, pad_token_id=0)
    want = theirs.generate(text, attention_mask=text > 0, generation_config=settings)
    near(ours.logits(ours(want)), theirs(want).logits, 1e-4)
    while text.shape[1] < 205:
        last = ours.logits(ours(text)[:, -1])
        text = torch.cat((text, last.argmax(-1, keepdim=True)), 1)
    assert torch.equal(text, want)
