"""Properties of what is read from disk: a folder damaged anywhere is read or refused, never more.

"Refused" is a ValueError; every other exception fails the property.
"""
import json
import math
import shutil

import folder
import pytest
import tiny
import torch
from anything import seeds, texts, values
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_weights import same

import architecture
import lora
import model
import peft_folder

numbers = st.one_of(st.integers(-2, 40), st.floats(), st.booleans(), st.none(), texts, values)
KEYS = sorted({*tiny.config(), "rope_scaling", "rope_parameters", "layer_types", "eos",
               "max_window_layers", "use_sliding_window", "quantization_config",
               "attention_bias", "partial_rotary_factor"})
ropes = st.fixed_dictionaries({}, optional={
    "rope_type": st.sampled_from(("default", "linear", "llama3", "yarn")), "type": texts,
    "rope_theta": numbers, "factor": numbers, "low_freq_factor": numbers,
    "high_freq_factor": numbers, "original_max_position_embeddings": numbers})
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "num_attention_heads")
LAYERS = ("full_attention", "sliding_attention", "x", 3)
changes = st.one_of(
    st.dictionaries(st.sampled_from(SIZES), st.integers(-2, 9) | st.floats(0.5, 9) | texts |
                    st.booleans(), min_size=1, max_size=2),
    st.fixed_dictionaries({"rms_norm_eps": st.floats() | numbers}),
    st.fixed_dictionaries({"rope_theta": st.floats() | numbers}),
    st.fixed_dictionaries({"rope_parameters": ropes | values}),
    st.fixed_dictionaries({"sliding_window": numbers, "layer_types": st.lists(
        st.sampled_from(LAYERS), max_size=3)}),
    st.dictionaries(st.sampled_from(KEYS), numbers | ropes, max_size=3))
kinds = st.sampled_from(architecture.SUPPORTED)
damages = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.just(b"\xff" * 8) |
                             st.binary(min_size=1, max_size=4)),
                   min_size=1, max_size=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that holds base/, adapter/, and their tensor files once more as they were."""
    top = tmp_path_factory.mktemp("any")
    base = folder.write_model(top / "base")
    net = model.load(base, torch.float32)
    lora.inject(net, 2, 4.0, ("q_proj", "up_proj"), generator=torch.Generator().manual_seed(0))
    lora.save(net, top / "adapter", "base")
    shutil.copy(base / "model.safetensors", top / "base.whole")
    shutil.copy(top / "adapter/adapter_model.safetensors", top / "adapter.whole")
    return top


def refused(function, *given_):
    """The result, or the ValueError in its place."""
    try:
        return function(*given_)
    except ValueError as error:
        return error


def damaged(content: bytes, places: list, header: bool) -> bytes:
    """Bytes overwritten, anywhere or in the header alone."""
    out = bytearray(content)
    limit = 8 + int.from_bytes(content[:8], "little") if header else len(content)
    for share, new in places:
        at = int(share * limit)
        out[at:at + len(new)] = new[:len(out) - at]
    return bytes(out)


def write_aside(path, content: bytes) -> None:
    """Replaces a file that may be mapped: the old one stays whole for those who hold it."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


@given(kinds, changes)
def test_any_config_is_an_architecture_or_refused(kind, changed):
    """What is accepted holds only numbers that a model can have.
    Red: bounds.py:whole: `type(value) is not int or not 0` -> `not 0`
    Red: architecture.py:ModelConfig.from_dict: `raw.get("rms_norm_eps"), 1)` -> `raw.get(""), 9)`
    Red: architecture.py:rope_parameters: `bounds.positive(key, rope.get(key), 1e30)` -> `pass`"""
    raw = tiny.config(kind) | changed
    try:
        found = architecture.ModelConfig.from_dict(raw)
    except ValueError:
        return
    assert all(type(n) is int and n > 0 for n in (
        found.vocab_size, found.hidden_size, found.num_hidden_layers, found.head_dim))
    assert found.num_attention_heads % found.num_key_value_heads == found.head_dim % 2 == 0
    assert 0 < found.rms_norm_eps < 1 and 0 < found.rope["rope_theta"] < math.inf
    assert len(found.windows) == found.num_hidden_layers
    assert all(w is None or type(w) is int and w > 0 for w in found.windows)


