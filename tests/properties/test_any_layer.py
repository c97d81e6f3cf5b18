"""Properties of lora.py, packing.py and backward.py over shapes, layouts and numbers."""
import math

import pytest
import test_backward
import test_packing
import tiny
import torch
from anything import batches, noise, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import backward
import lora
import packing
import tokens

small = st.integers(1, 7)
dtypes = st.sampled_from((torch.float32, torch.float64, torch.bfloat16))
NAMES = [n for n, m in tiny.transformer().named_modules() if isinstance(m, nn.Linear)]


@pytest.fixture(scope="module")
def net():
    """A frozen transformer of two layers in float64."""
    return tiny.transformer()


def close(one, other, limit=1e-10):
    torch.testing.assert_close(one, other, rtol=limit, atol=limit)


def layer(seed, i, o, r, dtype=torch.float64, bias=True):
    """A linear layer and one that adapts it, both B and A filled; a scale of its own."""
    base = nn.Linear(i, o, bias=bias, dtype=dtype).requires_grad_(False)
    base.weight.data = noise(seed, o, i, dtype=dtype)
    adapted = lora.LoRALinear(base, r, 0.5 + seed % 3, 0.0)
    adapted.lora_A.data.copy_(noise(seed + 1, r, i))
    adapted.lora_B.data.copy_(noise(seed + 2, o, r))
    return base, adapted


# low-rank adapters


@given(seeds, small, small, small, dtypes, st.booleans())
def test_a_fresh_adapter_of_any_shape_changes_nothing(seed, i, o, r, dtype, bias):
    """B is zero: bit for bit the output without it, in every dtype.
    Red: lora.py:LoRALinear.__init__: `torch.zeros(outputs, r,` -> `torch.ones(outputs, r,`"""
    base, _ = layer(seed, i, o, r, dtype, bias)
    net, x = nn.Sequential(base), noise(seed + 3, 3, i, dtype=dtype)
    before = base(x)
    lora.inject(net, r, 3.0, ("0",), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(net(x), before) and net[0].lora_A.abs().max() <= 1 / math.sqrt(i)
    assert net[0].lora_A.abs().sum() > 0


@given(seeds, small, small, small)
def test_an_adapted_layer_is_its_formula(seed, i, o, r):
    """W x + b + scale B A x; switched off W x + b.
    Red: lora.py:LoRALinear.delta: `self.scale * ` -> ``
    Red: lora.py:LoRALinear.forward: `if not self.enabled or self.merged` -> `if self.merged`"""
    base, adapted = layer(seed, i, o, r)
    x = noise(seed + 3, 4, i)
    update = x @ (adapted.scale * adapted.lora_B @ adapted.lora_A).T
    close(adapted(x), base(x) + update)
    close(adapted.delta(), (adapted.scale * adapted.lora_B @ adapted.lora_A))
    with lora.disabled(nn.Sequential(adapted)):
        assert torch.equal(adapted(x), backward.Linear.apply(x, base.weight, base.bias))


@given(seeds, small, small, small)
def test_merging_is_adding_the_update_and_unmerging_takes_it_away(seed, i, o, r):
    """The output stays, the weight comes back to rounding, and twice is as once.
    Red: lora.py:merge: `if layer.merged == (sign < 0)` -> `if True`
    Red: lora.py:merge: `sign * layer.delta()` -> `layer.delta()`"""
    _, adapted = layer(seed, i, o, r)
    net, x, weight = nn.Sequential(adapted), noise(seed + 3, 4, i), adapted.weight.clone()
    before = net(x)
    for _ in range(2):
        lora.merge(net)
        close(adapted.weight, weight + adapted.delta())
        close(net(x), before)
    for _ in range(2):
        lora.unmerge(net)
        close(adapted.weight, weight)
        close(net(x), before)


@given(seeds, small, small, small)
def test_a_widened_layer_is_the_adapted_one(seed, i, o, r):
    """x' W'^T = W x + scale B A x; switched off or merged it is the weight itself.
    Red: lora.py:LoRALinear.widened: `self.scale * down` -> `down`
    Red: lora.py:LoRALinear.widened: `not self.enabled or self.merged` -> `self.merged`"""
    base, adapted = layer(seed, i, o, r, bias=False)
    x = noise(seed + 3, 4, i)
    wide, weight = adapted.widened(x)
    close(wide @ weight.T, adapted(x))
    adapted.enabled = False
    assert adapted.widened(x)[0] is x and adapted.widened(x)[1] is base.weight


@given(seeds, st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True),
       st.integers(1, 4), st.floats(0.1, 64), st.sampled_from((0.0, 0.5)))
