"""Policy, reference and heads on a batch: every number that a loss, a reward or a measure reads.

Letters: B rows, T tokens, D width.
"""
from typing import NamedTuple

import torch
from torch import Tensor

import lora
import model
import tokens


class Scores(NamedTuple):
    """What a forward pass says of a batch; ref_logps is None where no reference was asked for."""

    logps: Tensor  # (B,) sums over response tokens, float32
    ref_logps: Tensor | None  # (B,) the same with the adapters off, no gradient
    token_logps: Tensor  # (B, T), zero outside the mask
    mask: Tensor  # (B, T)
    heads: Tensor | None = None  # (B, T) of the head `value`, (B,) of `discriminator`


@torch.no_grad()
def reference_logps(net: model.Transformer, batch: tokens.Batch,
                    temperature: float = 1.0) -> Tensor:
    """log pi_ref of every response token, (B, T): the model with its adapters off."""
    with lora.disabled(net):
        return net.response_logps(batch.ids, batch.response_mask, False, temperature)[0]


def score(
    net: model.Transformer, batch: tokens.Batch, reference: bool, checkpointing: bool = False,
    temperature: float = 1.0,
) -> Scores:
    """log pi_theta(y|x) of every row and, adapters off, log pi_ref(y|x), unless it is known.

    pi is the softmax of logits / temperature. A discriminator reads the reference's states.
    """
    asked = batch.ids, batch.response_mask, checkpointing, temperature
    ref_logps, said = batch.ref_logps if reference else None, None
    if reference and ref_logps is None:
        ref_logps = reference_logps(net, batch, temperature).sum(-1)
    if hasattr(net, "value"):
        token_logps, said, mask = net.response_values(*asked)
    else:
        token_logps, mask = net.response_logps(*asked)
    if hasattr(net, "discriminator"):
        with torch.no_grad(), lora.disabled(net):
            states_BD = net.end_states(*asked[:2])
        said = net.discriminator(states_BD)
    if ref_logps is not None:
        ref_logps = ref_logps.to(token_logps.device, token_logps.dtype, non_blocking=True)
    return Scores(token_logps.sum(-1), ref_logps, token_logps, mask, said)


def judge(net: model.Transformer, batch: tokens.Batch, checkpointing: bool = False) -> Tensor:
    """r_phi(x, y), a reward model's score of every row, (B,): its head behind the last token."""
    return net.score(net.end_states(batch.ids, batch.response_mask, checkpointing))
