"""Theorems about one step of training, in float64, and about whole runs of the command.

The gradient of a step is read off an SGD update of rate 1: the weights before minus those after.
"""
import json
import math
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import config
import generate
import heads
import lora
import model
import tokens
import train
import update

REWARDS = (1.0, 0.0, 0.25, 0.75, 1.0, 0.5)
FILE = {loss: {"rows": "scores", "prompts": "demonstrations"}.get(o.reads, o.reads)
        for loss, o in train.LOSSES.items()}
LOSSES = pytest.mark.parametrize("loss", train.LOSSES)
ONLINE = ("--reward", "tiny:letters", "--group", "4", "--response_tokens", "6")  # rollouts' flags


def settings(loss="uft", **changes):
    changes = {"data": ("d",), "max_grad_norm": 1e9} | changes
    return config.Config(model="m", loss=loss, beta=0.3, **changes)


def policy(loss="uft", noise=0.1):
    """A tiny float64 model with adapters whose B is random, of standard deviation `noise`, and
    the loss's head, random too."""
    net, generator = tiny.transformer(), torch.Generator().manual_seed(0)
    lora.inject(net, 2, 4.0, generator=generator)
    for layer in lora.adapters(net).values():
        layer.lora_B.data.copy_(noise * torch.randn(layer.lora_B.shape, generator=generator))
    if name := train.LOSSES[loss].head:
        drawn = 10 * noise * torch.randn(1, tiny.D, generator=generator)
        heads.attach(net, name).weight.data.copy_(drawn)
    return net


def encoded(i, prompt, reward, kind):
    """A row whose ids follow from i and prompt: lengths differ, rows of one prompt begin alike."""
    asked, said = range(3 + prompt, 6 + prompt + prompt % 3), range(1 + 3 * i % 5)
    ids = [*asked, *(3 + (7 * i + 5 * t * t) % (tiny.V - 3) for t in said), 2]
    return tokens.Encoded(ids, len(asked), reward, kind, f"d:{i}", (("user", str(prompt)),))


def sampled(i, r, loss):
    """A row as rollouts.py leaves it, with numbers that follow from i; some uniapl rows are taught,
    and of uft_hint's solutions a part is given."""
    row = encoded(i, i // 2, r, "sampled")
    if loss == "uniapl" and i % 3 == 2:
        return replace(row, kind="sft", ref_logps=-9.0)
    said = range(len(row.ids) - row.prompt_len)
    tables = [[-2.5 - 0.3 * ((i + t + k) % 4) for t in said] for k in range(5)]
    tables[2] = [(-1) ** i * 0.7] * len(said)
    given = [float(t < i % 3 and loss == "uft_hint") for t in said]
    return replace(row, sampled=tokens.Sampled(*tables, given), ref_logps=sum(tables[1]))


def units_of(loss):
    """Six units of what a loss reads; labels are REWARDS cut at 1/2."""
    if train.LOSSES[loss].reads == "pairs":
        return [(encoded(2 * i, i, 1.0, "chosen"), encoded(2 * i + 1, i, 0.0, "rejected"))
                for i in range(6)]
    if train.LOSSES[loss].online:
        return [(sampled(i, r, loss),) for i, r in enumerate(REWARDS)]
    cut = float if train.LOSSES[loss].reads == "rows" else lambda r: float(r > 0.5)
    return [(encoded(i, i, cut(r), "scored"),) for i, r in enumerate(REWARDS)]


def trained(net):
    return [p for p in net.parameters() if p.requires_grad]


def step(net, units, setup, rate=1.0):
    """Metrics of one SGD step, and the update as one vector: -rate * gradient."""
    before = parameters_to_vector(trained(net)).detach()
    metrics = train.train_step(net, torch.optim.SGD(trained(net)), units, setup, rate)
    return metrics, parameters_to_vector(trained(net)).detach() - before


def gradient(loss, units, **changes):
    return -step(policy(loss), units, settings(loss, **changes))[1]


def close(actual, expected):
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, atol=1e-12 * scale, rtol=0)


