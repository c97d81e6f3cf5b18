"""A number that is not finite ends the run in the step that makes it, before the update.

Through the command, with flags that a user may give or a model that breaks in mid-run: exit code 2,
the step, the rows and the tensor are named, and nothing that is not finite reaches the disk.
"""
import json
import math
import re

import pytest
import torch
from crash import trial

import checkpoint
import train

LAYER = "model.layers.1.mlp.up_proj"


def hook(value):
    """Makes the gradient of one adapter `value` from step 3 on."""
    return lambda net: net.get_parameter(f"{LAYER}.lora_B").register_hook(lambda g: g * value)


def weight(name, value, row=...):
    """Puts a value into a frozen weight, all of it or one row, before step 3."""
    return lambda net: net.get_parameter(name).data.__setitem__(row, value)


WAYS = {  # the loss, flags, what breaks before step 3, the step that is stopped, its bad tensor
    "lr 1e20": ("sft", "--lr 1e20", None, 2, "model.layers"),
    "lr 1e30": ("uft", "--lr 1e30", None, 2, "model.layers"),
    "lr 1e30 in bfloat16": ("dpo", "--lr 1e30 --dtype bfloat16", None, 2, "model.layers"),
    "beta 1e30": ("dpo", "--beta 1e30", None, 1, "model.layers"),
    "beta 1e30 without a reference": ("simpo", "--beta 1e30", None, 1, "model.layers"),
    "desirable_weight 1e30": ("kto", "--desirable_weight 1e30", None, 1, "model.layers"),
    "orpo_weight 1e30": ("orpo", "--orpo_weight 1e30", None, 1, "model.layers"),
    "lora_alpha 1e30": ("sft", "--lora_alpha 1e30", None, 1, "model.layers"),
    "weight_decay 1e30": ("uft", "--weight_decay 1e30 --lr 1", None, 2, "model.layers"),
    "a gradient of NaN": ("uft", "", hook(math.nan), 3, f"{LAYER}.lora_B"),
    "a gradient of inf": ("ipo", "", hook(math.inf), 3, f"{LAYER}.lora_B"),
    "a norm of inf": ("uft", "", weight("model.norm.weight", math.inf), 3, "model.layers"),
    "a head of NaN": ("kto", "", weight("lm_head.weight", math.nan, 7), 3, "model.layers"),
    "weights of 3e38": ("dpo", "", weight("lm_head.weight", 3e38), 3, "model.layers")}


def spoiled(argv, spoil):
    """(exit code, updates made) of the command, its model spoiled before step 3."""
    step, updates, seen = train.train_step, [], []
    adamw = torch.optim.AdamW.step

    def watched(net, optimizer, units, settings, rate):
        seen.append(units)
        if spoil and len(seen) == 3:
            spoil(net)
        return step(net, optimizer, units, settings, rate)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "train_step", watched)
        patch.setattr(torch.optim.AdamW, "step", lambda self: updates.append(adamw(self)))
        train.main(argv)
    return stop.value.code, len(updates)


def command(base, files, name, out, *more):
    return ["--model", str(base), "--data", f"{files}/{name}.jsonl", "--template", "plain", "--lr",
            "0.01", "--warmup", "0", "--max_length", "128", "--held_out", "0", "--sample_tokens",
            "0", "--lora_r", "2", "--steps", "6", "--save_every", "1", "--keep", "9", "--out",
            str(out), *more]


def check(out, told, step, tensor):
    """The message names all, and the disk holds the steps before: finite, whole, no more."""
    assert re.search(rf"step {step}: loss is .* first bad tensor {tensor}.*, rows \[.*:\d+", told)
    assert (out / "bad_batch.jsonl").exists() and not (out / "adapter").exists()
    logged = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    assert len(logged) == step - 1 and not re.search("NaN|Infinity", "".join(logged))
    assert len(checkpoint.steps(out)) == step - 1 and trial.unusable(out) == []


@pytest.mark.parametrize("way", WAYS)
def test_a_number_that_is_not_finite_stops_its_own_step_before_the_update(
        way, base, files, tmp_path, capsys):
    """Red: update.py:train_step: `or not norm.isfinite()` -> `or not 1`
    Red: stops.py:explain: `if isinstance(error, FloatingPointError)` -> `if False`
    Red: update.py:train_step: `rows {[e.where for e in rows]}` -> `rows`"""
    loss, flags, spoil, step, tensor = WAYS[way]
    reads = train.LOSSES[loss].reads
    argv = command(base, files, "scores" if reads == "rows" else reads, tmp_path / "run",
                   "--loss", loss, *flags.split())
    assert spoiled(argv, spoil) == (2, step - 1)
    check(tmp_path / "run", capsys.readouterr().err, step, tensor)


def test_the_embedding_of_a_rare_token_gone_bad_is_found_in_the_step_that_reads_it(
        base, files, tmp_path, capsys):
    """One row of 40 holds it: steps before it are sound, and the message names its line.
    Red: update.py:train_step: `raise FloatingPointError(f"loss` -> `print(f"loss`"""
    rows = [json.loads(line) for line in (files / "scores.jsonl").read_text("utf-8").splitlines()]
    rows[17]["response"] += " QQ"  # no other row has a Q
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    argv = command(base, tmp_path, "scores", tmp_path / "run", "--batch_size", "5", "--steps", "8")
    settings = train.parse_flags(argv, {})
    q = train.open_chat(settings, base).tokenizer.encode("Q", add_special_tokens=False).ids[-1]
    adapted = train.adapted

    def poisoned(config, folder):
        net, optimizer = adapted(config, folder)
        net.get_parameter("model.embed_tokens.weight").data[q] = math.nan
        return net, optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "adapted", poisoned)
        code, updates = spoiled(argv, None)
    told = capsys.readouterr().err
    assert code == 2 and f"{tmp_path}/scores.jsonl:18'" in told and 1 <= updates < 8
    check(tmp_path / "run", told, updates + 1, "model.layers")


def test_an_update_that_makes_a_weight_infinite_never_reaches_the_disk(
        base, files, tmp_path, capsys):
    """Loss and gradient are finite, a moment is not: the save looks at what the update made.
    Red: checkpoint.py:save: `if not t.sum().isfinite() and` -> `if False and`"""
    adapted = train.adapted

    def broken(config, folder):
        net, optimizer = adapted(config, folder)
        for p in optimizer.param_groups[0]["params"]:
            optimizer.state[p] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.full_like(p, math.nan)}
        return net, optimizer

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "adapted", broken)
        train.main(command(base, files, "scores", tmp_path / "run"))
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "is not finite" in told and "lora_A" in told
    assert trial.unusable(tmp_path / "run") == [] and not (tmp_path / "run/adapter").exists()
