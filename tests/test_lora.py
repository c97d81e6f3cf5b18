"""What adapters promise: the base bit for bit when off, one low-rank update when on."""
import contextlib
import itertools
import math

import pytest
import tiny
import torch
from torch import Tensor, nn

import lora
import model

FIRST = "model.layers.0.self_attn.q_proj"


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adapted(dtype: torch.dtype = torch.float64, r: int = 4, alpha: float = 8.0,
            **options) -> model.Transformer:
    """A tiny model whose adapters already do something."""
    net = tiny.transformer(dtype=dtype)
    lora.inject(net, r, alpha, generator=seeded(), **options)
    noise = seeded(2)
    for layer in lora.adapters(net).values():
        layer.lora_B.data.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=noise))
    return net


def logits(net: model.Transformer) -> Tensor:
    with torch.no_grad():
        return net.logits(net(tiny.batch()[0]))


def loss(net: model.Transformer) -> Tensor:
    return net.response_logps(*tiny.batch())[0].sum()


def trained(net: model.Transformer, steps: int = 3) -> model.Transformer:
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net).neg().backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_an_injected_model_is_the_base_model_bit_for_bit(dtype):
    """B = 0, so B A x is 0 and y + 0 is y; adapters are float32 at least.

    Red: lora.py:inject: `layer.lora_A.data` -> `layer.lora_B.data[:, :1] = 1e-3; layer.lora_A.data`
    """
    net = tiny.transformer(dtype=dtype)
    before = logits(net)
    lora.inject(net, 4, 8, generator=seeded())
    assert torch.equal(logits(net), before)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for n, p in net.named_parameters() if "lora_" in n} == {wide}
    assert {p.dtype for n, p in net.named_parameters() if "lora_" not in n} == {dtype}


def test_at_the_start_only_b_has_a_gradient():
    """dL/dA = scale * B^T (..) = 0 and dL/dB = scale * (..) (A x)^T != 0, in every layer.

    Red: lora.py:inject: `(2 * draw - 1)` -> `(0 * draw)`
    """
    net = tiny.transformer()
    lora.inject(net, 4, 8, generator=seeded())
    loss(net).backward()
    assert len(lora.adapters(net)) == 14
    for layer in lora.adapters(net).values():
        assert not layer.lora_A.grad.any() and layer.lora_B.grad.abs().max() > 0


def test_disabled_adapters_are_the_reference_bit_for_bit_after_training():
    """Base weights neither move nor receive gradients, and the policy has moved away.

    Red: lora.py:LoRALinear.forward: `if not self.enabled or self.merged` -> `if self.merged`
    """
    net = tiny.transformer()
    before, weights = logits(net), {n: p.clone() for n, p in net.named_parameters()}
    lora.inject(net, 4, 8, generator=seeded())
    trained(net)
    with lora.disabled(net):
        assert torch.equal(logits(net), before)
    assert (logits(net) - before).abs().max() > 1e-3
    base = {n: p for n, p in net.named_parameters() if "lora_" not in n}
    assert base.keys() == weights.keys()
    assert all(p.grad is None and torch.equal(p, weights[n]) for n, p in base.items())


def test_disabling_nests_and_survives_an_exception():
    """Leaving a block restores what was before it, not `on`.

    Red: lora.py:disabled: `part.enabled = enabled` -> `part.enabled = True`
    """
    net = adapted()
    on = logits(net)
    with lora.disabled(net):
        off = logits(net)
        with pytest.raises(KeyError), lora.disabled(net):
            raise KeyError
        assert torch.equal(logits(net), off)
    assert torch.equal(logits(net), on) and not torch.equal(on, off)


def test_a_merged_model_holds_no_reference():
    """disabled() would silently be the policy itself.

    Red: lora.py:disabled: `any(layer.merged` -> `any(False and layer.merged`
    """
    net = adapted()
    lora.merge(net)
    with pytest.raises(ValueError, match="unmerge"), lora.disabled(net):
        pass


