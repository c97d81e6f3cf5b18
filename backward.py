"""Functions whose gradient is written by hand, where autograd would keep or copy too much.

Each is checked against plain autograd in float64; none can be differentiated twice.
Letters: N tokens, D width, V vocabulary.
"""
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 128  # queries whose attention is computed at one time
TILE = 1 << 22  # logits that exist at one time: 16 MiB of float32


class TargetLogps(torch.autograd.Function):
    """log softmax(h W^T)[target], (N,), as many rows at a time as TILE logits hold.

    d logp / dh = W[target] - softmax(h W^T) W does not depend on the loss, which only scales it:
    it is worked out while the logits exist, so that none is kept or computed again. Only a head
    that trains itself computes them once more.
    """

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        slope_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        logps_N = hidden_ND.new_empty(len(target_N), dtype=promoted(hidden_ND))
        for rows in tiles(hidden_ND, len(weight_VD)):
            logp = log_softmax(hidden_ND[rows], weight_VD)
            logps_N[rows] = logp.gather(-1, target_N[rows, None])[:, 0]
            if slope_ND is not None:
                mean = product(logp.exp_().to(weight_VD.dtype), weight_VD.T)
                torch.sub(weight_VD[target_N[rows]], mean, out=slope_ND[rows])
        kept = (hidden_ND, weight_VD, target_N) if ctx.needs_input_grad[1] else (None,) * 3
        ctx.save_for_backward(slope_ND, *kept)
        return logps_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor) -> tuple:
        slope_ND, hidden_ND, weight_VD, target_N = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if slope_ND is not None:
            grad_hidden = slope_ND * grad_N.to(slope_ND.dtype)[:, None]
        if weight_VD is not None:
            grad_weight = torch.zeros_like(weight_VD, dtype=promoted(weight_VD))
            for rows in tiles(hidden_ND, len(weight_VD)):
                slope = log_softmax(hidden_ND[rows], weight_VD).exp_().neg_()
                slope.scatter_add_(-1, target_N[rows, None], torch.ones_like(slope[:, :1]))
                slope = (slope * grad_N[rows, None]).to(weight_VD.dtype)
                grad_weight += slope.T @ hidden_ND[rows]
            grad_weight = grad_weight.to(weight_VD.dtype)
        return grad_hidden, grad_weight, None


