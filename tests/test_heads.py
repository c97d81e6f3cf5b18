"""Heads: zero at first, silent with the adapters off, on disk beside the adapter."""
import shutil

import pytest
import test_train
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import heads
import lora
import model
import scoring
import tokens
import train
import update


def batch(loss):
    return tokens.collate([e for unit in test_train.units_of(loss) for e in unit])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_fresh_head_says_zero_in_float32_at_least(dtype):
    """Whatever the base's dtype; a reward model then starts at log 2.
    Red: heads.py:Head.__init__: `torch.zeros(1, size)` -> `torch.ones(1, size)`
    Red: heads.py:attach: `torch.promote_types(weight.dtype, torch.float32)` -> `weight.dtype`
    Red: heads.py:Head.forward: `hidden_ND.to(wide)` -> `hidden_ND`"""
    net = tiny.transformer(dtype=dtype)
    head = heads.attach(net, "score")
    assert head.weight.dtype == torch.promote_types(dtype, torch.float32)
    scores = scoring.judge(net, batch("reward_model"))
    assert scores.dtype == head.weight.dtype and not scores.any() and len(scores) == 12
    assert heads.found(net) == {"score": head} and head.weight.requires_grad


def test_a_head_is_silent_where_the_adapters_are_off_and_speaks_again_behind():
    """Red: lora.py:disabled: `*heads.found(model).values())}` -> `)}`
    Red: heads.py:Head.forward: ` * float(self.enabled)` -> ``"""
    net = test_train.policy("reward_model")
    before = scoring.judge(net, batch("reward_model"))
    with lora.disabled(net):
        assert not scoring.judge(net, batch("reward_model")).any()
    assert before.all() and torch.equal(before, scoring.judge(net, batch("reward_model")))


def test_v_is_read_before_each_token_and_dro_reads_it_behind_the_prompt():
    """V of a response's t-th token is the head on the state of the token before it.
    Red: objectives.py:dro: `.argmax(1, keepdim=True)` -> `.argmin(1, keepdim=True)`
    Red: model.py:Transformer.response_values: `self.value(hidden` -> `-self.value(hidden`"""
    net, rows = test_train.policy("dro"), [e for e, in test_train.units_of("dro")]
    terms = update.read(net, tokens.collate(rows), test_train.settings("dro"), torch.zeros(()), 1.0)
    for i, row in enumerate(rows):
        with torch.no_grad():
            values = net.value(net(torch.tensor([row.ids]))[0])
        said = slice(row.prompt_len, len(row.ids))
        test_train.close(terms.heads[i, said].detach(),
                         values[row.prompt_len - 1 : len(row.ids) - 1])
        u = 0.3 * (terms.logps[i] - terms.ref_logps[i])
        expected = (row.reward - values[row.prompt_len - 1] - u).square() / 2
        test_train.close(train.LOSSES["dro"].loss(terms)[i].detach(), expected.detach())


def test_a_step_of_dro_moves_policy_and_value_along_the_closed_form():
    """dL/dw = -mean (r - V - u) h at the end of the prompt, dL/dlogps = -beta (r - V - u); V reads
    the policy's own states, so that the adapters learn it too.
    Red: objectives.py:dro: `first)[:, 0], t` -> `first)[:, 0].detach(), t`
    Red: update.py:read: `batch, objective.reference, config.g` -> `batch, False, config.g`"""
    net, units = test_train.policy("dro"), test_train.units_of("dro")
    rows, setup = [e for e, in units], test_train.settings("dro")
    with torch.no_grad():
        scores = scoring.score(net, tokens.collate(rows), True)
        h = torch.stack([net(torch.tensor([row.ids]))[0, row.prompt_len - 1] for row in rows])
        rest = torch.tensor([row.reward for row in rows]) - net.value(h) - 0.3 * (
            scores.logps - scores.ref_logps)
    before = net.value.weight.detach()[0].clone()
    found = test_train.step(net, units, setup)[1]
    test_train.close(before - net.value.weight.detach()[0], -(rest[:, None] * h).mean(0))
    twin = test_train.policy("dro")
    logps = scoring.score(twin, tokens.collate(rows), False).logps
    values = torch.stack([twin.value(twin(torch.tensor([row.ids]))[0])[row.prompt_len - 1]
                          for row in rows])
    (-rest * (values + 0.3 * logps)).mean().backward()
    adapters = [p for n, p in twin.named_parameters() if "lora" in n]
    expected = nn.utils.parameters_to_vector([p.grad for p in adapters])
    test_train.close(-found[: len(expected)], expected)
    assert expected.norm() > 1e-3