@pytest.mark.parametrize("r, alpha, scale", [(32, 16, 0.5), (16, 32, 2.0)])
def test_an_adapted_layer_is_w_plus_alpha_over_r_b_a(r, alpha, scale):
    """y = (W + (alpha / r) B A) x + b, and not r / alpha.

    Red: lora.py:inject: `alpha / r` -> `r / alpha`
    """
    net = nn.Sequential(nn.Linear(6, 5)).double()
    lora.inject(net, r, alpha, "all-linear", generator=seeded())
    net[0].lora_B.data.normal_(generator=seeded())
    x = torch.randn(3, 6, generator=seeded(), dtype=torch.float64)
    weight = net[0].weight + scale * net[0].lora_B @ net[0].lora_A
    torch.testing.assert_close(net(x), x @ weight.T + net[0].bias, rtol=0, atol=1e-12)


def test_a_merged_model_equals_the_adapted_one_and_unmerging_restores_it():
    """Logits to 1e-10, weights to 1e-12; merging twice is merging once.

    Red: lora.py:merge: `layer.merged == (sign < 0)` -> `True`
    """
    net = adapted()
    before, weights = logits(net), {n: p.clone() for n, p in net.named_parameters()}
    lora.merge(net)
    lora.merge(net)
    torch.testing.assert_close(logits(net), before, rtol=0, atol=1e-10)
    assert not torch.equal(net.get_submodule(FIRST).weight, weights[FIRST + ".weight"])
    lora.unmerge(net)
    lora.unmerge(net)
    for name, weight in net.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(net), before, rtol=0, atol=1e-10)


def test_removing_puts_plain_linear_layers_back():
    """After a merge they carry the update, without one they are the base; biases stay.

    Red: lora.py:remove: `layer.weight, layer.bias` -> `layer.weight, None`
    """
    base, bare, net = tiny.transformer(), adapted(), adapted()
    want = logits(net)
    lora.remove(bare)
    lora.merge(net)
    lora.remove(net)
    assert not lora.adapters(net) and type(net.get_submodule(FIRST)) is model.Linear
    assert net.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(logits(bare), logits(base))
    torch.testing.assert_close(logits(net), want, rtol=0, atol=1e-10)
    small = nn.Sequential(nn.Linear(3, 2))
    bias = small[0].bias
    lora.inject(small, 1, 1, "all-linear")
    lora.remove(small)
    assert small[0].bias is bias and small[0].in_features == 3


def test_only_adapters_receive_gradients():
    """The trainable parameters are two per target layer.

    Red: lora.py:inject: `model.requires_grad_(False)` -> `pass`
    """
    net = tiny.transformer().requires_grad_()
    lora.inject(net, 4, 8, ("q_proj", "v_proj"))
    names = {n for n, p in net.named_parameters() if p.requires_grad}
    assert names == {f"model.layers.{i}.self_attn.{p}_proj.lora_{half}"
                     for i, p, half in itertools.product((0, 1), "qv", "AB")}


def test_dropout_rests_in_eval_and_in_the_reference_pass():
    """And it is on in training: two passes differ.

    Red: lora.py:LoRALinear.forward: `self.dropout and self.training` -> `self.dropout`
    """
    net = adapted(dropout=0.5)
    plain = logits(adapted())
    assert torch.equal(logits(net.eval()), plain)
    torch.manual_seed(0)
    assert not torch.equal(logits(net.train()), logits(net))
    with lora.disabled(net):
        assert torch.equal(logits(net), logits(tiny.transformer()))


def test_dropout_falls_on_what_the_adapter_reads_and_on_nothing_else():
    """y = W x + b + scale B A dropout(x), the very draw of torch's own dropout.

    Red: lora.py:LoRALinear.forward: `self.scale * (down @` -> `(down @`
    Red: lora.py:LoRALinear.forward: `self.bias) + up` -> `self.bias) - up`
    """
    layer, x = adapted(dropout=0.5).get_submodule(FIRST).train(), torch.randn(3, 16).double()
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    update = nn.functional.dropout(x, 0.5) @ layer.delta().T
    torch.testing.assert_close(found, x @ layer.weight.T + update, rtol=0, atol=1e-12)


