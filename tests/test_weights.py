"""What reading and writing model folders promises: all of a checkpoint, or a ValueError."""
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_model import every_family

import lora
import model

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT.parent / "shared/data/models/stories260k"
NAMED = "model.layers.1.mlp.up_proj.weight"


def same(a: model.Transformer, b: model.Transformer) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def written(folder: Path, **changes) -> model.Transformer:
    """A tiny float32 model, saved in `folder`."""
    net = tiny.transformer(dtype=torch.float32, **changes)
    model.save(net, folder)
    return net


def tamper(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replaces, adds or (None) drops one tensor of the single file."""
    state = load_file(folder / "model.safetensors")
    state.pop(name, None)
    (folder / "model.safetensors").unlink()
    save_file(state | ({} if tensor is None else {name: tensor}), folder / "model.safetensors")


def shard(folder: Path) -> None:
    """Turns the single file into two and an index."""
    state, files = load_file(folder / "model.safetensors"), ("a.safetensors", "b.safetensors")
    where = {name: files[i % 2] for i, name in enumerate(state)}
    for file in files:
        save_file({n: t for n, t in state.items() if where[n] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        model.load(folder, torch.float32)
    return str(caught.value)


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_saved_model_loads_back_bit_for_bit(tmp_path, changes, dtype):
    """Weights, config and therefore outputs; the file says its dtype.

    Red: model.py:load: `get_tensor(name).to` -> `get_tensor(name).half().to`
    """
    net, ids = tiny.transformer(dtype=dtype, **changes), tiny.batch()[0]
    model.save(net, tmp_path)
    again = model.load(tmp_path, dtype)
    assert same(net, again) and torch.equal(net(ids), again(ids))
    assert again.config.windows == net.config.windows
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype)[6:]


def test_a_sharded_folder_loads_like_a_single_file(tmp_path):
    """Two shards listed by an index.

    Red: weights.py:headers: `sorted(set(places.values()))` -> `sorted(set(places.values()))[:1]`
    """
    net = written(tmp_path)
    shard(tmp_path)
    assert same(net, model.load(tmp_path, torch.float32))


def test_a_saved_config_is_written_for_readers_old_and_new(tmp_path):
    """Both spellings of the rotary keys and of the dtype, the class that transformers looks for.

    Red: model.py:save: `None if rope["rope_type"] == "default" else rope` -> `rope`
    Red: model.py:save: `capitalize() + kind` -> `capitalize()`
    Red: model.py:save: `"rope_parameters": rope,` -> ``
    Red: model.py:save: `"dtype": dtype, "torch_dtype": dtype` -> `"dtype": dtype`
    Red: model.py:save: `metadata={"format": "pt"}` -> `metadata={}`
    Red: model.py:save: `parents=True, ` -> ``
    """
    model.save(tiny.transformer(dtype=torch.bfloat16), tmp_path / "a/b")
    raw = json.loads((tmp_path / "a/b/config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    wanted = {"architectures": ["MistralForCausalLM"], "dtype": "bfloat16", "rope_scaling": None,
              "torch_dtype": "bfloat16", "rope_theta": 10000.0, "rope_parameters": rope}
    assert raw == tiny.config() | wanted
    with safe_open(tmp_path / "a/b/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name, fetched", [
    ("Qwen/Qwen2.5-0.5B", True), ("folder/that.is-not-there", True), ("one/two/three", False),
    ("here", False), ("../up", False), ("two words/x", False)])
def test_only_an_id_of_the_hub_that_is_no_folder_is_fetched(name, fetched, tmp_path, monkeypatch):
    """Its JSON files, weights and templates; a failure is one sentence.

    Red: model.py:resolve: `Path(name).exists() or ` -> ``
    Red: model.py:resolve: `not re.fullmatch(r` -> `not re.search(r`
    Red: model.py:resolve: `ValueError(f"{name} is` -> `OSError(f"{name} is`
    Red: model.py:resolve: `"model*", ` -> ``
    """
    def fail(*_, allow_patterns):
        raise OSError("no network\nand more")

    monkeypatch.chdir(tmp_path)
    asked, hub = [], "huggingface_hub.snapshot_download"
    monkeypatch.setattr(hub, lambda *given, allow_patterns: asked.append(
        (*given, *allow_patterns)) or str(tmp_path / "cache"))
    assert model.resolve(name) == (tmp_path / "cache" if fetched else Path(name))
    assert asked == [(name, "*.json", "model*", "*.jinja")] * fetched
    monkeypatch.setattr(hub, fail)
    if fetched:
        with pytest.raises(ValueError, match="fetching it failed: no network$"):
            model.resolve(name)
        Path(name).mkdir(parents=True)
        assert model.resolve(name) == Path(name)


def test_a_loaded_model_is_frozen(tmp_path):
    """Nothing in it asks for a gradient.

    Red: model.py:load: `model.requires_grad_(False)` -> `model`
    """
    written(tmp_path)
    assert not any(p.requires_grad for p in model.load(tmp_path, torch.float32).parameters())


TAMPERED = {
    "missing": (NAMED, None, "1 tensors are missing from the files"),
    "extra": ("model.layers.2.mlp.up_proj.weight", torch.ones(24, 16), "have no place in"),
    "misshapen": (NAMED, torch.ones(16, 24), r"shape \(16, 24\).* asks for \(24, 16\)"),
    "nan": (NAMED, torch.full((24, 16), math.nan), "NaN"),
    "infinite": (NAMED, torch.full((24, 16), -math.inf), "infinity"),
    "int8": (NAMED, torch.ones(24, 16, dtype=torch.int8), "quantised"),
    "float8": (NAMED, torch.ones(24, 16).to(torch.float8_e4m3fn), "quantised to F8_E4M3"),
}


@pytest.mark.parametrize("name, tensor, words", TAMPERED.values(), ids=TAMPERED.keys())
def test_a_damaged_tensor_stops_loading_and_is_named(tmp_path, name, tensor, words):
    """Never a random, cast or NaN weight in its place.

    Red: weights.py:check_finite: `not torch.isfinite` -> `torch.isnan`
    """
    written(tmp_path)
    tamper(tmp_path, name, tensor)
    message = refusal(tmp_path)
    assert name in message and re.search(words, message)


def test_rotary_frequencies_of_old_checkpoints_are_ignored(tmp_path):
    """Old Llama files carry `rotary_emb.inv_freq`, which config.json already says.

    Red: model.py:load: ` if not n.endswith("rotary_emb.inv_freq")` -> ``
    """
    net = written(tmp_path)
    tamper(tmp_path, "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))
    assert same(net, model.load(tmp_path, torch.float32))


def lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x")


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def outside_shard(folder: Path) -> None:
    shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("a.safetensors", "../a.safetensors"))


def both_files(folder: Path) -> None:
    shard(folder)
    (folder / "a.safetensors").rename(folder / "model.safetensors")


def lost_shard(folder: Path) -> None:
    shard(folder)
    (folder / "b.safetensors").unlink()


def two_values(folder: Path) -> None:
    shard(folder)
    save_file(load_file(folder / "a.safetensors") | {"model.norm.weight": torch.zeros(16)},
              folder / "a.safetensors")
    save_file(load_file(folder / "b.safetensors") | {"model.norm.weight": torch.ones(16)},
              folder / "b.safetensors")


def broken_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')


def half_a_file(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(data[:len(data) // 2])


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize("damage, words", [
    (lfs_pointer, "git lfs pull"), (only_pickle, "pickles"), (outside_shard, "outside the folder"),
    (both_files, "both"), (lost_shard, "has no b.safetensors"), (two_values, "model.norm.weight"),
    (broken_index, "index.json"), (half_a_file, "no readable safetensors"),
    (no_config, "config.json is missing"), (config_is_a_list, "config.json")])
def test_a_damaged_folder_stops_loading_and_the_file_is_named(tmp_path, damage, words):
    """No pickle is opened, no path leaves the folder, no file silently wins over another.

    Red: weights.py:headers: `Path(shard).name != shard` -> `False`
    """
    written(tmp_path)
    damage(tmp_path)
    assert words in refusal(tmp_path)


def test_a_tied_model_has_no_head_and_accepts_only_an_equal_one(tmp_path):
    """A copy of the embedding may lie in the file; another head means the config lies.

    Red: model.py:load: `torch.equal(*(state[n] for n in twins))` -> `True`
    """
    net = written(tmp_path, tie_word_embeddings=True)
    embedding = net.model.embed_tokens.weight.clone()
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    tamper(tmp_path, "lm_head.weight", embedding)
    assert same(net, model.load(tmp_path, torch.float32))
    tamper(tmp_path, "lm_head.weight", embedding + 1e-3)
    assert "lm_head.weight" in refusal(tmp_path) and "tie_word_embeddings" in refusal(tmp_path)


def test_a_tied_checkpoint_without_its_embedding_is_refused(tmp_path):
    """Even when the head that could stand in for it is there.

    Red: model.py:load: `all(n in state for n in twins)` -> `twins[0] in state`
    """
    net = written(tmp_path, tie_word_embeddings=True)
    tamper(tmp_path, "lm_head.weight", net.model.embed_tokens.weight.clone())
    tamper(tmp_path, "model.embed_tokens.weight", None)
    assert "model.embed_tokens.weight" in refusal(tmp_path)


def test_saving_a_model_with_adapters_is_refused(tmp_path):
    """Their tensors are no part of a checkpoint; nothing is written.

    Red: model.py:save: `state.keys() - names` -> `set()`
    """
    net = tiny.transformer()
    lora.inject(net, 2, 2)
    with pytest.raises(ValueError, match="merge and remove adapters"):
        model.save(net, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_copies_the_tokenizer_but_never_the_old_index(tmp_path):
    """source lends tokenizer.json and the chat template; config.json is the model's own.

    Red: model.py:save: ` and "index" not in file.name` -> ``
    """
    net, source = written(tmp_path / "base"), tmp_path / "base"
    shard(source)
    for name in ("tokenizer.json", "chat_template.jinja", "optimizer.pt"):
        (source / name).write_text("{}")
    (source / "config.json").write_text("{}")
    model.save(net, tmp_path / "new", source)
    assert {f.name for f in (tmp_path / "new").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert same(net, model.load(tmp_path / "new", torch.float32))


WEIGH = """
import re, sys, torch, model
def held():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
model.load(sys.argv[1], torch.bfloat16)  # what importing and the first use cost
before = held()
net = model.load(sys.argv[2], torch.bfloat16)
print((held() - before) / sum(p.nbytes for p in net.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_loaded_weights_stay_in_the_file(tmp_path):
    """200 MB of bfloat16 cost less than 0.3 of their size in memory that is not file cache.

    Red: model.py:load: `get_tensor(name).to(dtype)` -> `get_tensor(name).clone()`
    """
    wide = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 6144, "head_dim": 128,
            "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 3}
    written(tmp_path / "small")
    with torch.device("meta"):
        big = model.Transformer(model.ModelConfig.from_dict(tiny.config(**wide)))
    weights = {n: torch.zeros_like(t, device="cpu") for n, t in big.bfloat16().state_dict().items()}
    big.load_state_dict(weights, assign=True)
    model.save(big, tmp_path / "big")
    command = [sys.executable, "-c", WEIGH, str(tmp_path / "small"), str(tmp_path / "big")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 0.3