def tiles(hidden_ND: Tensor, vocabulary: int) -> Iterator[slice]:
    """Slices of the N rows whose logits are at most TILE numbers, or one row; 32 times as many on
    a GPU, where the head is read anew for each."""
    count, cpu = len(hidden_ND), hidden_ND.device.type == "cpu"
    size = max(1, TILE * (1 if cpu else 32) // vocabulary)
    return (slice(start, start + size) for start in range(0, count, size))


def log_softmax(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """Of the logits, (N, V), in float32 at least."""
    return product(hidden_ND, weight_VD).to(promoted(hidden_ND)).log_softmax(-1)


def promoted(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class Linear(torch.autograd.Function):
    """y = x W^T + b and, with an adapter, + scale (x A^T) B^T, multiplied in the dtype of x.

    Keeps x, which neighbouring layers share, and x A^T, R columns wide; of a frozen layer without
    an adapter nothing but its weight.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None = None,
                b: Tensor | None = None, scale: float = 1.0) -> Tensor:
        rows, down = x.reshape(-1, x.shape[-1]), None
        y = product(rows, weight, bias)
        if a is not None:
            down = rows @ a.to(x.dtype).T
            y.addmm_(down, b.to(x.dtype).T, alpha=scale)
        needed = any(ctx.needs_input_grad[1:5])
        ctx.save_for_backward(x if needed else None, weight, a, b, down)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight, a, b, down = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_x = product(grad, weight.T) if needs_x else None
        grad_weight = grad.T @ rows if needs_weight else None
        grad_bias = grad.sum(0) if needs_bias else None
        grad_a = grad_b = None
        if a is not None:
            grad_down = (grad @ b.to(grad.dtype)).mul_(ctx.scale)
            needs_a, needs_b = ctx.needs_input_grad[3:5]
            grad_a = (grad_down.T @ rows).to(a.dtype) if needs_a else None
            grad_b = (grad.T @ down).to(b.dtype).mul_(ctx.scale) if needs_b else None
            if needs_x:
                grad_x.addmm_(grad_down, a.to(grad.dtype))
        grad_x = grad_x.view(ctx.shape) if needs_x else None
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. In float32 on the CPU by oneDNN, which torch calls for bfloat16 only: its MKL
    leaves half of an AMD core idle. Of few rows, or without oneDNN, by torch's own choice."""
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or len(x) < 16
    plain |= torch.compiler.is_compiling()
    if plain or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class RMSNorm(torch.autograd.Function):
    """y = x / rms(x) * w, in float32 at least.   Keeps x and one number a row.

    With n = x / rms(x) and h = w * dL/dy, dL/dx = (h - n mean(h * n)) / rms(x).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=promoted(x))
        inverse = (norm.square_() / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight, inverse = ctx.saved_tensors
        slope = (grad * weight).to(inverse.dtype)
        mean = (slope * x).mean(-1, keepdim=True)
        slope = slope.mul_(inverse).addcmul_(x.to(slope.dtype), mean.mul_(inverse**3), value=-1)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (x * inverse)).sum_to_size(weight.shape).to(weight.dtype)
        return slope.to(x.dtype), grad_weight, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up.   Keeps gate and up."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        share = torch.sigmoid(gate)
        slope = (1 - share).mul_(gate).add_(1).mul_(share).mul_(up).mul_(grad)
        return slope, share.mul_(gate).mul_(grad)


class Rotate(torch.autograd.Function):
    """Turns the plane (i, i + K/2) of each head by its angle: the half-split layout.

    The gradient is turned back by the same angle.
    """

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, -sin), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y, half = x * cos, x.shape[-1] // 2
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


class SegmentAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(K)) v within segments (see packing.py), CHUNK queries at a time.

    A chunk meets only the keys it may see, and its probabilities P are computed again in backward:
    nothing of size tokens x tokens is kept. With g the gradient of y and s = q / sqrt(K),
    dV = P^T g, dS = P * (g V^T - sum(g * y)), dQ = dS K / sqrt(K), dK = dS^T s.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, segments: list, window: int | None) -> Tensor:
        y, groups, heads = torch.empty_like(q), k.shape[1], q.shape[1] // k.shape[1]
        for segment in segments:
            asked = by_group(q, segment, groups) * q.shape[-1]**-0.5
            keys, values, made = by_key(k, segment), by_key(v, segment), torch.empty_like(asked)
            for chunk, seen in chunks(asked, keys, heads, window):
                p = probabilities(asked[:, chunk], keys[:, seen], heads, window)
                made[:, chunk] = torch.bmm(p, values[:, seen])
            y[segment[0]] = by_token(made, segment)
        ctx.save_for_backward(q, k, v, y)
        ctx.segments, ctx.window = segments, window
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        q, k, v, y = ctx.saved_tensors
        wide, scale = promoted(q), q.shape[-1]**-0.5
        groups, heads = k.shape[1], q.shape[1] // k.shape[1]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for segment in ctx.segments:
            asked, g, made = (by_group(x, segment, groups) for x in (q, grad, y))
            keys, values = by_key(k, segment), by_key(v, segment)
            asked, mean = asked * scale, (g * made).sum(-1, keepdim=True, dtype=wide)
            made = torch.empty_like(asked)  # the gradient of `asked` from here on
            slope_k, slope_v = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
            for chunk, seen in chunks(asked, keys, heads, ctx.window):
                p = probabilities(asked[:, chunk], keys[:, seen], heads, ctx.window)
                slope_v[:, seen] += torch.bmm(p.transpose(1, 2), g[:, chunk])
                ds = torch.bmm(g[:, chunk], values[:, seen].transpose(1, 2)).to(wide)
                ds = ds.sub_(mean[:, chunk]).mul_(p).to(q.dtype)
                slope_k[:, seen] += torch.bmm(ds.transpose(1, 2), asked[:, chunk])
                made[:, chunk] = torch.bmm(ds, keys[:, seen])
            dq[segment[0]] = by_token(made.mul_(scale), segment)
            scatter_keys(dk, slope_k, segment)
            scatter_keys(dv, slope_v, segment)
        return dq, dk, dv, None, None


def blanks(segment: tuple, dtype: torch.dtype) -> tuple[int, int]:
    """How many blank queries stand before a segment's own, and blank queries and keys behind.

    In bfloat16 they give every chunk CHUNK queries and a multiple of CHUNK keys: there a product
    of a new shape costs a millisecond and half a MiB, both oneDNN's. Elsewhere there are none.
    """
    queries, rows, prompt = (s.stop - s.start for s in segment)
    step = CHUNK if dtype == torch.bfloat16 else 1
    return (prompt + rows - queries) % step, -(prompt + rows) % step


def by_group(x: Tensor, segment: tuple, groups: int) -> Tensor:
    """A segment's part of (M, H, K) as (G, queries * R, K): R heads that share keys together."""
    lead, tail = blanks(segment, x.dtype)
    x = F.pad(x[segment[0]], (0, 0, 0, 0, lead, tail)) if lead or tail else x[segment[0]]
    return x.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)


def by_token(x: Tensor, segment: tuple) -> Tensor:
    """`by_group` undone: (queries, H, K)."""
    lead, tail = blanks(segment, x.dtype)
    count = segment[0].stop - segment[0].start
    x = x.unflatten(1, (lead + count + tail, -1))[:, lead:lead + count]
    return x.transpose(0, 1).flatten(1, 2)


def by_key(x: Tensor, segment: tuple) -> Tensor:
    """A segment's keys or values behind those of the prompt it goes on from, (G, keys, K)."""
    _, rows, prompt = segment
    tail = blanks(segment, x.dtype)[1]
    x = torch.cat((x[prompt], x[rows])) if prompt.stop > prompt.start else x[rows]
    return (F.pad(x, (0, 0, 0, 0, 0, tail)) if tail else x).transpose(0, 1)


def scatter_keys(total: Tensor, part: Tensor, segment: tuple) -> None:
    """Adds what `by_key` spread out, (G, keys, K), back to all tokens, (N, G, K)."""
    _, rows, prompt = segment
    shared, own = prompt.stop - prompt.start, rows.stop - rows.start
    total[prompt] += part[:, :shared].transpose(0, 1)
    total[rows] += part[:, shared:shared + own].transpose(0, 1)


def chunks(asked: Tensor, keys: Tensor, heads: int, window: int | None) -> Iterator[tuple]:
    """(the slice of a chunk's queries, the slice of the keys that they may see)."""
    queries, total = asked.shape[1] // heads, keys.shape[1]
    for start in range(0, queries, CHUNK):
        stop = min(start + CHUNK, queries)
        oldest = max(0, total - queries + start - window + 1) // CHUNK * CHUNK if window else 0
        yield slice(start * heads, stop * heads), slice(oldest, total - queries + stop)


def probabilities(asked: Tensor, keys_GMK: Tensor, heads: int, window: int | None) -> Tensor:
    """softmax over M keys, (G, C * R, M), of C queries, of which the last sees the last key.

    In the dtype of the queries; torch sums a bfloat16 softmax in float32.
    """
    seen, count = keys_GMK.shape[1], asked.shape[1] // heads
    scores = torch.bmm(asked, keys_GMK.transpose(1, 2)).unflatten(1, (count, heads))
    ahead = torch.ones(count, count, dtype=torch.bool, device=asked.device).triu(1)[:, None]
    scores[..., -count:].masked_fill_(ahead, -math.inf)
    if window and seen > window:
        old = torch.ones(count, seen, dtype=torch.bool, device=asked.device)
        scores.masked_fill_(old.tril(seen - count - window)[:, None], -math.inf)
    return scores.softmax(-1).flatten(1, 2)