def test_one_seed_gives_one_adapter():
    """A is uniform in +-1/sqrt(I): drawn from the generator that is given and from nothing else.

    Red: lora.py:inject: `generator=generator` -> `generator=None`
    """
    nets = [tiny.transformer() for _ in range(3)]
    for i, (net, seed) in enumerate(zip(nets, (1, 1, 2), strict=True)):
        torch.manual_seed(i)
        lora.inject(net, 64, 8, generator=seeded(seed))
    first, again, other = (net.get_submodule(FIRST).lora_A for net in nets)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert 0.24 < first.abs().max() <= 1 / math.sqrt(16) and first.mean().abs() < 0.02


@pytest.mark.parametrize("targets, found", [
    ("all-linear", 14), (("q_proj",), 2), ((FIRST,), 1), (("self_attn.q_proj", "mlp.up_proj"), 4),
    (r".*\.1\.mlp\.(up|down)_proj", 2), (r".*self_attn.*", 8), (("lm_head", "q_proj"), 3)])
def test_targets_select_layers_as_peft_reads_them(targets, found):
    """Names, last parts of names, a regular expression, or everything but lm_head.

    Red: peft_config.py:select: `(?!.*\\blm_head$)` -> ``
    """
    net = tiny.transformer()
    lora.inject(net, 2, 2, targets)
    assert len(lora.adapters(net)) == found


@pytest.mark.parametrize("targets", [("q_proj", "query"), ("proj",), "q_proj", ("norm",)])
def test_a_target_that_matches_nothing_is_an_error(targets):
    """It is named, and so are the layers there are.

    Red: peft_config.py:select: `if not found[t]` -> `if False`
    """
    with pytest.raises(ValueError, match=r"matches no linear layer.*'q_proj'"):
        lora.inject(tiny.transformer(), 2, 2, targets)


def test_an_adapter_on_the_head_moves_the_logps():
    """The head is a layer like the others: its adapter learns, and merging it changes nothing.

    Red: lora.py:LoRALinear.widened: `self.scale * down` -> `0 * down`
    """
    net, base = adapted(targets=("lm_head",)), tiny.transformer()
    want = logits(net)
    assert (want - logits(base)).abs().max() > 1e-3
    loss(net).backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters() if p.requires_grad)
    lora.merge(net)
    torch.testing.assert_close(logits(net), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rest", ["off", "merged"])
def test_an_adapted_head_scores_like_the_weight_it_stands_for(rest):
    """Responses too: W' = W + scale B A where it is on or merged, W where it is off.

    Red: lora.py:LoRALinear.widened: `if not self.enabled or self.merged` -> `if self.merged`
    Red: lora.py:LoRALinear.widened: `if not self.enabled or self.merged` -> `if not self.enabled`
    Red: lora.py:LoRALinear.widened: `self.scale * down` -> `down / self.scale`
    """
    net, plain, (ids, mask) = adapted(targets=("lm_head",)), tiny.transformer(), tiny.batch()
    if rest == "merged":
        plain.lm_head.weight.data += net.lm_head.delta().detach()
        assert torch.allclose(net.response_logps(ids, mask)[0], plain.response_logps(ids, mask)[0])
        lora.merge(net)
    with contextlib.nullcontext() if rest == "merged" else lora.disabled(net):
        found = net.response_logps(ids, mask)[0]
    torch.testing.assert_close(found, plain.response_logps(ids, mask)[0], rtol=0, atol=1e-10)


def test_a_second_injection_is_an_error():
    """It would drop the first adapter without a word.

    Red: lora.py:inject: `if adapters(model):` -> `if False:`
    """
    with pytest.raises(ValueError, match="already carries adapters"):
        lora.inject(adapted(), 2, 2)