def run(base, file, out, *more):
    """train.main on a file of feedback, small and fast."""
    train.main(["--model", str(base), "--data", str(file), "--template", "plain", "--lr", "0.01",
                "--max_length", "128", "--held_out", "4", "--sample_tokens", "0", "--lora_r", "2",
                "--out", str(out), *more])
    return out


@LOSSES
def test_micro_batches_change_no_gradient(loss):
    """One forward pass or one a unit: the same sum, token mean and z0 of the whole step.
    Red: update.py:train_step: `each.sum() * float(` -> `each.mean() * float(`
    Red: update.py:train_step: `z0, tokens_per_row)` -> `z0, len(batch.ids))`
    Red: update.py:reference_point: `torch.cat([f[i] for f in found])` -> `found[0][i]`"""
    units = units_of(loss)
    if loss == "kto":
        assert update.reference_point(policy(), units, settings(loss))[0] > 0.05
    close(gradient(loss, units, micro_batch_tokens=1), gradient(loss, units))


@LOSSES
def test_the_order_of_units_in_a_step_changes_no_gradient(loss):
    """kto's z0 pairs each prompt with the next row's response, so only turns leave it alone.
    Red: update.py:train_step: `turns(units, ` -> `turns(units[:-1], `
    Red: tokens.py:mismatch: `(*rows[i + 1:], *rows[:i])` -> `rows[i + 1:]`"""
    units = units_of(loss)
    other = units[2:] + units[:2] if loss == "kto" else units[::-1]
    close(gradient(loss, other), gradient(loss, units))


def test_the_l1_penalty_adds_its_own_slope_once_a_step():
    """And its value to the logged loss, whatever the micro-batches.
    Red: update.py:train_step: `added = config.lora_l1 * ` -> `added = `
    Red: update.py:train_step: ` + penalty` -> ``"""
    units, net = units_of("uft"), policy()
    penalty = lora.l1(net)
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(penalty, trained(net))])
    metrics, moves = step(policy(), units, settings(lora_l1=0.1, micro_batch_tokens=1))
    close(-moves, gradient("uft", units) + 0.1 * slope)
    plain = step(policy(), units, settings())[0]["loss"]
    assert metrics["loss"] == pytest.approx(plain + 0.1 * penalty.item(), rel=1e-12)


@pytest.mark.parametrize("loss", ["uft", "uft_bce", "una_binary"])
def test_each_row_is_pulled_to_its_own_reward(loss):
    """A step's gradient is the mean of its rows' own, each with its reward.
    Red: update.py:read: `batch.rewards.to(` -> `batch.rewards[:1].to(`
    Red: tokens.py:collate: `[e.reward for e in rows]` -> `[rows[0].reward for e in rows]`"""
    units = units_of(loss)
    close(gradient(loss, units), sum(gradient(loss, [unit]) for unit in units) / len(units))


def test_a_mixture_pulls_as_its_parts_weighted_by_their_rows():
    """grad = n_s / n grad_sft + n_a / n grad_align, for 3 demonstrations and 6 scores.
    Red: update.py:train_step: `< own) / len(units)` -> `< own) / 6**0.5`"""
    scores, demos = units_of("uft"), [(encoded(i, i, 1.0, "sft"),) for i in (7, 8, 9)]
    parts = 3 / 9 * gradient("uft", demos) + 6 / 9 * gradient("uft", scores)
    close(gradient("uft", [*scores, *demos]), parts)


def test_base_weights_never_move():
    """Bit for bit, with weight decay and a large rate.
    Red: lora.py:inject: `model.requires_grad_(False)` -> `model.requires_grad_(True)`"""
    net, base = policy(), tiny.transformer().state_dict()
    optimizer = torch.optim.AdamW(trained(net), weight_decay=0.1)
    for _ in range(3):
        train.train_step(net, optimizer, units_of("uft"), settings(), 1.0)
    assert all(torch.equal(net.state_dict()[name], base[name]) for name in base)