@given(st.one_of(changes.map(lambda c: json.dumps(tiny.config() | c).encode()),
                 values.map(lambda v: json.dumps(v).encode()), st.binary(max_size=9)))
def test_any_config_file_is_read_or_refused_by_its_path(tmp_path_factory, content):
    """Whatever its bytes.
    Red: strict.py:read_text: `except UnicodeDecodeError as` -> `except KeyError as`
    Red: architecture.py:ModelConfig.from_folder: `f"{path}: {error}"` -> `f"{error}"`"""
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_bytes(content)
    found = refused(architecture.ModelConfig.from_folder, path.parent)
    assert isinstance(found, architecture.ModelConfig) or str(found).startswith(f"{path}")


@given(changes)
def test_a_model_folder_with_another_config_is_loaded_or_refused(saved, changed):
    """Sizes that do not fit the tensors are refused before anything is computed.
    Red: model.py:check_tensors: `if tensor.shape !=` -> `if (1,) ==`"""
    path = saved / "base" / "config.json"
    before = path.read_text("utf-8")
    raw = json.loads(before)
    try:
        path.write_text(json.dumps(raw | changed), "utf-8")
        found = refused(model.load, saved / "base", torch.float32)
    finally:
        path.write_text(before, "utf-8")
    if isinstance(found, model.Transformer):
        assert found.config.hidden_size == raw["hidden_size"]
        assert found.config.vocab_size == raw["vocab_size"]
        assert found.model.layers[0].mlp.up_proj.weight.shape == (24, 16)


@given(damages, st.booleans())
def test_a_weights_file_damaged_anywhere_gives_finite_weights_or_is_refused(saved, places, header):
    """A flipped byte of a number cannot be seen; NaN, infinity and a broken header are.
    Red: weights.py:span: `or entry.keys() != keys` -> ``
    Red: weights.py:check_finite: `not torch.isfinite(` -> `False and torch.isfinite(`"""
    path = saved / "base" / "model.safetensors"
    whole = (saved / "base.whole").read_bytes()
    write_aside(path, damaged(whole, places, header))
    found = refused(model.load, saved / "base", torch.float32)
    write_aside(path, whole)
    assert isinstance(found, ValueError) or all(p.isfinite().all() for p in found.parameters())


@given(st.floats(0, 1, exclude_max=True))
def test_a_weights_file_cut_anywhere_is_refused(saved, share):
    """Even by its last byte.
    Red: weights.py:header: `) != size - 8 - length` -> `) > 2**62`"""
    path = saved / "base" / "model.safetensors"
    whole = (saved / "base.whole").read_bytes()
    write_aside(path, whole[:int(share * len(whole))])
    found = refused(model.load, saved / "base", torch.float32)
    write_aside(path, whole)
    assert isinstance(found, ValueError) and str(path) in str(found)


shards = st.one_of(st.sampled_from(("a.safetensors", "../a.safetensors", "/etc/passwd", "", ".")),
                   values)
indexes = st.one_of(values, st.dictionaries(texts | st.just("w"), shards, max_size=3).map(
    lambda m: {"weight_map": m}), st.fixed_dictionaries({"weight_map": values}),
    shards.map(lambda shard: {"weight_map": {"w": shard}}))