def test_an_adapter_on_any_layers_comes_back_bit_for_bit(
        tmp_path_factory, net, seed, names, r, alpha, dropout):
    """Saved and loaded: the same layers, A, B, scale and dropout, and removed the same base.
    Red: lora.py:load: `layer.lora_A.data.copy_(a)` -> `layer.lora_A.data.copy_(a / 2)`
    Red: lora.py:save: `alphas = {n: layer.scale * ranks[n]` -> `alphas = {n: layer.scale`
    Red: lora.py:save: `if matching(model, parts) == list(layers)` -> `if parts`"""
    lora.inject(net, r, alpha, names, dropout, torch.Generator().manual_seed(seed))
    for i, one in enumerate(lora.adapters(net).values()):
        one.lora_B.data.copy_(noise(seed + i, *one.lora_B.shape))
    folder = tmp_path_factory.getbasetemp() / "any-adapter"
    lora.save(net, folder, "base")
    before = {n: (m.lora_A, m.lora_B, m.scale) for n, m in lora.adapters(net).items()}
    lora.remove(net)
    assert not lora.adapters(net)
    lora.load(net, folder)
    after = lora.adapters(net)
    assert list(after) == [n for n in NAMES if n in names] == list(before)
    for name, (a, b, scale) in before.items():
        assert torch.equal(after[name].lora_A, a) and torch.equal(after[name].lora_B, b)
        assert math.isclose(after[name].scale, scale) and after[name].dropout == dropout
    lora.remove(net)


# packing


@given(batches, st.integers(0, 3), st.data())
def test_neither_padding_nor_neighbours_nor_their_order_change_a_logp(net, found, more, data):
    """Each row of any batch has the log-probs that it has alone, to 1e-9 in float64.
    Red: packing.py:pack: `tuple(ids_BT[row, :first].tolist())` -> `tuple(ids_BT[row, :1].tolist())`
    Red: packing.py:pack: `torch.arange(shared, end)` -> `torch.arange(end - shared)`"""
    order = data.draw(st.permutations(found))
    batch = tokens.collate(order)
    ids, mask = (nn.functional.pad(x, (0, more)) for x in (batch.ids, batch.response_mask))
    logps, _ = net.response_logps(ids, mask)
    for row, e in zip(logps, order, strict=True):
        alone = tokens.collate([e])
        want = net.response_logps(alone.ids, alone.response_mask)[0][0]
        close(row[:len(e.ids)], want, 1e-9)
        assert not row[len(e.ids):].any()


@given(batches)
def test_packed_logps_are_those_of_all_logits(net, found):
    """log softmax of every row's own logits, picked at the next token.
    Red: backward.py:TargetLogps.forward: `gather(-1, target_N` -> `gather(-1, 0 * target_N`"""
    batch = tokens.collate(found)
    close(net.response_logps(batch.ids, batch.response_mask)[0],
          test_packing.plain_logps(net, batch.ids, batch.response_mask), 1e-9)


layouts = st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(0, 5)), min_size=1,
                   max_size=5)


def segmented(layout):
    """(rows, rows, prompt) of segments behind one another, some going on from an earlier one."""
    out, start = [], 0
    for length, goes_on, which in layout:
        first = [s for s in out if s[2] == test_backward.NOTHING]
        prompt = first[which % len(first)][1] if goes_on and first else test_backward.NOTHING
        rows = slice(start, start + length)
        out.append((rows, rows, slice(prompt.start, prompt.stop)))
        start += length
    return out, start


@given(layouts, st.sampled_from((None, 1, 2, 5)), st.sampled_from((1, 2, 4)),
       st.sampled_from((1, 2, 128)), seeds)
def test_attention_over_any_segments_is_attention_one_query_at_a_time(
        layout, window, groups, chunk, seed):
    """Value and gradients, whatever the lengths, prompts, window, groups and chunks.
    Red: backward.py:chunks: `range(0, queries, CHUNK)` -> `range(0, queries, 2 * CHUNK)`
    Red: backward.py:scatter_keys: `total[prompt] +=` -> `total[prompt] =`
    Red: backward.py:probabilities: `seen - count - window` -> `seen - count - window + 1`"""
    segments, total = segmented(layout)
    given_ = [noise(seed + i, total, h, 4).requires_grad_()
              for i, h in enumerate((4, groups, groups))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "CHUNK", chunk)
        found = test_backward.results(test_backward.attention(segments, window), given_)
    close(found, test_backward.results(test_backward.plain_attention(segments, window), given_))