@LOSSES
def test_the_logged_loss_is_the_optimised_loss(loss, monkeypatch):
    """Its slope along the gradient, by central differences, is the gradient's norm.
    Red: update.py:train_step: `each.sum().item()` -> `each[1:].sum().item()`
    Red: update.py:train_step: `"grad_norm": norm.item()` -> `"grad_norm": 1.0`"""
    monkeypatch.setattr(update, "reference_point", lambda _, units, __: (torch.tensor(.1), units))
    setup, logged = settings(loss, micro_batch_tokens=1), []
    metrics, moves = step(policy(loss), units_of(loss), setup)
    for h in (-1e-5, 1e-5):
        net = policy(loss)
        moved = parameters_to_vector(trained(net)) + h * moves / moves.norm()
        vector_to_parameters(moved.detach(), trained(net))
        logged.append(step(net, units_of(loss), setup, rate=0.0)[0]["loss"])
    assert (logged[0] - logged[1]) / 2e-5 == pytest.approx(metrics["grad_norm"], rel=1e-6)


def test_an_adapter_without_a_gradient_stops_the_run_by_name():
    """One that no forward pass meets, as where checkpointing cuts the graph.
    Red: update.py:train_step: `p.requires_grad and p.grad is None` -> `False`"""
    net = policy()
    net.unused = lora.LoRALinear(net.lm_head, 2, 1.0, 0.0)
    with pytest.raises(FloatingPointError, match="2 adapter tensors get no .* unused.lora_A"):
        step(net, units_of("uft"), settings())


def test_the_learning_rate_climbs_in_a_line_and_falls_in_half_a_cosine():
    """10 of 110 steps: 1/10 at first, all at the 10th, half in the middle of the rest, 0 at last.
    Red: train.py:learning_rate: `(step + 1) / ramp` -> `step / ramp`
    Red: train.py:learning_rate: `math.pi * (step - ramp)` -> `math.pi * step`"""
    setup = settings(lr=8.0, warmup=10 / 110)
    rates = [train.learning_rate(s, 110, setup) for s in (0, 4, 9, 10, 35, 60, 110)]
    assert rates == pytest.approx([0.8, 4, 8, 8, 4 * (1 + math.sqrt(0.5)), 4, 0], abs=1e-12)


def test_the_gradient_is_clipped_to_its_norm_and_logged_before():
    """Red: update.py:train_step: `config.max_grad_norm, norm` -> `1e9, norm`"""
    free, clipped = (step(policy(), units_of("uft"), settings(max_grad_norm=n)) for n in (9, 1e-3))
    assert clipped[1].norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert clipped[0]["grad_norm"] == free[0]["grad_norm"] == pytest.approx(free[1].norm().item())


@pytest.mark.parametrize("fault", ["loss", "gradient", "norm"])
def test_a_number_that_is_not_finite_stops_the_step_before_the_update(fault, monkeypatch):
    """The message names the tensor and the rows.
    Red: update.py:train_step: `or not norm.isfinite()` -> `or not 1`
    Red: update.py:train_step: `not math.isfinite(loss) or` -> ``
    Red: update.py:train_step: `if not g.isfinite().all()` -> `if g.isfinite().all()`
    Red: update.py:train_step: `if not bad and not norm.isfinite()` -> `if False`"""
    net, bad = policy(), "none"
    if fault == "norm":
        bad = "model.layers.1.mlp.up_proj.lora_B"
        net.get_parameter(bad).register_hook(lambda g: g * 1e200)
    elif fault == "loss":
        infinite = train.LOSSES["uft"]._replace(loss=lambda t: t.logps + math.inf)
        monkeypatch.setitem(train.LOSSES, "uft", infinite)
    else:
        bad = "model.layers.1.mlp.up_proj.lora_B"
        net.get_parameter(bad).register_hook(lambda g: g * math.nan)
    before = parameters_to_vector(trained(net)).detach().clone()
    with pytest.raises(FloatingPointError, match=rf"first bad tensor {bad}, rows .*d:3"):
        step(net, units_of("uft"), settings())
    assert torch.equal(parameters_to_vector(trained(net)), before)