@given(indexes)
def test_any_index_names_files_of_its_folder_or_is_refused(tmp_path_factory, index):
    """No shard lies outside; what is no index is refused.
    Red: weights.py:headers: `Path(shard).name != shard` -> `False`
    Red: weights.py:headers: `type(shard) is not str or` -> ``"""
    here = tmp_path_factory.getbasetemp() / "sharded"
    here.mkdir(exist_ok=True)
    for path in (here, here.parent):
        save_file({"w": torch.ones(1)}, path / "a.safetensors")
    (here / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    found = refused(model.weight_files, here)
    assert isinstance(found, ValueError) or found == [here / "a.safetensors"]


@given(damages, st.booleans())
def test_an_adapter_file_damaged_anywhere_is_finite_pairs_or_refused(saved, places, header):
    """Of matching rank, with a scale that is a number.
    Red: weights.py:span: `or entry.keys() != keys` -> ``
    Red: peft_folder.py:read: `tensor.float())` -> `torch.ones(1))`"""
    path = saved / "adapter" / "adapter_model.safetensors"
    whole = (saved / "adapter.whole").read_bytes()
    write_aside(path, damaged(whole, places, header))
    found = refused(peft_folder.read, saved / "adapter")
    write_aside(path, whole)
    if not isinstance(found, ValueError):
        for a, b, scale in found[1].values():
            assert a.isfinite().all() and b.isfinite().all() and math.isfinite(scale)
            assert len(a) == b.shape[1] == 2


@given(st.dictionaries(st.sampled_from((
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "peft_type",
    "use_dora", "modules_to_save", "init_lora_weights")), numbers, min_size=1, max_size=2))
def test_any_adapter_config_is_plain_lora_or_refused(saved, changed):
    """Whatever its values, the scale is a finite number and r the rank of the tensors.
    Red: peft_folder.py:read: `a.shape[:-1] + b.shape[1:] != (r, r)` -> `False`
    Red: peft_config.py:read: `in config.keys() - PLAIN` -> `in ()`
    Red: peft_config.py:patterns: `if type(given) is not dict` -> `if False`"""
    path = saved / "adapter" / "adapter_config.json"
    before = path.read_text("utf-8")
    try:
        path.write_text(json.dumps(json.loads(before) | changed), "utf-8")
        found = refused(peft_folder.read, saved / "adapter")
    finally:
        path.write_text(before, "utf-8")
    if not isinstance(found, ValueError):
        assert all(math.isfinite(scale) for _, _, scale in found[1].values())
        assert found[0]["r"] == 2 and not found[0].get("use_dora")


shapes = st.fixed_dictionaries({
    "model_type": kinds, "head_dim": st.sampled_from((2, 4, 6)), "vocab_size": st.integers(2, 9),
    "num_hidden_layers": st.integers(1, 3), "intermediate_size": st.integers(1, 9),
    "hidden_size": st.integers(1, 9), "tie_word_embeddings": st.booleans(),
    "num_key_value_heads": st.sampled_from((1, 2, 4)),
    "sliding_window": st.sampled_from((None, 2))})


@given(shapes, seeds, st.sampled_from((torch.float32, torch.bfloat16, torch.float64)))
def test_a_model_of_any_shape_comes_back_bit_for_bit(tmp_path_factory, shape, seed, dtype):
    """Every family, tied or not, in every dtype: its names, weights and windows; its outputs.
    Red: model.py:load: `(name).to(dtype)` -> `(name).half().to(dtype)`
    Red: model.py:save: `raw = config.raw | {` -> `raw = {`"""
    net = tiny.transformer(seed, dtype, **shape)
    out = tmp_path_factory.getbasetemp() / "shape"
    model.save(net, out)
    again, ids = model.load(out, dtype), torch.arange(5)[None] % shape["vocab_size"]
    assert same(net, again) and again.config.windows == net.config.windows
    limit = 1e-12 if dtype == torch.float64 else 0.05  # tensors of a file may lie unaligned
    torch.testing.assert_close(net(ids), again(ids), rtol=limit, atol=limit)


@given(shapes, ropes, st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_rotary_tables_are_points_of_the_unit_circle(shape, rope, positions):
    """cos^2 + sin^2 = 1 for every accepted kind of scaling, stated twice along the head.
    Red: model.py:rotary_tables: `.repeat(1, 2)` -> `.repeat(1, 2) * torch.arange(2.0)[0]`
    Red: model.py:rotary_tables: `angles.sin()` -> `angles.cos()`"""
    raw = tiny.config(**shape) | {"rope_parameters": {"rope_theta": 1e4} | rope}
    try:
        found = architecture.ModelConfig.from_dict(raw)
    except ValueError:
        return
    cos, sin = model.rotary_tables(found, torch.tensor(positions), torch.float64)
    half = cos.shape[1] // 2
    assert cos.shape == sin.shape == (len(positions), shape["head_dim"])
    assert torch.equal(cos[:, :half], cos[:, half:])
    if cos.isfinite().all():
        torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))
