"""A language small enough to write down: every response, and with it every expectation, exactly.

Three words and the end token, at most four tokens: 121 responses to a prompt. A real Transformer
with adapters speaks it, so that pi(y|x) and pi_ref(y|x) are known for all y, and with them

    J(pi) = E_pi[r] - beta KL(pi || pi_ref)   and what maximises it, pi* = pi_ref e^(r / beta) / Z

(UFT Eq. 3). Nothing is sampled: tests/test_language.py weighs every response by its probability and
asks where the gradient of each on-policy loss of objectives.py points. Float64 throughout.
Letters: N responses, T tokens of prompt and response.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

import lora
import model

VOCABULARY, END, LONGEST = 4, 3, 4
PROMPTS = ((0, 1, 2), (2, 0))
SHAPE = {
    "model_type": "mistral", "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "sliding_window": None,
    "tie_word_embeddings": False, "max_position_embeddings": 16, "bos_token_id": 0,
    "eos_token_id": END,
}


def speaker(seed: int = 0, spread: float = 0.3) -> model.Transformer:
    """A random Transformer whose adapters, B drawn with deviation `spread`, move it off pi_ref."""
    net, generator = model.Transformer(model.ModelConfig.from_dict(SHAPE)), torch.Generator()
    generator.manual_seed(seed)
    for name, weight in net.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.data = 1 + 0.1 * noise if "norm" in name else 0.25 * noise
    lora.inject(net, 2, 4.0, generator=generator)
    for layer in lora.adapters(net).values():
        layer.lora_B.data.copy_(spread * torch.randn(layer.lora_B.shape, generator=generator))
    return net


def responses() -> list[list[int]]:
    """All N responses: they end with END, or are cut at LONGEST tokens."""
    ended, unfinished = [], [[]]
    for _ in range(LONGEST):
        longer = [said + [token] for said in unfinished for token in range(VOCABULARY)]
        ended += [said for said in longer if said[-1] == END]
        unfinished = [said for said in longer if said[-1] != END]
    return ended + unfinished


def batch(prompt: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(ids, response mask) of every response to the prompt, both (N, T), END counted."""
    said = responses()
    ids = torch.tensor([[*prompt, *y, *[0] * (LONGEST - len(y))] for y in said])
    place = torch.arange(ids.shape[1]) - len(prompt)
    return ids, (place >= 0) & (place < torch.tensor([len(y) for y in said])[:, None])


def known(net: model.Transformer, prompt: Sequence[int], temperature: float = 1.0) -> tuple:
    """(token_logps, ref_token_logps, mask) of every response, (N, T) each."""
    ids, mask = batch(prompt)
    with torch.no_grad(), lora.disabled(net):
        ref = net.response_logps(ids, mask, False, temperature)[0]
    return net.response_logps(ids, mask, False, temperature)[0], ref, mask


def planted(prompt: Sequence[int]) -> Tensor:
    """(N,): the share of the prompt's words that a response repeats; 0 if it never ends."""
    words = set(prompt)
    return torch.tensor([(y[-1] == END) * len(words & set(y)) / len(words) for y in responses()],
                        dtype=torch.float64)


# The truth, from log-probs of all N responses


def divergence(logps: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) = sum_y p(y) (log p(y) - log q(y))."""
    return (logps.exp() * (logps - other)).sum()


def utility(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """J(pi) = E_pi[r] - beta KL(pi || pi_ref).   UFT Eq. 3"""
    return (logps.exp() * rewards).sum() - beta * divergence(logps, ref_logps)


def optimum(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log pi*, (N,); J(pi*) = beta log Z."""
    return (ref_logps + rewards / beta).log_softmax(0)