@LOSSES
def test_the_check_at_step_zero_holds_for_a_fresh_adapter_and_for_no_other(loss):
    """Red: objectives.py: `lambda r, c: 2 * math.log(2)` -> `lambda r, c: math.log(2)`
    Red: update.py:self_check: `u != 0` -> `False`"""
    units = [tuple(replace(e, ref_logps=None) for e in unit) for unit in units_of(loss)]
    assert update.self_check(policy(loss, 0.0), units, settings(loss)).endswith("ok")
    with pytest.raises(ValueError, match="self-check failed"):
        update.self_check(policy(loss), units, settings(loss))


def test_the_first_step_of_adamw_is_the_same_for_uft_and_sft():
    """Their gradients differ by the factor beta / 4 alone, which AdamW divides out.
    Red: losses.py:uft: `- rewards).square()` -> `- 1 + rewards).square()`"""
    demos, ends = [(encoded(i, i, 1.0, "sft"),) for i in range(6)], []
    for loss in ("uft", "sft"):
        net = policy(noise=0.0)
        optimizer = torch.optim.AdamW(trained(net), eps=1e-30, weight_decay=0.0)
        train.train_step(net, optimizer, demos, settings(loss), 1e-3)
        ends.append(parameters_to_vector(trained(net)).detach())
    close(ends[0] / 1e-3, ends[1] / 1e-3)


@pytest.mark.parametrize("dropout", ["0.0", "0.3"])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(base, files, tmp_path, dropout):
    """From the middle of either epoch, past a checkpoint that a kill left half-written.
    Red: train.py:run_steps: `f"{config.seed} {step} ` -> `f"{start} {step} `
    Red: checkpoint.py:restore: `optimizer.state[weights[name]][part] = tensor.to(place)` -> `pass`
    Red: checkpoint.py:restore: `weights[name].data.copy_(tensor)` -> `pass`
    Red: train.py:run: `(state["place"], listed)` -> `((0, 0), listed)`"""
    flags = ("--steps", "8", "--save_every", "3", "--keep", "3", "--lora_dropout", dropout)
    whole = run(base, files / "scores.jsonl", tmp_path / "whole", *flags)
    for stop in (3, 6):
        part = shutil.copytree(whole, tmp_path / f"part{stop}")
        shutil.rmtree(part / "adapter")
        for n in (n for n in (6, 8) if n > stop):
            (part / f"checkpoints/step-{n}").rename(part / f"checkpoints/tmp-step-{n}-1")
        run(base, files / "scores.jsonl", part, *flags, "--resume", "true")
        a, b = (load_file(p / "adapter/adapter_model.safetensors") for p in (whole, part))
        assert len(a) == 28 and all(torch.equal(a[key], b[key]) for key in a)
        told = [p.joinpath("metrics.jsonl").read_text("utf-8") for p in (whole, part)]
        told = [re.sub(r'"(tokens_per_s|mem_mib)": [^,}]*', "", text) for text in told]
        assert told[0] == told[1] and told[0].count("\n") == 8


def test_gradient_checkpointing_changes_no_metric():
    """Red: model.py:Transformer.packed: `block.packed, x_1ND` -> `block.packed, -x_1ND`"""
    plain, saved = (step(policy(), units_of("uft"), settings(gradient_checkpointing=c))[0]
                    for c in (False, True))
    assert plain == pytest.approx(saved, rel=1e-12, abs=1e-12)


