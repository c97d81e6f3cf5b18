"""Rows of tokens without their padding: what runs, and which keys each token may see.

Every layer but attention treats a token alone, so the tokens of all rows stand behind one another
as one long row, (1, N, D), and nothing is computed for padding, for text behind a response, or for
the last token of a response, which predicts nothing. Rows that begin alike up to their response (a
pair) run that prompt once: the later row is a segment that goes on from the earlier one's keys.
Letters: B rows, T tokens, N tokens that run, M of them that predict, S scored tokens, H heads,
G kv heads, K head size.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import backward

Segment = tuple[slice, slice, slice]  # its queries, its tokens, the prompt it goes on from


class Packed(NamedTuple):
    """A batch as segments, none empty: a row that scores one token may need only its prompt."""

    ids: Tensor  # (1, N)
    positions: Tensor  # (N,) place in its own row, where rotary angles start anew
    segments: list[Segment]
    kept: Tensor  # (M,) the tokens that predict: all that the last layer works out
    final: list[Segment]  # the segments there, queries counted among the M
    source: Tensor  # (S,) place among the M of the token that predicts a scored one
    target: Tensor  # (S,) the scored token
    place: Tensor  # (S,) its place in the flattened (B, T)


def pack(ids_BT: Tensor, response_mask_BT: Tensor, device: torch.device) -> Packed:
    """Drops what no scored token needs. Reads its arguments on the CPU, answers on `device`."""
    ids_BT, mask_BT = ids_BT.cpu(), response_mask_BT.cpu()
    segments, final, parts, prompts, start, tail = [], [], [], {}, 0, 0
    for row, scored in enumerate(mask_BT):
        if not len(where := scored.nonzero()[:, 0]):
            continue
        first, end = int(where[0]), int(where[-1])
        assert first > 0, "position 0 has nothing before it to predict it"
        # where these very tokens stand already, and the last of them among the kept
        prompt, ready = prompts.setdefault(
            tuple(ids_BT[row, :first].tolist()), (slice(start, start + first), tail))
        shared = first if prompt.start < start else 0
        position = torch.arange(shared, end)
        lead = shared or first - 1  # the row's first token that predicts, unless the prompt's did
        kept = position[lead - shared:]
        rows = slice(start, start + len(position))
        prompt = prompt if shared else slice(0, 0)
        if len(position):
            segments.append((rows, rows, prompt))
            final.append((slice(tail, tail + len(kept)), rows, prompt))
        parts.append((ids_BT[row, shared:end], position, kept - shared + start,
                      torch.where(where == first, ready, tail + where - 1 - lead),
                      ids_BT[row, where], row * len(scored) + where))
        start, tail = start + len(position), tail + len(kept)
    assert parts, "no row has a token to score"
    ids, positions, kept, source, target, place = (
        send(torch.cat(x), device) for x in zip(*parts, strict=True))
    return Packed(ids[None], positions, segments, kept, final, source, target, place)


def send(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`; to a GPU from pinned memory, so that the host does not wait."""
    if device.type == "cuda" and x.is_cpu:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def attention_mask(queries: int, keys: int, window: int | None, device: torch.device,
                   first_B1: Tensor | int = 0) -> Tensor | None:
    """(queries, keys) True where the last `queries` positions may look; None for plain causal.
    (B, 1, queries, keys) with a tensor first_B1, before which a row has nothing."""
    if queries in (1, keys) and (window is None or window >= keys) and isinstance(first_B1, int):
        return None
    key = torch.arange(keys, device=device)
    query = key[keys - queries:, None]
    seen = (key <= query) & (key > query - (window or keys))
    return seen if isinstance(first_B1, int) else seen & (key >= first_B1[:, None, None])


def attend(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, window: int | None,
           first_B1: Tensor | int = 0) -> Tensor:
    """Causal attention of the last T positions, (B, H, T, K)."""
    shape, groups = q_BHTK.shape, k_BGTK.shape[1]
    mask = attention_mask(shape[2], k_BGTK.shape[2], window, q_BHTK.device, first_B1)
    causal = mask is None and shape[2] > 1
    if shape[2] == 1:  # the heads of a group ask as one head with so many queries
        q_BHTK = q_BHTK.reshape(shape[0], groups, -1, shape[3])
    elif mask is not None:  # torch's fast kernels take a mask or grouped heads, not both
        k_BGTK, v_BGTK = (x.repeat_interleave(shape[1] // groups, 1) for x in (k_BGTK, v_BGTK))
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGTK, v_BGTK, mask, is_causal=causal, enable_gqa=True).reshape(shape)


def attend_packed(q_MHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, segments: list[Segment],
                  window: int | None) -> Tensor:
    """Attention of each segment's queries to its own tokens and the prompt before, (M, H, K).

    On the CPU by backward.py's chunks; elsewhere by torch's own kernel.
    """
    cpu = q_MHK.device.type in ("cpu", "meta")
    attention = backward.SegmentAttention.apply if cpu else attend_each
    return attention(q_MHK, k_NGK, v_NGK, segments, window)


def attend_each(q_MHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, segments: list[Segment],
                window: int | None) -> Tensor:
    """The same by one `attend` a segment."""
    q, out = q_MHK.split([s.stop - s.start for s, _, _ in segments]), []
    k, v = (x.split([s.stop - s.start for _, s, _ in segments]) for x in (k_NGK, v_NGK))
    for i, (_, _, prompt) in enumerate(segments):
        keys, values = k[i], v[i]
        if prompt.stop > prompt.start:
            keys, values = torch.cat((k_NGK[prompt], keys)), torch.cat((v_NGK[prompt], values))
        part = (x.transpose(0, 1)[None] for x in (q[i], keys, values))
        out.append(attend(*part, window)[0].transpose(0, 1))
    return torch.cat(out)