def test_a_head_is_saved_beside_its_adapter_and_comes_back_with_it(tmp_path):
    """Frozen; the adapter's own file holds nothing of it, so that PEFT opens it.
    Red: lora.py:save: `heads.save(model, folder)` -> `pass`
    Red: lora.py:load: `heads.load(model, Path(folder))` -> `pass`
    Red: heads.py:load: `head.weight.data.copy_(weight)` -> `pass`
    Red: heads.py:load: `head.requires_grad_(False)` -> `pass`"""
    net = test_train.policy("reward_model")
    lora.save(net, tmp_path, "base")
    held = load_file(tmp_path / heads.FILE)
    assert [*held] == ["score.weight"] and torch.equal(held["score.weight"], net.score.weight)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    back = tiny.transformer()
    lora.load(back, tmp_path)
    assert torch.equal(scoring.judge(back, batch("reward_model")),
                       scoring.judge(net, batch("reward_model")))
    assert not back.score.weight.requires_grad


def test_without_a_head_there_is_no_file(tmp_path):
    """Red: heads.py:save: `    if held:` -> `    if True:`"""
    lora.save(test_train.policy("uft"), tmp_path, "base")
    assert not (tmp_path / heads.FILE).exists() and heads.read(tmp_path) == {}


@pytest.mark.parametrize(("held", "told"), [
    ({"score.weight": torch.zeros(2, tiny.D)}, r"score.weight \(2, 16\) is not one of score, val"),
    ({"score.weight": torch.zeros(tiny.D)}, r"score.weight \(16,\) is not"),
    ({"score.weight": torch.zeros(1, tiny.D, 1)}, r"score.weight \(1, 16, 1\) is not"),
    ({"value.weight": torch.full((1, tiny.D), torch.nan)}, "with finite numbers"),
    ({"scores.weight": torch.zeros(1, tiny.D)}, "scores.weight"),
    ({"model.norm.weight": torch.zeros(1, tiny.D)}, "model.norm.weight"),
    ({"score.weight": torch.zeros(1, 5)}, r"shape \(1, 5\), the model needs \(1, 16\)"),
    (b"no tensors", "is no readable safetensors file")])
def test_a_file_of_heads_that_does_not_fit_is_refused_by_name(tmp_path, held, told):
    """Red: heads.py:read: `name not in NAMES or ` -> ``
    Red: heads.py:read: `len(weight) != 1 or ` -> ``
    Red: heads.py:read: `weight.ndim != 2 or ` -> ``
    Red: heads.py:read: `not weight.isfinite().all()` -> `False`
    Red: heads.py:read: `and weights.header(path)` -> ``
    Red: heads.py:load: `if head.weight.shape != weight.shape:` -> `if False:`"""
    lora.save(test_train.policy("uft"), tmp_path, "base")
    if isinstance(held, bytes):
        (tmp_path / heads.FILE).write_bytes(held)
    else:
        save_file(held, tmp_path / heads.FILE)
    with pytest.raises(ValueError, match=rf"{heads.FILE}.*{told}"):
        lora.load(tiny.transformer(), tmp_path)


def test_a_run_with_a_head_can_be_sampled_from_merged_and_measured(base, files, tmp_path):
    """The adapter of ppo: its head changes no token, and no tensor of the merged model.
    Red: lora.py:save: `heads.save(model, folder)` -> `heads.save(model, folder.parent)`"""
    out = test_train.run(base, files / "demonstrations.jsonl", tmp_path / "run", "--loss", "ppo",
                         "--steps", "2", *test_train.ONLINE)
    lora.main(["merge", "--model", str(base), "--adapter", str(out / "adapter"), "--out",
               str(tmp_path / "merged")])
    net, merged = model.load(base, torch.float32), model.load(tmp_path / "merged", torch.float32)
    lora.load(net, out / "adapter")
    assert heads.found(net) and not heads.found(merged)
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(net(ids), merged(ids), atol=1e-4, rtol=0)
    shutil.rmtree(tmp_path / "merged")