def test_a_run_never_overwrites_another(tmp_path, monkeypatch):
    """--out of a run is refused; without --out the next free number is taken.
    Red: train.py:run_folder: `if not config.resume and "config.json" in held` -> `if False`
    Red: train.py:run_folder: `config.resume and not config.out` -> `False`
    Red: train.py:run_folder: `if config.resume and "config.json" not in held` -> `if False`
    Red: train.py:run_folder: `not above.is_dir()` -> `False`
    Red: train.py:run_folder: `n != "lock"` -> `False`
    Red: train.py:run_folder: `(odd := [n for n in held if n` -> `(odd := [n for n in () if n`
    Red: train.py:run_folder: `default=0) + 1` -> `default=0)`"""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/0007"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    assert str(train.run_folder(settings())) == "runs/0008"
    assert train.run_folder(settings(out=str(folder), resume=True)) == folder
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/lock").touch(0o755)
    assert train.run_folder(settings(out="begun")) == Path("begun")
    for wrong, message in (({"out": str(folder)}, "0007 holds a run already"),
                           ({"out": "begun", "resume": True}, "begun: it holds no run"),
                           ({"out": "runs"}, r"runs holds other files \(0007\)"),
                           ({"out": "begun/lock/a"}, "begun/lock is not a folder that can"),
                           ({"resume": True}, "needs --out RUN")):
        with pytest.raises(ValueError, match=message):
            train.run_folder(settings(**wrong))


def test_a_run_opens_no_connection(base, files, tmp_path, monkeypatch):
    """Not even with a model whose path looks like an id of the hub.
    Red: model.py:resolve: `Path(name).exists() or` -> ``"""
    def connect(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket, "socket", connect)
    monkeypatch.setattr(socket, "create_connection", connect)
    shutil.copytree(base, tmp_path / "my/model")
    monkeypatch.chdir(tmp_path)
    run("my/model", files / "scores.jsonl", tmp_path / "run", "--steps", "1")


@LOSSES
def test_every_loss_trains_an_adapter_to_sample_from(loss, base, files, tmp_path, capsys):
    """Over a bfloat16 base, whose adapters are float32 and whose check at step 0 is exact.
    Red: train.py:run: `lora.save(net, part, config.model)` -> `lora.inject(net, 1, 1)`
    Red: update.py:train_step: `optimizer.step()` -> `pass`
    Red: lora.py:LoRALinear.__init__: `torch.float32)` -> `torch.bfloat16)`"""
    out = run(base, f"{files}/{FILE[loss]}.jsonl", tmp_path / "run", "--loss", loss, "--steps", "2",
              "--dtype", "bfloat16", *(ONLINE if train.LOSSES[loss].online else ()))
    what = "score" if loss == "reward_model" else "implicit reward"
    assert f"{what} at step 0: 0 (expected 0)" in capsys.readouterr().out
    net = model.load(base, torch.bfloat16)
    lora.load(net, out / "adapter")
    adapter = load_file(out / "adapter/adapter_model.safetensors")
    assert all(t.dtype == torch.float32 and t.any() for t in adapter.values())
    chat = tokens.Chat(base, "checkpoint", out / "adapter")
    assert len(generate.complete(net, chat, [(("user", "Say one."),)], 3)) == 1


def test_a_run_folder_holds_settings_metrics_with_trls_names_and_peft_files(base, files, tmp_path):
    """Red: train.py:run: `chat.save(part)` -> `pass`
    Red: train.py:run: `report.write_json(out / "config.json", asdict(config))` -> `pass`
    Red: train.py:run: `page.write(out)` -> `pass`
    Red: train.py:run_steps: `"epoch":` -> `"epochs":`
    Red: evaluate.py:measure_rewards: `out["rewards/margins"]` -> `out["margins"]`"""
    out = run(base, files / "pairs.jsonl", tmp_path / "run", "--loss", "dpo", "--steps", "2")
    kept = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.*")) == [
        *(f"adapter/{n}" for n in [*kept, "chat_template.jinja", "generation_config.json"]),
        *(f"checkpoints/step-2/{n}" for n in [*kept, "manifest.json", "optimizer.safetensors",
                                               "state.json"]),
        "config.json", "dropped.jsonl", "metrics.jsonl", "report.html", "results.json"]
    names = {"step", "loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "logps/chosen",
             "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins",
             "rewards/accuracies"}
    metrics = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [names <= json.loads(m).keys() for m in metrics] == [True, True]
    assert json.loads((out / "config.json").read_text("utf-8"))["loss"] == "dpo"