@given(layouts, st.sampled_from((None, 1, 3)), st.sampled_from((1, 2)), seeds)
def test_torchs_kernel_and_ours_see_the_same_keys(layout, window, groups, seed):
    """attend_each, which runs on a GPU, is SegmentAttention, which runs on the CPU.
    Red: packing.py:attention_mask: `(key > query -` -> `(key >= query -`
    Red: packing.py:attend_each: `if prompt.stop > prompt.start` -> `if False`"""
    segments, total = segmented(layout)
    q, k, v = (noise(seed + i, total, h, 4) for i, h in enumerate((4, groups, groups)))
    close(packing.attend_each(q, k, v, segments, window),
          backward.SegmentAttention.apply(q, k, v, segments, window))


# gradients by hand


def both(fast, plain, inputs):
    """Asserts that value and gradients of two functions agree."""
    inputs = [None if x is None else x.requires_grad_() for x in inputs]
    close(test_backward.results(fast, inputs), test_backward.results(plain, inputs))


@given(seeds, small, small, small, small, st.booleans(), st.booleans())
def test_a_linear_layer_of_any_shape_has_autograds_gradients(seed, n, i, o, r, bias, adapter):
    """With and without bias and adapter, of one row or many.
    Red: backward.py:Linear.backward: `.to(b.dtype).mul_(ctx.scale)` -> `.to(b.dtype)`
    Red: backward.py:Linear.forward: `alpha=scale` -> `alpha=1`"""
    shapes = [(n, i), (o, i), (o,) if bias else None, *(((r, i), (o, r)) if adapter else ())]
    both(test_backward.linear, test_backward.plain_linear,
         [None if s is None else noise(seed + k, *s) for k, s in enumerate(shapes)])


@given(seeds, small, st.integers(1, 9), st.floats(1e-5, 1), st.floats(1e-2, 10))
def test_a_norm_of_any_size_has_autograds_gradients(seed, n, d, eps, size):
    """Also of rows near zero, where eps decides.
    Red: backward.py:RMSNorm.backward: `inverse**3` -> `inverse**2`
    Red: backward.py:RMSNorm.forward: `x.shape[-1] + eps` -> `x.shape[-1]`"""
    def plain(x, w):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * w

    both(lambda x, w: backward.RMSNorm.apply(x, w, eps), plain,
         [size * noise(seed, n, d), noise(seed + 1, d)])


@given(seeds, small, small, st.floats(0.01, 100))
def test_swiglu_of_any_numbers_has_autograds_gradients(seed, n, d, size):
    """Red: backward.py:SwiGLU.backward: `share.mul_(gate).mul_(grad)` -> `share.mul_(grad)`"""
    both(backward.SwiGLU.apply, lambda gate, up: gate * torch.sigmoid(gate) * up,
         [size * noise(seed, n, d), noise(seed + 1, n, d)])


@given(seeds, small, small, small)
def test_turning_keeps_every_length_and_turning_back_undoes_it(seed, heads, t, half):
    """A rotation of planes: |y| = |x|, and the opposite angle gives x again.
    Red: backward.py:turn: `value=-1` -> `value=1`
    Red: backward.py:Rotate.backward: `cos, -sin` -> `cos, sin`"""
    angle = noise(seed, t, half).repeat(1, 2)
    x = noise(seed + 1, heads, t, 2 * half).requires_grad_()
    y = backward.Rotate.apply(x, angle.cos(), angle.sin())
    close(y.square().sum(-1), x.square().sum(-1))
    close(backward.Rotate.apply(y, angle.cos(), -angle.sin()), x)
    back, = torch.autograd.grad(y, x, y.detach())
    close(back, x.detach())


@given(seeds, st.integers(1, 6), st.integers(1, 5), st.integers(2, 30), st.integers(1, 90))
def test_target_logps_in_tiles_of_any_size_are_those_at_once(seed, n, d, v, tile):
    """Value, gradient of the hidden states and of a head that trains itself.
    Red: backward.py:TargetLogps.backward: `grad_weight += slope.T` -> `grad_weight = slope.T`
    Red: backward.py:TargetLogps.forward: `out=slope_ND[rows]` -> `out=slope_ND[:len(mean)]`"""
    target = noise(seed + 2, n).mul(1e6).long() % v
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "TILE", tile)
        both(lambda h, w: backward.TargetLogps.apply(h, w, target),
             lambda h, w: (h @ w.T).log_softmax(-1)[torch.arange(n), target],
             [noise(seed, n, d), noise(seed + 1, v, d)])
