"""Every hand-written gradient against the plain formula and autograd, in float64.

The plain formula of each function, `FORMULAS`, is the definition; nothing here is a number that
was once observed.
"""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import backward

V, SCALE, EPS = 211, 1.7, 1e-5


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(*shapes: tuple) -> list[Tensor]:
    """Independent noise of these shapes, all of it to be differentiated."""
    return [noise(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def results(function, inputs: list) -> list[Tensor]:
    """The value and the gradients of a weighted sum of it, for the inputs that want one."""
    y = function(*inputs)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    return [y, *torch.autograd.grad((y * noise(*y.shape, seed=99).to(y)).sum(), wanted)]


def agree(one, other, inputs: list) -> None:
    """Asserts equal values and gradients to 1e-10."""
    torch.testing.assert_close(results(one, inputs), results(other, inputs), rtol=0, atol=1e-10)


def target(count: int) -> Tensor:
    return torch.arange(count) * 29 % V


def target_logps(h, w):
    return backward.TargetLogps.apply(h, w, target(len(h)))


def plain_target_logps(h, w):
    return (h @ w.T).log_softmax(-1)[torch.arange(len(h)), target(len(h))]


def linear(x, weight, bias=None, a=None, b=None):
    return backward.Linear.apply(x, weight, bias, a, b, SCALE)


def plain_linear(x, weight, bias=None, a=None, b=None):
    y = x @ weight.T + (0 if bias is None else bias)
    return y if a is None else y + SCALE * (x @ a.T) @ b.T


def rms_norm(x, weight):
    return backward.RMSNorm.apply(x, weight, EPS)


def plain_rms_norm(x, weight):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS) * weight


def plain_swiglu(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def angles(count: int) -> tuple[Tensor, Tensor]:
    """cos and sin of one angle a position and plane, (T, 6), stated twice."""
    angle = noise(count, 3, seed=5).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x):
    return backward.Rotate.apply(x, *angles(x.shape[-2]))


def plain_rotate(x):
    """Plane (i, i + 3) as a complex number times e^(i angle)."""
    cos, sin = (t[:, :3] for t in angles(x.shape[-2]))
    z = torch.complex(x[..., :3], x[..., 3:]) * torch.complex(cos, sin)
    return torch.cat((z.real, z.imag), -1)


NOTHING = slice(0, 0)
# the row, where its tokens stand, and the prompt that it goes on from
SEGMENTS = [(slice(0, 9), slice(0, 9), NOTHING), (slice(9, 14), slice(9, 14), slice(0, 4)),
            (slice(14, 15), slice(14, 15), NOTHING), (slice(15, 16), slice(15, 16), slice(0, 7)),
            (slice(16, 19), slice(16, 19), slice(14, 15)), (slice(19, 21), slice(19, 21), NOTHING),
            (slice(21, 31), slice(21, 31), NOTHING)]
# the same with the queries of the last 3, 5, 1, 1, 2, 2 and 4 tokens only
LAST = [(slice(start, stop), rows, prompt) for (start, stop), (_, rows, prompt) in zip(
    itertools.pairwise((0, 3, 8, 9, 10, 12, 14, 18)), SEGMENTS, strict=True)]


def asked(segments: list) -> int:
    return segments[-1][0].stop


def qkv(segments: list, groups: int, heads: int = 4) -> list[Tensor]:
    """Queries (M, H, 8), keys and values (31, G, 8)."""
    return leaves((asked(segments), heads, 8), (31, groups, 8), (31, groups, 8))


def attention(segments: list, window: int | None):
    return lambda q, k, v: backward.SegmentAttention.apply(q, k, v, segments, window)


def plain_attention(segments: list, window: int | None):
    """softmax(q . k / sqrt(K)) v over the keys that one query may see, a query at a time."""
    def attend(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = []
        for queries, rows, prompt in segments:
            tokens = [*range(prompt.start, prompt.stop), *range(rows.start, rows.stop)]
            for i in range(queries.start, queries.stop):
                seen = tokens[:len(tokens) - (queries.stop - 1 - i)][-(window or 99):]
                scores = torch.einsum("hk,shk->hs", q[i], k[seen]) / math.sqrt(q.shape[-1])
                out.append(torch.einsum("hs,shk->hk", scores.softmax(-1), v[seen]))
        return torch.stack(out)
    return attend


FORMULAS = {
    "TargetLogps": (target_logps, plain_target_logps, [(7, 5), (V, 5)]),
    "Linear": (linear, plain_linear, [(2, 3, 5), (4, 5), (4,), (2, 5), (4, 2)]),
    "RMSNorm": (rms_norm, plain_rms_norm, [(2, 3, 6), (6,)]),
    "RMSNorm of one row": (rms_norm, plain_rms_norm, [(6,), (6,)]),
    "SwiGLU": (backward.SwiGLU.apply, plain_swiglu, [(2, 3, 6), (2, 3, 6)]),
    "Rotate": (rotate, plain_rotate, [(2, 4, 6)]),
    "SegmentAttention": (attention(SEGMENTS, 3), plain_attention(SEGMENTS, 3),
                         [(31, 2, 2), (31, 1, 2), (31, 1, 2)])}
every_function = pytest.mark.parametrize("fast, plain, shapes", FORMULAS.values(),
                                         ids=FORMULAS.keys())


@every_function
def test_every_function_is_its_formula_in_value_and_gradients(fast, plain, shapes):
    """Whatever part of its inputs wants a gradient; the others are given none.

    Red: backward.py:Linear.backward: `grad.sum(0)` -> `grad.mean(0)`
    Red: backward.py:RMSNorm.backward: `inverse**3` -> `inverse**2`
    Red: backward.py:RMSNorm.backward: `.sum_to_size(weight.shape)` -> `.flatten(0, -2).sum(0)`
    Red: backward.py:SwiGLU.backward: `.add_(1)` -> ``
    Red: backward.py:Rotate.backward: `cos, -sin` -> `cos, sin`
    Red: backward.py:TargetLogps.backward: `if weight_VD is not None` -> `if slope_ND is not None`
    """
    inputs = leaves(*shapes)
    for wants in itertools.product((True, False), repeat=len(inputs)):
        given = [x.detach().requires_grad_(want) for x, want in zip(inputs, wants, strict=True)]
        if any(wants):
            agree(fast, plain, given)


@every_function
def test_finite_differences_are_the_gradient(fast, plain, shapes):
    """Along random directions, by torch's gradcheck; `plain` is one of the two differentiated.

    Red: backward.py:SegmentAttention.backward: `.sub_(mean[:, chunk])` -> ``
    Red: backward.py:TargetLogps.forward: `torch.sub(` -> `torch.add(`
    """
    for function in (fast, plain):
        assert torch.autograd.gradcheck(function, leaves(*shapes), fast_mode=True)


@every_function
def test_backward_twice_gives_one_gradient_and_harms_nothing(fast, plain, shapes):
    """A graph that is retained still holds its inputs and its result, bit for bit.

    Red: backward.py:SegmentAttention.backward: `made = torch.empty_like(asked)` -> `pass`
    Red: backward.py:SwiGLU.forward: `F.silu(gate)` -> `F.silu(gate, inplace=True)`
    """
    inputs = leaves(*shapes)
    y, before = fast(*inputs), [x.detach().clone() for x in inputs]
    value, weights = y.detach().clone(), noise(*y.shape, seed=99)
    one, two = (torch.autograd.grad(y, inputs, weights, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))
    torch.testing.assert_close(plain(*before), value, rtol=0, atol=1e-10)
    assert torch.equal(y, value)


@every_function
def test_a_second_derivative_is_refused(fast, plain, shapes):
    """By hand there is a first one only: never a wrong number in silence.

    Red: backward.py:TargetLogps: `@once_differentiable` -> ``
    Red: backward.py:SegmentAttention: `@once_differentiable` -> ``
    """
    for function in (plain, fast):
        inputs = leaves(*shapes)
        y = function(*inputs).square().sum()
        slope = torch.autograd.grad(y, inputs[0], create_graph=True)[0].sum()
        if function is plain:
            slope.backward()
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.backward()


def kept(function, *inputs) -> list:
    """Of each tensor kept for backward, which input it is, or else its shape."""
    saved, places = [], {x.data_ptr(): i for i, x in enumerate(inputs) if torch.is_tensor(x)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = function(*inputs)
    assert y.requires_grad
    return [places.get(t.data_ptr(), tuple(t.shape)) for t in saved]


def test_linear_keeps_its_input_only_for_those_that_need_it():
    """And x A^T of an adapter; of a frozen layer nothing but the weight.

    Red: backward.py:Linear.forward: `x if needed else None` -> `x`
    Red: backward.py:Linear.forward: `weight, a, b, down)` -> `weight, a, b, down, y)`
    """
    x, weight, bias, a, b = leaves((6, 5), (4, 5), (4,), (2, 5), (4, 2))
    frozen = weight.detach(), bias.detach()
    assert kept(linear, x, *frozen) == [1]
    assert kept(linear, x, *frozen, a.detach(), b.detach()) == [1, 3, 4, (6, 2)]
    assert kept(linear, x, *frozen, a, b) == [0, 1, 3, 4, (6, 2)]
    assert kept(linear, x, weight, bias) == [0, 1]


def test_norms_activations_and_rotations_keep_their_inputs_and_a_number_a_row():
    """A rotation keeps the angles, not what it turns.

    Red: backward.py:RMSNorm.forward: `(x, weight, inverse)` -> `(x, weight, x * inverse)`
    Red: backward.py:SwiGLU.forward: `(gate, up)` -> `(F.silu(gate), up)`
    Red: backward.py:Rotate.forward: `(cos, sin)` -> `(cos, sin, x)`
    """
    x, up = leaves((7, 6), (7, 6))
    assert kept(rms_norm, x, up[0].detach()) == [0, 1, (7, 1)]
    assert kept(backward.SwiGLU.apply, x, up) == [0, 1]
    assert kept(backward.Rotate.apply, x, *angles(7)) == [1, 2]


def test_attention_keeps_queries_keys_values_and_its_result():
    """Nothing of tokens x tokens, of however many segments.

    Red: backward.py:SegmentAttention.forward: `(q, k, v, y)` -> `(q, k, v, y, p)`
    """
    assert kept(attention(SEGMENTS, None), *qkv(SEGMENTS, 2)) == [0, 1, 2, (31, 4, 8)]


def test_scores_keep_v_columns_only_of_a_head_that_trains():
    """Of a frozen head one slope a row, D wide; of one that trains the weight, and no logits.

    Red: backward.py:TargetLogps.forward: `ctx.needs_input_grad[1]` -> `True`
    """
    h, w = leaves((7, 5), (V, 5))
    score, where = backward.TargetLogps.apply, target(7)
    assert kept(score, h, w.detach(), where) == [(7, 5)]
    assert kept(score, h, w, where) == [(7, 5), 0, 1, 2]
    assert kept(score, h.detach(), w, where) == [0, 1, 2]


@pytest.mark.parametrize("rows", [1, 5, 7, 19, 1000])
def test_scores_do_not_depend_on_how_many_rows_a_tile_holds(monkeypatch, rows):
    """Log-probs, their slopes and the head's gradient; 19 rows are scored.

    Red: backward.py:tiles: `range(0, count, size)` -> `range(0, count - size + 1, size)`
    Red: backward.py:TargetLogps.backward: `grad_N[rows, None]` -> `grad_N[:len(slope), None]`
    """
    monkeypatch.setattr(backward, "TILE", rows * V + 3)
    agree(target_logps, plain_target_logps, leaves((19, 5), (V, 5)))


@pytest.mark.parametrize("parts", [(0, 1), (0, 1, 2), (0, 1, 3, 4), (0, 1, 2, 3, 4)],
                         ids=["bare", "bias", "adapter", "both"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 9)], ids=str)
def test_linear_is_its_formula_whatever_wants_a_gradient(parts, lead):
    """Of 1-D to 4-D inputs, bias or none, adapter or none, any part of them frozen.

    Red: backward.py:Linear.backward: `if needs_a else None` -> ``
    Red: backward.py:Linear.backward: `if a is not None` -> `if needs_x and a is not None`
    """
    inputs = leaves((*lead, 5), (4, 5), (4,), (2, 5), (4, 2))
    for wants in itertools.product((True, False), repeat=len(parts)):
        given = [None] * 5
        for i, want in zip(parts, wants, strict=True):
            given[i] = inputs[i].detach().requires_grad_(want)
        if any(wants):
            agree(linear, plain_linear, given)


def test_the_gradient_of_a_frozen_part_is_not_worked_out():
    """The node hands back None for it, so a frozen weight never has a .grad.

    Red: backward.py:Linear.backward: `if needs_weight else` -> `if rows is not None else`
    Red: backward.py:RMSNorm.backward: `if ctx.needs_input_grad[1]` -> `if True`
    """
    x, weight, bias, a, b = leaves((6, 5), (4, 5), (4,), (2, 5), (4, 2))
    adapted = linear(x, weight.detach(), bias.detach(), a, b)
    found = [g is not None for g in adapted.grad_fn.apply(torch.ones(6, 4).double())]
    assert found == [True, False, False, True, True, False]
    normed = rms_norm(x, weight[0].detach())
    assert [g is not None for g in normed.grad_fn.apply(noise(6, 5))] == [True, False, False]


@pytest.mark.parametrize("segments", [SEGMENTS, LAST], ids=["all", "last"])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("chunk", [2, 3, 64])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_is_softmax_over_the_keys_of_a_segment(monkeypatch, segments, window, chunk,
                                                         groups):
    """Its own tokens up to the query and the prompt that it goes on from, window or not.

    Red: backward.py:chunks: `start - window + 1)` -> `start - window + 2)`
    Red: backward.py:chunks: `total - queries + stop` -> `stop`
    Red: backward.py:probabilities: `.triu(1)` -> `.triu(2)`
    Red: backward.py:probabilities: `seen - count - window` -> `seen - count - window - 1`
    Red: backward.py:scatter_keys: `total[prompt] += part` -> `total[prompt] = part`
    """
    monkeypatch.setattr(backward, "CHUNK", chunk)
    agree(attention(segments, window), plain_attention(segments, window), qkv(segments, groups))


@pytest.mark.parametrize("segments", [SEGMENTS, LAST], ids=["all", "last"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chunk", [2, 5, 64])
def test_blanks_change_nothing(monkeypatch, segments, window, chunk):
    """Those that bfloat16 asks for, put around float64, where equal means equal to 1e-10.

    Red: backward.py:by_token: `lead:lead + count` -> `:count`
    Red: backward.py:by_group: `0, lead, tail)` -> `0, tail, lead)`
    Red: backward.py:scatter_keys: `shared:shared + own` -> `-own:`
    """
    monkeypatch.setattr(backward, "CHUNK", chunk)
    want, blanks = results(attention(segments, window), qkv(segments, 2)), backward.blanks
    monkeypatch.setattr(backward, "blanks", lambda segment, _: blanks(segment, torch.bfloat16))
    got = results(attention(segments, window), qkv(segments, 2))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("segments", [SEGMENTS, LAST], ids=["all", "last"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("groups", [2, 1])
def test_attention_in_bfloat16_is_the_exact_one_to_two_percent(segments, window, groups):
    """Of its largest number: value and gradients, of inputs that are bfloat16 themselves.

    Red: backward.py:SegmentAttention.backward: `.mul_(p).to(q.dtype)` -> `.to(q.dtype)`
    """
    short = [x.detach().bfloat16().requires_grad_() for x in qkv(segments, groups)]
    exact = [x.detach().double().requires_grad_() for x in short]
    got = results(attention(segments, window), short)
    want = results(plain_attention(segments, window), exact)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).abs().max() <= 0.02 * b.abs().max()


def shapes_met(monkeypatch, segments: list, window: int | None, dtype: torch.dtype) -> list:
    """(queries, keys) of every product of attention, forward and backward."""
    met, probabilities = [], backward.probabilities

    def spy(asked, keys, heads, window):
        met.append((asked.shape[1] // heads, keys.shape[1]))
        return probabilities(asked, keys, heads, window)

    monkeypatch.setattr(backward, "probabilities", spy)
    inputs = [x.detach().to(dtype).requires_grad_() for x in qkv(segments, 2)]
    results(attention(segments, window), inputs)
    return met


def test_a_chunk_meets_only_keys_that_one_of_its_queries_may_see(monkeypatch):
    """All before it; with a window those of the window, up to a multiple of CHUNK: forward 7 + 2.

    Red: backward.py:chunks: `if window else 0` -> `if 0 else 0`
    """
    monkeypatch.setattr(backward, "CHUNK", 4)
    rows = slice(0, 18)
    full = shapes_met(monkeypatch, [(rows, rows, NOTHING)], None, torch.float64)
    assert full == 2 * [(4, 4), (4, 8), (4, 12), (4, 16), (2, 18)]
    near = shapes_met(monkeypatch, [(rows, rows, NOTHING)], 3, torch.float64)
    assert near == 2 * [(4, 4), (4, 8), (4, 8), (4, 8), (2, 6)]


@pytest.mark.parametrize("segments", [SEGMENTS, LAST], ids=["all", "last"])
@pytest.mark.parametrize("window", [None, 3])
def test_in_bfloat16_every_product_has_a_multiple_of_chunk_rows(monkeypatch, segments, window):
    """CHUNK queries and a multiple of CHUNK keys: few shapes for oneDNN to prepare and to keep.

    Red: backward.py:blanks: `-(prompt + rows) % step` -> `0`
    """
    monkeypatch.setattr(backward, "CHUNK", 4)
    met = shapes_met(monkeypatch, segments, window, torch.bfloat16)
    assert met and all(q == 4 and k % 4 == 0 for q, k in met)


@pytest.mark.parametrize("rows, inputs, outputs",
                         [(1, 7, 5), (15, 33, 9), (16, 33, 9), (17, 1, 1), (40, 128, 64)])
def test_a_float32_product_is_exact_to_rounding_and_the_same_twice(rows, inputs, outputs):
    """|error| <= gamma_(I + 1) (|x| |W|^T + |b|), gamma_n = n u / (1 - n u), u = 2^-24, however
    x and W lie in memory; and bit for bit the same a second time.

    Red: backward.py:product: `bias, "none"` -> `None, "none"`
    """
    x, weight, bias = (noise(*shape, seed=i).float() for i, shape in enumerate(
        ((rows, inputs), (outputs, inputs), (outputs,))))
    roundoff = (inputs + 1) * 2**-24 / (1 - (inputs + 1) * 2**-24)
    layouts = [x, x.T.contiguous().T, x.repeat(1, 2)[:, :inputs], x[:1].expand(rows, -1)]
    weights = weight, weight.T.contiguous().T
    for x, w, b in itertools.product(layouts, weights, (None, bias)):
        wide = [t.double() for t in (x, w, torch.zeros(outputs) if b is None else b)]
        exact, most = F.linear(*wide), F.linear(*(t.abs() for t in wide))
        y = backward.product(x, w, b)
        assert (y - exact).abs().le(roundoff * most).all()
        assert torch.equal(backward.product(x, w, b), y)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("rows, dtype, plain", [
    (15, torch.float32, 1), (16, torch.float32, 0), (16, torch.float64, 1),
    (16, torch.bfloat16, 1)])
def test_sixteen_rows_of_float32_and_nothing_else_go_by_onednn(rows, dtype, plain, monkeypatch):
    """The product is the same to rounding either way.

    Red: backward.py:product: `len(x) < 16` -> `len(x) <= 16`
    Red: backward.py:product: `x.dtype != torch.float32` -> `x.dtype == torch.float64`
    Red: backward.py:product: `or not torch.backends` -> `or torch.backends`
    """
    called, real = [], F.linear
    monkeypatch.setattr(backward.F, "linear", lambda *given: called.append(1) or real(*given))
    x, weight = noise(rows, 4).to(dtype), noise(3, 4, seed=1).to(dtype)
    torch.testing.assert_close(backward.product(x, weight), x @ weight.T)
    assert len(called) == plain
