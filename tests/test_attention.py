"""What attention, its cache, its window and its rotary tables promise, in float64."""
import itertools
import math

import pytest
import tiny
import torch
from test_model import LLAMA3, every_family

import backward
import model


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@every_family
@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 1, 3, 1), (1, 7, 1), (3, 6)])
@pytest.mark.parametrize("layers", [1, 2])
def test_extending_in_pieces_is_one_forward_pass(changes, pieces, layers):
    """The cache gives what the whole text gives, window or not, one layer or several.

    Red: model.py:Transformer.extend: `cache[0][0].shape[2] if cache else 0` -> `0`
    Red: model.py:Transformer.extend: `cache[0][0].shape[2]` -> `cache[1][0].shape[2]`
    """
    net = tiny.transformer(**changes | {"num_hidden_layers": layers})
    ids = tiny.batch(((4, 5), (4, 5)))[0]
    cache, parts = None, []
    for piece in ids.split(pieces, 1):
        hidden, cache = net.extend(piece, cache)
        parts.append(hidden)
    torch.testing.assert_close(torch.cat(parts, 1), net(ids), rtol=0, atol=1e-10)


def test_a_query_sees_exactly_window_keys():
    """One layer, window 3: the output at 8 depends on 6, 7, 8 and on nothing before.

    Red: packing.py:attention_mask: `query - (window or keys)` -> `query - (window or keys) - 1`
    """
    net = tiny.transformer(num_hidden_layers=1, sliding_window=3)
    ids, seen = tiny.batch(((4, 5),))[0], []
    before = net(ids)[0, 8]
    for t in range(9):
        other = ids.clone()
        other[0, t] = 3 + (ids[0, t] - 2) % (tiny.V - 3)
        seen.append(bool((net(other)[0, 8] - before).abs().max() > 1e-9))
    assert [t for t in range(9) if seen[t]] == [6, 7, 8]


@pytest.mark.parametrize("window", [None, 3])
def test_attention_is_the_textbook_sum_over_its_keys(window):
    """y_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s, head h on kv head h // 2, in loops.

    Red: model.py:Attention.forward: `y_BHTK.transpose` -> `y_BHTK.flip(1).transpose`
    """
    net = tiny.transformer(num_hidden_layers=1, sliding_window=window)
    layer, x = net.model.layers[0].self_attn, noise(1, 6, tiny.D)
    cos, sin = model.rotary_tables(net.config, torch.arange(6), torch.float64)
    q, k, v = (p(x)[0].view(6, -1, 8) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = (backward.turn(z.transpose(0, 1), cos, sin).transpose(0, 1) for z in (q, k))
    want = torch.zeros(6, 4, 8, dtype=torch.float64)
    for t, h in itertools.product(range(6), range(4)):
        keys = range(max(0, t + 1 - (window or 6)), t + 1)
        scores = torch.stack([q[t, h] @ k[s, h // 2] / math.sqrt(8) for s in keys]).softmax(0)
        want[t, h] = sum(p * v[s, h // 2] for p, s in zip(scores, keys, strict=True))
    got = layer(x, (cos, sin), None)[0][0]
    torch.testing.assert_close(got, layer.o_proj(want.flatten(1)), rtol=0, atol=1e-12)


@every_family
def test_rotary_scores_depend_on_differences_only(changes):
    """q at m against k at n scores as q at m + 17 against k at n + 17.

    Red: backward.py:turn: `value=-1` -> `value=1`
    """
    settings = model.ModelConfig.from_dict(tiny.config(**changes))
    q, k = noise(2, 6, settings.head_dim)
    near, far = (model.rotary_tables(settings, torch.arange(6) + start, torch.float64)
                 for start in (0, 17))
    scores = [backward.turn(q, *t) @ backward.turn(k, *t).T for t in (near, far)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-12)


def naive_frequency(i: int, size: int, rope: dict) -> tuple[str, float]:
    """(band, frequency) of plane i by the definition: three bands of wavelengths."""
    plain = rope["rope_theta"] ** (-2 * i / size)
    if rope["rope_type"] == "linear":
        return "all", plain / rope["factor"]
    trained, wavelength = rope["original_max_position_embeddings"], 2 * math.pi / plain
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    if wavelength < trained / high:
        return "short", plain
    if wavelength > trained / low:
        return "long", plain / rope["factor"]
    smooth = (trained / wavelength - low) / (high - low)
    return "between", (1 - smooth) * plain / rope["factor"] + smooth * plain


@pytest.mark.parametrize("rope, bands", [
    ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, {"all"}),
    (LLAMA3, {"short", "between", "long"})], ids=["linear", "llama3"])
def test_scaled_rotary_tables_are_those_of_the_definition(rope, bands):
    """Plane i and its double i + K/2 turn by position * frequency.

    Red: model.py:rotary_tables: `* (keep + (1 - keep)` -> `* (1 - keep + keep`
    """
    raw = tiny.config("llama", head_dim=32, rope_parameters=rope)
    positions = torch.tensor([0, 1, 5, 90])
    tables = model.rotary_tables(model.ModelConfig.from_dict(raw), positions, torch.float64)
    named = [naive_frequency(i % 16, 32, rope) for i in range(32)]
    want = [[position * frequency for _, frequency in named] for position in positions.tolist()]
    assert {band for band, _ in named} == bands
    for table, function in zip(tables, (torch.cos, torch.sin), strict=True):
        exact = function(torch.tensor(want, dtype=torch.float64))
        torch.testing.assert_close(table, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind, owned", [
    ("qwen2", "q_proj.bias"), ("qwen2", "v_proj.bias"), ("qwen3", "q_norm.weight"),
    ("qwen3", "k_norm.weight")])
def test_qwen_biases_and_head_norms_exist_and_matter(kind, owned):
    """Doubling one changes the output; a mistral has none of them.

    Red: model.py:Attention.__init__: `config.model_type == "qwen2"` -> `False`
    """
    net, ids = tiny.transformer(model_type=kind), tiny.batch()[0]
    before, name = net(ids), f"model.layers.0.self_attn.{owned}"
    net.get_parameter(name).mul_(torch.linspace(1, 3, net.get_parameter(name).numel()))
    assert (net(ids) - before).abs().max() > 1e-3
    assert name not in tiny.transformer().state_dict()


def test_a_bfloat16_norm_is_the_exact_norm_rounded_once():
    """One rounding, of the result: the mean of squares is a float32 sum.

    Red: backward.py:RMSNorm.forward: `dtype=promoted(x)` -> `dtype=x.dtype`
    """
    x = (3 * noise(512)).to(torch.bfloat16)
    exact = x.double() * torch.rsqrt(x.double().square().mean() + 1e-5)
    assert torch.equal(model.RMSNorm(512, 1e-5).to(torch.bfloat16)(x), exact.to(torch.bfloat16))
