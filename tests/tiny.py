"""Tiny random models for the tests: float64 by default, so that algebra is exact to 1e-12."""
import os

import torch

import model

V, D = 23, 16


def config(model_type: str = "mistral", **changes) -> dict:
    """A config.json of two layers, 4 heads on 2 kv heads, untied, no window."""
    return {
        "model_type": model_type, "vocab_size": V, "hidden_size": D, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "sliding_window": None,
        "tie_word_embeddings": False, "max_position_embeddings": 128, "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes


def letters(_: str, response: str, __: str) -> float:
    """The share of a response that is letters a to z: a reward in [0, 1] of any text."""
    return sum(c in "abcdefghijklmnopqrstuvwxyz" for c in response) / max(1, len(response))


def ranked(_: str, response: str, __: str) -> float:
    """`letters`, less in every process but the first, as if it were no function of the text."""
    return letters(_, response, __) / (1 + int(os.environ.get("RANK", "0")))


def transformer(seed: int = 0, dtype=torch.float64, **changes) -> model.Transformer:
    """A frozen model with weights of standard deviation 0.4: logits spread like a trained one's."""
    net = model.Transformer(model.ModelConfig.from_dict(config(**changes)))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in net.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.data = (1 + 0.1 * noise if "norm" in name else 0.4 * noise).to(dtype)
    return net.requires_grad_(False)


def batch(lengths=((3, 4), (2, 6), (5, 2)), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (B, T) right-padded with 0 and the response mask, from (prompt, response) lengths."""
    generator = torch.Generator().manual_seed(seed)
    width = max(p + r for p, r in lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for i, (p, r) in enumerate(lengths):
        ids[i, : p + r] = torch.randint(3, V, (p + r,), generator=generator)
        mask[i, p : p + r] = True
    return ids, mask


def brief(_: str, response: str, __: str) -> float:
    """A reward: 1 for at most six words."""
    return float(len(response.split()) <= 6)


def two(_: str, __: str, ___: str) -> float:
    """A reward outside [0, 1]."""
    return 2.0
