"""What log-probs and their gradients promise, in float64 where algebra is exact."""
import itertools
import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import backward
import lora
import model

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "mistral": {"model_type": "mistral"},
    "windowed": {"model_type": "mistral", "sliding_window": 3},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 2,
              "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "rope_parameters": LLAMA3},
}
every_family = pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES.keys())


def sums(net: model.Transformer, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return net.response_logps(ids, mask)[0].sum(-1)


def adapted(dtype: torch.dtype, dropout: float = 0.0, **changes) -> model.Transformer:
    """A tiny model in training mode whose adapters already do something."""
    net = tiny.transformer(dtype=dtype, **changes)
    lora.inject(net, 4, 8, dropout=dropout, generator=torch.Generator().manual_seed(1))
    for i, layer in enumerate(lora.adapters(net).values()):
        noise = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(i))
        layer.lora_B.data.copy_(0.1 * noise)
    return net.train()


def textbook(net: model.Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states of one row, (T, D), by the formulas as they are printed, from the tensors."""
    config, w, t = net.config, net.state_dict(), torch.arange(len(ids))

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * w[name]

    def heads(x, name):
        y = x @ w[f"{name}_proj.weight"].T + w.get(f"{name}_proj.bias", 0)
        y = y.unflatten(-1, (-1, config.head_dim))
        return norm(y, f"{name}_norm.weight") if f"{name}_norm.weight" in w else y

    def turned(x):
        half = config.head_dim // 2
        cos, sin = (x[:, None, :half] for x in model.rotary_tables(config, t, torch.float64))
        z = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)
        return torch.cat((z.real, z.imag), -1)

    x = w["model.embed_tokens.weight"][ids]
    for i, window in enumerate(config.windows):
        at, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        h = norm(x, f"model.layers.{i}.input_layernorm.weight")
        q, k, v = turned(heads(h, at + "q")), turned(heads(h, at + "k")), heads(h, at + "v")
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
        scores = torch.einsum("thk,shk->hts", q, k) / math.sqrt(config.head_dim)
        seen = (t <= t[:, None]) & (t > t[:, None] - (window or len(ids)))
        p = scores.masked_fill(~seen, -math.inf).softmax(-1)
        x = x + torch.einsum("hts,shk->thk", p, v).flatten(1) @ w[at + "o_proj.weight"].T
        h = norm(x, f"model.layers.{i}.post_attention_layernorm.weight")
        gate, up = h @ w[mlp + "gate_proj.weight"].T, h @ w[mlp + "up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[mlp + "down_proj.weight"].T
    return norm(x, "model.norm.weight")


SLIM = {"head_dim": 6, "num_key_value_heads": 1}  # no two widths alike


@every_family
def test_hidden_states_are_the_textbooks(changes):
    """Every formula written out again from the tensors, one row, full matrices, float64.

    Red: model.py:MLP.forward: `self.gate_proj(x_BTD), self.up` -> `self.up_proj(x_BTD), self.up`
    Red: model.py:Block.forward: `self.post_attention_layernorm(x_BTD)` -> `x_BTD`
    Red: model.py:Attention.forward: `self.o_proj(y_BHTK.transpose(1, 2)` -> `self.o_proj(y_BHTK`
    """
    net, ids = tiny.transformer(**changes | SLIM), tiny.batch(((3, 6),))[0]
    torch.testing.assert_close(net(ids)[0], textbook(net, ids[0]), rtol=0, atol=1e-11)


@every_family
def test_tensors_have_the_names_and_shapes_of_the_checkpoints(changes):
    """(outputs, inputs) for every projection; biases on q, k, v of qwen2, norms in qwen3's heads.

    Red: model.py:MLP.__init__: `config.hidden_size, bias=False` -> `config.hidden_size, bias=True`
    """
    net = tiny.transformer(**changes | SLIM)
    kind, (d, f, q, k) = net.config.model_type, (16, 24, 24, 6)
    layer = {"self_attn.q_proj.weight": (q, d), "self_attn.k_proj.weight": (k, d),
             "self_attn.v_proj.weight": (k, d), "self_attn.o_proj.weight": (d, q),
             "mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d),
             "mlp.down_proj.weight": (d, f), "input_layernorm.weight": (d,),
             "post_attention_layernorm.weight": (d,)}
    if kind == "qwen2":
        layer |= {f"self_attn.{x}_proj.bias": (n,) for x, n in (("q", q), ("k", k), ("v", k))}
    if kind == "qwen3":
        layer |= {f"self_attn.{x}_norm.weight": (6,) for x in "qk"}
    want = {f"model.layers.{i}.{n}": shape for i in range(2) for n, shape in layer.items()} | {
        "model.embed_tokens.weight": (tiny.V, d), "model.norm.weight": (d,)}
    if not net.config.tie_word_embeddings:
        want["lm_head.weight"] = (tiny.V, d)
    assert {n: tuple(t.shape) for n, t in net.state_dict().items()} == want


@every_family
def test_right_padding_never_changes_logps(changes):
    """Every row alone, and behind five more columns of junk, has the logps it has in its batch.

    Red: packing.py:pack: `ids_BT[row, shared:end]` -> `ids_BT[row, shared - end:]`
    """
    net, (ids, mask) = tiny.transformer(**changes), tiny.batch()
    together, rows = sums(net, ids, mask), range(len(ids))
    wide, width = F.pad(ids, (0, 5), value=7), [int(m.nonzero().max()) + 1 for m in mask]
    alone = [sums(net, ids[i:i + 1, :width[i]], mask[i:i + 1, :width[i]]) for i in rows]
    torch.testing.assert_close(sums(net, wide, F.pad(mask, (0, 5))), together, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-10)


@every_family
def test_batch_composition_and_row_order_never_change_logps(changes):
    """A permuted batch has permuted logps, and a row does not know its neighbours.

    Red: backward.py:RMSNorm.forward: `dim=-1` -> `dim=(-2, -1)`
    """
    net, (ids, mask) = tiny.transformer(**changes), tiny.batch()
    together, order = sums(net, ids, mask), torch.tensor([2, 0, 1])
    torch.testing.assert_close(sums(net, ids[order], mask[order]), together[order],
                               rtol=0, atol=1e-10)
    torch.testing.assert_close(sums(net, ids[1:], mask[1:]), together[1:], rtol=0, atol=1e-10)


@every_family
def test_no_position_sees_a_later_one(changes):
    """Another token at t moves the hidden state at t and none before it.

    Red: packing.py:attention_mask: `(key <= query)` -> `(key <= query + 1)`
    """
    net, ids = tiny.transformer(**changes), tiny.batch(((2, 8),))[0]
    before = net(ids)
    for t in range(1, ids.shape[1]):
        other = ids.clone()
        other[0, t] = 3 + (ids[0, t] - 2) % (tiny.V - 3)
        after = net(other)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


@every_family
def test_checkpointing_changes_no_gradient(changes):
    """With dropout on and one seed the adapters' gradients are equal bit for bit.

    Red: model.py:Transformer.packed: `=False)` -> `=False, preserve_rng_state=False)`
    """
    net, (ids, mask) = adapted(torch.float32, dropout=0.3, **changes), tiny.batch()
    wanted = [p for p in net.parameters() if p.requires_grad]
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        total = net.response_logps(ids, mask, checkpointing)[0].sum()
        gradients.append(torch.autograd.grad(total, wanted))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(g.abs().max() > 0 for g in gradients[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_runs_every_block_again_and_only_if_asked(checkpointing, monkeypatch):
    """Twice a block with it, once without.

    Red: model.py:Transformer.packed: `if checkpointing else` -> `if not checkpointing else`
    """
    ran, real = [], model.Block.packed
    monkeypatch.setattr(model.Block, "packed", lambda *given: ran.append(1) or real(*given))
    adapted(torch.float64).response_logps(*tiny.batch(), checkpointing)[0].sum().backward()
    assert len(ran) == 2 * (1 + checkpointing)


def test_layers_begin_as_torchs_own_do():
    """One seed draws the same numbers; on the meta device none are drawn at all.

    Red: model.py:Embedding.reset_parameters: `if not self` -> `if self`
    Red: model.py:Linear.reset_parameters: `if not self` -> `if self`
    """
    for ours, torchs in ((model.Embedding, torch.nn.Embedding), (model.Linear, torch.nn.Linear)):
        made = []
        for kind in (ours, torchs):
            torch.manual_seed(0)
            made.append(kind(5, 4).weight)
        assert torch.equal(*made)
        state = torch.get_rng_state()
        with torch.device("meta"):
            ours(5, 4)
        assert torch.equal(state, torch.get_rng_state())


@every_family
def test_logps_are_minus_the_cross_entropy_of_the_full_logits(changes):
    """sum of log pi(y_t | x, y_<t) == -cross_entropy(logits[:-1], labels[1:], sum).

    Red: packing.py:pack: `where - 1 - lead` -> `where - lead`
    """
    net, (ids, mask) = tiny.transformer(**changes), tiny.batch()
    labels = ids.where(mask, -100)[:, 1:]
    logits = net.logits(net(ids))[:, :-1]
    want = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(sums(net, ids, mask).sum(), want, rtol=0, atol=1e-12)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any result with `columns` columns had."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.numel = columns, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.dim() and t.shape[-1] == self.columns:
                self.numel = max(self.numel, t.numel())
        return out


def test_the_head_never_builds_the_logits_of_all_positions(monkeypatch):
    """Forward and backward together: 17 rows of logits at a time, of 29 to score.

    Red: backward.py:tiles: `(1 if cpu else 32)` -> `(2 if cpu else 32)`
    """
    monkeypatch.setattr(backward, "TILE", 17 * 211)
    net, (ids, mask) = adapted(torch.float64, vocab_size=211), tiny.batch(((3, 20), (2, 9)))
    with Largest(211) as largest:
        net.response_logps(ids, mask, checkpointing=True)[0].sum().backward()
    assert largest.numel == 17 * 211  # the head itself has 16 * 211


def test_no_logits_wait_for_the_backward_pass():
    """Of everything autograd keeps, only the head's own weight has V columns or rows.

    Red: backward.py:TargetLogps.forward: `backward(slope_ND,` -> `backward(logp,`
    """
    net, (ids, mask) = adapted(torch.float64, vocab_size=211), tiny.batch()
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, id):
        net.response_logps(ids, mask)
    assert shapes and not [s for s in shapes if 211 in s and tiny.D not in s]


def test_the_chunk_size_changes_neither_logps_nor_gradients(monkeypatch):
    """One position at a time, five, or all at once.

    Red: backward.py:TargetLogps.forward: `out=slope_ND[rows]` -> `out=slope_ND[:len(mean)]`
    """
    net, (ids, mask) = adapted(torch.float64), tiny.batch()
    wanted, seen = [p for p in net.parameters() if p.requires_grad], []
    for chunk in (1, 5, 1024):
        monkeypatch.setattr(backward, "TILE", chunk * tiny.V)
        logps = net.response_logps(ids, mask)[0]
        weights = torch.arange(logps.numel()).view_as(logps)  # tells positions apart
        seen.append([logps, *torch.autograd.grad((logps * weights).sum(), wanted)])
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=0, atol=1e-10)


@every_family
def test_gradients_of_logps_are_those_of_the_plain_log_softmax(changes):
    """Every parameter, head and embedding included.

    Red: backward.py:TargetLogps.backward: `.exp_().neg_()` -> `.exp_()`
    """
    net, (ids, mask) = tiny.transformer(**changes).requires_grad_(), tiny.batch()
    names, weights = zip(*net.named_parameters(), strict=True)
    logps = net.logits(net(ids))[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    want = torch.autograd.grad((logps * mask[:, 1:]).sum(), weights)
    got = torch.autograd.grad(sums(net, ids, mask).sum(), weights, allow_unused=True)
    for name, a, b in zip(names, got, want, strict=True):
        assert a is not None and (a - b).abs().max() < 1e-11, name


def test_probabilities_of_all_answers_sum_to_one():
    """sum of pi(y | x) over the y that end within 4 tokens, plus the unfinished tail, is 1.

    Red: packing.py:pack: `where - 1 - lead` -> `where - lead`
    """
    net, eos, others = tiny.transformer(vocab_size=4), 2, (0, 1, 3)
    total = 0.0
    for length in (1, 2, 3, 4):
        stems = list(itertools.product(others, repeat=length - 1))
        ends = (eos,) if length < 4 else (eos, *others)
        ids = torch.tensor([[1, 3, *stem, end] for stem in stems for end in ends])
        mask = torch.arange(ids.shape[1]).expand_as(ids) > 1
        total += sums(net, ids, mask).exp().sum().item()
    assert abs(total - 1) < 1e-12


def test_logps_are_zero_outside_the_mask_and_blind_to_text_behind_it():
    """The row [x x x y y EOS z z]: no z and no label of an x enters the sum.

    Red: packing.py:pack: `row * len(scored) + where)` -> `row * len(scored) + where - 1)`
    """
    net, ids = tiny.transformer(), tiny.batch(((3, 5),))[0]
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0]]).bool()
    logps, other = net.response_logps(ids, mask)[0], ids.clone()
    other[0, 6:] = torch.tensor([4, 2])
    assert not logps[~mask].any() and logps[mask].all()
    assert torch.equal(net.response_logps(other, mask)[0], logps)


def test_a_zero_head_gives_every_token_minus_log_v():
    """log(1/23) a token, so twice the tokens are twice the sum.

    Red: backward.py:log_softmax: `.log_softmax(-1)` -> `.softmax(-1)`
    """
    net, (ids, mask) = tiny.transformer(), tiny.batch(((2, 3), (2, 6)))
    net.lm_head.weight.zero_()
    short, long = sums(net, ids, mask).tolist()
    assert math.isclose(short, 3 * math.log(1 / 23)) and math.isclose(long, 2 * short)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_policy_minus_reference_is_exactly_zero_at_the_first_step(dtype):
    """Not 1e-7: zero, whatever the weights are, and the logps are float32 at least.

    Red: backward.py:promoted: `torch.promote_types(x.dtype, torch.float32)` -> `x.dtype`
    """
    net, (ids, mask) = tiny.transformer(dtype=dtype), tiny.batch()
    lora.inject(net.train(), 4, 8)
    policy = net.response_logps(ids, mask, checkpointing=True)[0]
    with torch.no_grad(), lora.disabled(net):
        reference = net.response_logps(ids, mask)[0]
    assert policy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert policy.requires_grad and torch.equal(policy, reference)
