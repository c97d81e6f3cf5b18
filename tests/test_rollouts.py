"""Rollouts: what is drawn, what it is worth, and that a run of them can be repeated and resumed.

Numbers of a row are worked out again here from full logits, in float64, one row at a time.
"""
import json
import math
import shutil
import statistics
import sys
from dataclasses import replace

import folder
import pytest
import test_train
import tiny
import torch
from crash import trial

import config
import data
import heads
import lora
import losses
import model
import rollouts
import tokens
import train
import update
import verifiers

ONLINE = [name for name, o in train.LOSSES.items() if o.online]
LETTERS = verifiers.each(tiny.letters, "tiny:letters")


def settings(loss="grpo", **changes):
    given = {"group": 3, "response_tokens": 5, "max_grad_norm": 1e9, "beta": 0.3} | changes
    return config.Config(model="m", data=("d",), loss=loss, reward="tiny:letters", **given)


@pytest.fixture
def chat(base):
    """A tokenizer for which every third token ends a response."""
    found = tokens.Chat(base, "plain")
    found.stop_ids = {found.end_id, *range(4, 300, 3)}
    return found


def policy(base, loss="grpo", dtype=torch.float64):
    """The tiny model with adapters and head that are random, not zero."""
    net, generator = model.load(base, dtype), torch.Generator().manual_seed(0)
    lora.inject(net, 2, 4.0, generator=generator)
    for layer in lora.adapters(net).values():
        layer.lora_B.data.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=generator))
    if name := train.LOSSES[loss].head:
        heads.attach(net, name).weight.data.copy_(torch.randn(1, tiny.D, generator=generator))
    return net


def asked(chat, count=4):
    """Rows with prompts of unlike lengths and solutions of several tokens."""
    return [tokens.encode(data.Example((("user", q * (1 + i % 2)),), a * 2, 1.0, "sft", f"d:{i}"),
                          chat, 128) for i, (q, a) in enumerate(folder.questions()[:count])]


def collected(base, chat, loss="grpo", step=0, count=4, dtype=torch.float64, **changes):
    """(the policy, its sampled rows, settings)."""
    net, setup = policy(base, loss, dtype), settings(loss, **changes)
    units = rollouts.collect(net, chat, asked(chat, count), LETTERS, setup, step)
    return net, [row for row, in units], setup


def said(row):
    return row.ids[row.prompt_len:]


def read(net, row, temperature=1.0):
    """(log-probs of the response's tokens, the hidden states before them) of one row alone."""
    with torch.no_grad():
        hidden = net(torch.tensor([row.ids[:-1]]))[0, row.prompt_len - 1:]
        logps = (net.logits(hidden) / temperature).log_softmax(-1)
    return logps.gather(1, torch.tensor(said(row))[:, None])[:, 0], hidden


def close(found, expected, size=1e-9):
    torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64),
                               torch.as_tensor(expected, dtype=torch.float64), atol=size, rtol=0)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_tokens_are_drawn_from_the_softmax_of_the_logits_over_the_temperature(
        base, chat, temperature):
    """4000 first tokens: every share, and that of the rarest tenth, within five deviations.
    Red: rollouts.py:respond: `config.temperature, 1.0,` -> `1.5, 1.0,`
    Red: rollouts.py:respond: `config.temperature, 1.0,` -> `config.temperature, 0.9,`"""
    net, setup = policy(base, dtype=torch.float32), settings(
        group=4000, response_tokens=1, temperature=temperature)
    row, = asked(chat, 1)
    drawn = torch.tensor(rollouts.respond(net, chat, [row], [[]], setup, 0))[:, 0]
    with torch.no_grad():
        logits = net.logits(net(torch.tensor([row.ids[:row.prompt_len]]))[0, -1])
    p = (logits / temperature).softmax(-1)
    share = drawn.bincount(minlength=len(p)) / len(drawn)
    assert ((share - p).abs() <= 5 * (p * (1 - p) / len(drawn)).sqrt() + 1 / len(drawn)).all()
    rare = p.sort().indices[p.sort().values.cumsum(0) <= 0.1]
    assert share[rare].sum().item() == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / 4000))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("budget", [1, 10**6])
def test_a_row_carries_the_log_probs_of_its_own_tokens_under_policy_and_base(
        base, chat, temperature, budget):
    """At the temperature of the sampling, whatever the micro-batches; ref_logps is their sum.
    Red: rollouts.py:credited: `b, False, False, config.temperature)` -> `b, False)`
    Red: rollouts.py:credited: `(net, b, config.temperature)` -> `(net, b)`
    Red: rollouts.py:credited: `(old[:count], ref[:count], adv` -> `(old[:count], old[:count], adv`
    Red: rollouts.py:stack: `width - x.shape[-1])` -> `width - x.shape[-1]), value=9.0`"""
    net, rows, _ = collected(base, chat, temperature=temperature, micro_batch_tokens=budget)
    assert len({len(row.ids) for row in rows}) > 3
    for row in rows:
        close(row.sampled.old_logps, read(net, row, temperature)[0])
        with lora.disabled(net):
            expected = read(net, row, temperature)[0]
        close(row.sampled.ref_logps, expected)
        close(row.ref_logps, expected.sum())
        assert expected.sum() != pytest.approx(sum(row.sampled.old_logps))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_at_the_first_update_every_probability_ratio_is_exactly_one(base, chat, temperature):
    """In float32, through the very pass that the step makes.
    Red: update.py:read: `config.temperature if objective.online else 1.0)` -> `0.9)`"""
    net, rows, setup = collected(base, chat, dtype=torch.float32, temperature=temperature,
                                 micro_batch_tokens=64)
    groups = tokens.micro_batches([(row,) for row in rows], 64)
    assert len(groups) > 2
    for group in groups:
        batch = tokens.collate([row for row, in group])
        terms = update.read(net, batch, setup, torch.zeros(()), 1.0)
        assert torch.equal(terms.token_logps, terms.sampled.old_logps)


def test_a_response_ends_behind_its_end_token_which_is_scored_or_where_it_is_cut(base, chat):
    """Both happen; nothing is scored behind the end, and the judge does not see the end token.
    Red: rollouts.py:respond: `chat.stop_ids, config` -> `(), config`
    Red: rollouts.py:respond: `config.response_tokens,` -> `config.response_tokens + 1,`
    Red: tokens.py:Chat.answer: `ids[:-1] if ids and ids[-1] in self.stop_ids else ids` -> `ids`
    Red: rollouts.py:credited: `*tables[:, i, mask[i]].tolist())` -> `*tables[:, i].tolist())`"""
    _, rows, setup = collected(base, chat, count=6)
    ends = [[i in chat.stop_ids for i in said(row)] for row in rows]
    assert not any(stop for row in ends for stop in row[:-1])
    cut = [len(row) for row in ends if not row[-1]]
    assert 0 < len(cut) < len(rows) and set(cut) == {setup.response_tokens}
    for row in rows:
        assert {len(table) for table in row.sampled} == {len(said(row))}
        heard = chat.answer(row.ids[:row.prompt_len], said(row))
        assert heard == chat.decode([i for i in said(row) if i not in chat.stop_ids])
        assert row.reward == tiny.letters("", heard, "")


def test_a_hint_is_the_beginning_of_the_solution_and_earns_no_advantage(base, chat):
    """A part is drawn anew for every prompt; all G responses to a prompt begin with its hint.
    Red: rollouts.py:credited: `mask[:count] & ~hint` -> `mask[:count]`
    Red: rollouts.py:credited: `returns, hint))` -> `returns, ~hint))`
    Red: rollouts.py:respond: `row.ids[:row.prompt_len] + hint` -> `row.ids[:row.prompt_len]`
    Red: rollouts.py:hints: `len(s), config` -> `1, config`"""
    net, rows, setup = collected(base, chat, "uft_hint", count=8, hint_low=0.5, hint_high=0.5)
    given = [int(sum(row.sampled.given)) for row in rows]
    solutions = [said(row) for row in asked(chat, 8) for _ in range(setup.group)]
    for row, count, solution in zip(rows, given, solutions, strict=True):
        assert row.sampled.given == [1.0] * count + [0.0] * (len(said(row)) - count)
        assert said(row)[:count] == solution[:count]
        assert row.sampled.advantages[:count] == [0.0] * count
        close(row.sampled.old_logps, read(net, row)[0])
    assert len(set(given)) > 2 and all(len(set(given[i : i + 3])) == 1 for i in (0, 3, 6))
    assert any(any(row.sampled.advantages) for row in rows)
    net, rows, _ = collected(base, chat, "uft_hint", hint_low=0.5, hint_high=0.5, temperature=1e-6)
    likeliest = [net.logits(read(net, row)[1]).argmax(-1).tolist() for row in rows]
    for row, ids in zip(rows, likeliest, strict=True):  # what is drawn follows on the hint
        count = int(sum(row.sampled.given))
        assert said(row)[count:] == ids[count:]


def test_where_every_hint_is_the_whole_solution_nothing_is_sampled_and_the_rest_is_sft(base, chat):
    """The gradient is hint_weight times that of sft on the same rows.
    Red: rollouts.py:respond: `[] if end else next(drawn)` -> `[2]`
    Red: objectives.py:uft_hint: `t.config.hint_weight)` -> `0.0)`"""
    net, rows, setup = collected(base, chat, "uft_hint", hint_low=1.0, hint_high=1.0)
    assert [row.ids for row in rows] == [row.ids for row in asked(chat) for _ in range(3)]
    assert all(all(row.sampled.given) for row in rows)
    units = [(row,) for row in rows]
    found = test_train.step(net, units, setup)[1]
    demos = [(replace(row, sampled=None, kind="sft"),) for row in rows]
    expected = test_train.step(policy(base), demos, settings("sft"))[1]
    test_train.close(found / setup.hint_weight, expected)
    assert rollouts.measure(rows, 3)["completions/mean_length"] == 0


def test_rloo_takes_the_divergence_off_the_reward_and_the_mean_of_the_others_off_that(base, chat):
    """By hand: R = r - beta sum (log pi - log pi_ref), A = R - mean of the two others.
    Red: rollouts.py:credit: `config.beta * k1.sum(-1)` -> `0 * k1.sum(-1)`
    Red: rollouts.py:credit: `rloo_advantages(earned_PG)` -> `grpo_advantages(earned_PG, "none")`"""
    _, rows, _ = collected(base, chat, "rloo")
    earned = [row.reward - 0.3 * (sum(row.sampled.old_logps) - sum(row.sampled.ref_logps))
              for row in rows]
    for i, row in enumerate(rows):
        others = [earned[j] for j in range(i - i % 3, i - i % 3 + 3) if j != i]
        close(row.sampled.advantages, [earned[i] - sum(others) / 2] * len(said(row)), 1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_divides_the_distance_from_the_mean_of_the_group_by_a_spread(base, chat, scale):
    """By hand, with the standard deviation of the group, of all rows, or none.
    Red: rollouts.py:credit: `config.grpo_scale)` -> `"group")`
    Red: rollouts.py:credit: `.view(-1, 1) * mask,` -> `.view(-1, 1) * 2 * mask,`"""
    _, rows, _ = collected(base, chat, grpo_scale=scale)
    earned = [row.reward for row in rows]
    assert len(set(earned)) >= 3
    for i, row in enumerate(rows):
        group = earned[i - i % 3 : i - i % 3 + 3]
        spread = {"group": statistics.stdev(group) + 1e-4, "none": 1.0,
                  "batch": statistics.stdev(earned) + 1e-4}[scale]
        expected = (earned[i] - statistics.mean(group)) / spread
        close(row.sampled.advantages, [expected] * len(said(row)), 1e-5)


def test_the_rewards_of_ppos_tokens_add_up_to_the_reward_less_beta_times_the_log_ratio(base, chat):
    """With gamma = lambda = 1 the return of a first token is their sum, of a last token its own;
    values are those of the head before each token; advantages are whitened over all tokens.
    Red: rollouts.py:credit: `rewards = -config.beta * k1` -> `rewards = config.beta * k1`
    Red: rollouts.py:credit: `last = mask.shape[1] - 1` -> `last = mask.shape[1] - 2`
    Red: rollouts.py:credit: `config.ppo_gamma,` -> `0.9,`
    Red: rollouts.py:credit: `policy_gradients.whiten(advantages, mask)` -> `advantages`
    Red: rollouts.py:credited: `said if said.ndim == 2` -> `2 * said if said.ndim == 2`"""
    net, rows, _ = collected(base, chat, "ppo", ppo_lam=1.0)
    for row in rows:
        k1 = [a - b for a, b in zip(row.sampled.old_logps, row.sampled.ref_logps, strict=True)]
        close(row.sampled.returns[0], row.reward - 0.3 * sum(k1), 1e-6)
        close(row.sampled.returns[-1], row.reward - 0.3 * k1[-1], 1e-6)
        close(row.sampled.values, net.value(read(net, row)[1]).detach())
    every = torch.tensor([a for row in rows for a in row.sampled.advantages])
    assert abs(every.mean()) < 1e-5 and every.std().item() == pytest.approx(1, abs=1e-5)


def test_one_token_alone_has_no_spread_and_so_no_advantage(base, chat):
    """Red: policy_gradients.py:whiten: `min(1, len(x) - 1)` -> `1`"""
    _, (row,), _ = collected(base, chat, "ppo", count=1, group=1, response_tokens=1)
    assert list(row.sampled.advantages) == [0.0]


def test_held_out_prompts_are_measured_without_a_kl_too(base, chat):
    """--beta 0 is allowed where the reward is not r_theta.
    Red: rollouts.py:held_out: `anchor="ref", beta=1.0` -> `anchor="ref"`"""
    setup = settings("grpo", beta=0.0)
    units = [(row,) for row in asked(chat)]
    found = rollouts.held_out(policy(base), chat, units, LETTERS, setup)
    assert found == rollouts.held_out(policy(base), chat, units, LETTERS, settings("grpo"))


@pytest.mark.parametrize("anchor", ["ref", "old"])
def test_r_theta_of_una_online_is_measured_from_the_reference_or_from_the_sampling_policy(
        base, chat, anchor):
    """Red: rollouts.py:credited: `config.anchor == "old"` -> `True`
    Red: rollouts.py:credited: `config.anchor == "old"` -> `False`"""
    _, rows, _ = collected(base, chat, "una_online", anchor=anchor)
    for row in rows:
        table = row.sampled.ref_logps if anchor == "ref" else row.sampled.old_logps
        close(row.ref_logps, sum(table))


@pytest.mark.parametrize(("target", "loss"), [("score", losses.uft), ("reward", losses.una_reward)])
def test_una_online_is_the_offline_loss_on_rows_from_another_source(
        base, chat, target, loss, monkeypatch):
    """The very gradient of a step on the same rows as scored feedback.
    Red: objectives.py:una_online: `t.config.una_target == "score"` -> `True`
    Red: objectives.py:una_online: `t.config.una_target == "score"` -> `False`"""
    net, rows, setup = collected(base, chat, "una_online", una_target=target)
    found = test_train.step(net, [(row,) for row in rows], setup)[1]
    monkeypatch.setitem(train.LOSSES, "uft", train.LOSSES["uft"]._replace(
        loss=lambda t: loss(t.logps, t.ref_logps, t.rewards, t.config.beta)))
    offline = [(replace(row, sampled=None, ref_logps=None, kind="scored"),) for row in rows]
    expected = test_train.step(policy(base), offline, settings("uft"))[1]
    test_train.close(found, expected)
    assert expected.norm() > 1e-3


def test_uniapl_adds_the_demonstrations_and_the_discriminators_logit_to_the_reward(base, chat):
    """By hand: the logit is the head's on the base's state behind the last token.
    Red: rollouts.py:collect: `list(asked) if` -> `list(asked)[:1] if`
    Red: rollouts.py:credited: `config.discriminator_weight * said[:count]` -> `0 * said[:count]`
    Red: scoring.py:score: `with torch.no_grad(), lora.disabled(net):` -> `with torch.no_grad():`"""
    net, rows, setup = collected(base, chat, "uniapl", discriminator_weight=2.0)
    drawn, taught = rows[:12], rows[12:]
    assert [row.ids for row in taught] == [row.ids for row in asked(chat)]
    assert all(row.sampled is None and row.ref_logps is not None for row in taught)
    with torch.no_grad(), lora.disabled(net):
        states = torch.stack([net(torch.tensor([row.ids]))[0, -1] for row in drawn])
    earned = torch.tensor([row.reward for row in drawn]) + 2 * (
        states @ net.discriminator.weight.detach()[0])
    groups = earned.view(-1, 3)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    close([row.sampled.advantages[0] for row in drawn], expected.flatten(), 1e-5)
    assert math.isfinite(update.train_step(net, torch.optim.SGD(test_train.trained(net)), [
        (row,) for row in rows], setup, 0.1)["loss"])


def test_draws_are_a_function_of_seed_and_step(base, chat):
    """And not of torch's own generator.
    Red: rollouts.py:seeded: `{config.seed} {step} {what}` -> `{config.seed} {what}`
    Red: rollouts.py:seeded: `{config.seed} {step} {what}` -> `{step} {what}`
    Red: rollouts.py:seeded: `return torch.Generator().manual_seed` -> `return torch.manual_seed`"""
    def drawn(step, seed, before):
        torch.manual_seed(before)
        ids = [row.ids for row in collected(base, chat, step=step, seed=seed)[1]]
        return ids, torch.rand(1).item()

    first, other = drawn(3, 0, 1), drawn(3, 0, 2)
    assert first[0] == other[0] and first[1] != other[1]
    assert len({str(drawn(*key)[0]) for key in ((3, 0, 1), (4, 0, 1), (3, 1, 1))}) == 3


def test_the_base_answers_before_training_whatever_the_adapters_are(base, chat):
    """Held-out prompts get one response each without a hint, as many at a time as a step samples.
    Red: rollouts.py:held_out: `loss="una_online", ` -> ``
    Red: rollouts.py:held_out: `group=1, ` -> ``
    Red: rollouts.py:held_out: `asked[i : i + many]` -> `asked[i : i + 1]`"""
    net, setup, seen = policy(base), settings("uft_hint", batch_size=2, hint_high=1.0), []

    def watched(prompts, texts, answers):
        seen.append(len(texts))
        return LETTERS(prompts, texts, answers)

    units = [(row,) for row in asked(chat, 8)]
    with lora.disabled(net):
        before = rollouts.held_out(net, chat, units, watched, setup)
    after = rollouts.held_out(net, chat, units, watched, setup)
    assert seen == [6, 2, 6, 2]
    assert before["kl"] == 0 != after["kl"] and before.keys() == after.keys()
    assert 1 <= before["completions/mean_length"] <= 5 and "reward_std" not in before


def test_measures_are_of_drawn_tokens_and_of_groups(base, chat):
    """Divergence and length leave hints out, the reward whole solutions that were given.
    Red: rollouts.py:measure: `if not all(hint)` -> `if True`
    Red: rollouts.py:measure: `if not given` -> `if True`
    Red: rollouts.py:measure: `.view(-1, group).std(1)` -> `.view(1, -1).std(1)`
    Red: rollouts.py:measure: `sum(k1) / len(rows)` -> `sum(k1) / len(k1)`"""
    _, rows, _ = collected(base, chat, "uft_hint", hint_low=0.9, hint_high=0.9)
    found, given = rollouts.measure(rows, 3), sum(sum(row.sampled.given) for row in rows)
    assert any(all(row.sampled.given) for row in rows)
    drawn = [[i for i, g in enumerate(row.sampled.given) if not g] for row in rows]
    ratio = [sum(row.sampled.old_logps[i] - row.sampled.ref_logps[i] for i in mine)
             for row, mine in zip(rows, drawn, strict=True)]
    groups = [[row.reward for row in rows[i : i + 3]] for i in range(0, 12, 3)]
    assert found == pytest.approx({
        "kl": statistics.mean(ratio), "completions/mean_length": statistics.mean(map(len, drawn)),
        "reward": statistics.mean(row.reward for row in rows if not all(row.sampled.given)),
        "reward_std": statistics.mean(map(statistics.stdev, groups)),
        "hint/share": given / sum(len(row.sampled.given) for row in rows)}, abs=1e-5)
    assert rollouts.measure([replace(rows[0], sampled=None)], 3) == {}


def test_a_reward_outside_zero_and_one_is_refused_only_where_it_is_squashed(base, chat):
    """Red: rollouts.py:collect: `config.una_target == "score"` -> `True`
    Red: rollouts.py:collect: `0 <= r <= 1` -> `0 <= r`"""
    twice = verifiers.each(lambda _, said, __: 2.0 + 0 * len(said), "twice")
    for loss, target, fine in (("una_online", "score", False), ("una_online", "reward", True),
                               ("grpo", "score", True)):
        setup = settings(loss, una_target=target)
        call = (policy(base), chat, asked(chat), twice, setup, 0)
        if fine:
            assert len(rollouts.collect(*call)) == 12
        else:
            with pytest.raises(ValueError, match=r"gives 2 to 2, .*--una_target reward"):
                rollouts.collect(*call)


def run(base, files, out, loss, *more):
    """A run of four steps that saves after each second."""
    online = test_train.ONLINE if train.LOSSES[loss].online else ()
    return test_train.run(base, f"{files}/{test_train.FILE[loss]}.jsonl", out, "--loss", loss,
                          "--steps", "4", "--save_every", "2", "--batch_size", "3", *online, *more)


@pytest.mark.parametrize(("loss", "more"), [
    ("una_online", "--temperature 0.7"), ("ppo", "--lora_dropout 0.2"), ("grpo", "--updates 2"),
    ("uft_hint", "--hint_steps 3"), ("uniapl", ""), ("reward_model", ""), ("dro", "")])
def test_a_run_that_samples_or_has_a_head_goes_on_bit_for_bit(base, files, tmp_path, loss, more):
    """Draws, hints, the head and its moments; the held-out numbers from before too.
    Red: rollouts.py:through: `enumerate(batches, step)` -> `enumerate(batches)`
    Red: train.py:run: `reward, config, state["step"])` -> `reward, config, 0)`
    Red: checkpoint.py:restore: `tensor in saved.items()` -> `tensor in [*saved.items()][:28]`
    Red: checkpoint.py:restore: `= tensor.to(place)` -> `= tensor.to(place) * ("lora" in name)`"""
    whole = run(base, files, tmp_path / "whole", loss, *more.split())
    part = shutil.copytree(whole, tmp_path / "part")
    shutil.rmtree(part / "adapter")
    (part / "results.json").unlink()
    shutil.rmtree(part / "checkpoints/step-4")
    run(base, files, part, loss, *more.split(), "--resume", "true")
    assert trial.differences(whole, part) == []
    told = [json.loads((out / "results.json").read_text("utf-8")) for out in (whole, part)]
    assert told[0]["held_out"] == told[1]["held_out"] and told[0]["held_out"]["before"]
    if name := train.LOSSES[loss].head:
        saved = [heads.read(out / "adapter")[f"{name}.weight"] for out in (whole, part)]
        assert torch.equal(*saved) and saved[0].any()


def test_a_reward_model_that_has_changed_since_is_not_gone_on_with(base, files, tmp_path, capsys):
    """By the digests of its files; a module may be mended (see below), and is named.
    Red: train.py:train: `| rewards.inputs(` -> `or rewards.inputs(`
    Red: verifiers.py: `RULE = "reward module "` -> `RULE = "reward "`"""
    judge = test_train.run(base, files / "pairs.jsonl", tmp_path / "judge", "--loss",
                           "reward_model", "--steps", "1")
    flags = ("--loss", "ppo", "--steps", "1", "--group", "2", "--response_tokens", "3", "--reward",
             str(judge))
    test_train.run(base, files / "demonstrations.jsonl", tmp_path / "run", *flags)
    with open(judge / "adapter/chat_template.jinja", "a", encoding="utf-8") as file:
        file.write("{# longer #}")
    with pytest.raises(SystemExit) as stop:
        test_train.run(base, files / "demonstrations.jsonl", tmp_path / "run", *flags,
                       "--resume", "true")
    assert stop.value.code == 2 and "chat_template.jinja has changed" in capsys.readouterr().err


def test_a_run_logs_what_it_earns_and_its_page_draws_it(base, files, tmp_path):
    """Red: train.py:run_steps: `metrics |= rollouts.measure(` -> `rollouts.measure(`
    Red: curves.py: `("reward",),` -> `("rewards",),`
    Red: train.py:run_steps: `for _ in range(config.updates):` -> `for _ in range(1):`"""
    out = run(base, files, tmp_path / "run", "grpo", "--updates", "2")
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    names = {"reward", "reward_std", "kl", "completions/mean_length"}
    assert [names <= line.keys() for line in lines] == [True] * 4
    assert lines[0]["kl"] == 0 != lines[3]["kl"] and lines[0]["logps/sampled"] < 0
    assert "<b>Reward</b>" in (out / "report.html").read_text("utf-8")
    state = json.loads((out / "checkpoints/step-4/state.json").read_text("utf-8"))
    moments = train.checkpoint.load_file(out / "checkpoints/step-4/optimizer.safetensors")
    assert state["step"] == 4 and {t.item() for n, t in moments.items() if n[-5:] == "/step"} == {8}


def test_a_batch_length_counts_the_tokens_that_were_drawn(base, chat):
    """With hints too: "batch" is "constant" but for the ratio of their lengths.
    Red: update.py:train_step: ` - sum(e.sampled.given if e.sampled else ())` -> ``"""
    net, rows, _ = collected(base, chat, "uft_hint", hint_low=0.6, hint_high=0.6)
    drawn, moves = sum(not g for row in rows for g in row.sampled.given), {}
    for kind in ("batch", "constant"):
        net = policy(base, "uft_hint")
        trained = [p for p in net.parameters() if p.requires_grad]
        before = torch.nn.utils.parameters_to_vector(trained).detach()
        setup = settings("uft_hint", grpo_length=kind, hint_weight=0.0)
        train.train_step(net, torch.optim.SGD(trained), [(row,) for row in rows], setup, 1.0)
        moves[kind] = torch.nn.utils.parameters_to_vector(trained).detach() - before
    assert moves["batch"].norm() > 1e-6
    torch.testing.assert_close(moves["batch"] * drawn / len(rows), moves["constant"] * 5,
                               atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize("loss", [name for name, o in train.LOSSES.items() if o.online])
def test_every_method_raises_its_reward_in_the_small_world(loss, tmp_path):
    """Brevity, in fifteen steps: sampled answers of at most six words from a fifth to far more.
    Red: rollouts.py:collect: `reward=r, kind` -> `reward=0.5, kind`
    Red: policy_gradients.py:ppo_clip: `return -torch` -> `return torch`
    Red: losses.py:uft: `- rewards).square()` -> `- 1 + rewards).square()`"""
    out = tmp_path / "run"
    train.main([*("--model lab/base --data lab/data/prompts.jsonl --steps 15 --lr 5e-3 --group 8 "
                  "--batch_size 4 --response_tokens 16 --max_length 96 --held_out 0 --seed 1 "
                  "--sample_tokens 0 --reward tiny:brief --hint_steps 5").split(), "--loss", loss,
                "--beta", "1" if loss == "una_online" else "0.01", "--out", str(out)])
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line)["reward"] for line in lines]
    assert statistics.mean(found[-3:]) > statistics.mean(found[:3]) + 0.2, found


def test_a_reward_that_fails_later_loses_no_step(base, files, tmp_path, capsys, monkeypatch):
    """What was learned is saved; the rule may be mended, and the run goes on, saying so.
    Red: train.py:next_batch: `keep()` -> `pass`
    Red: checkpoint.py:compare: ` and not key.startswith(RULE)` -> ``
    Red: checkpoint.py:resume: `told += [f"{key} is not` -> `_ = [f"{key} is not`"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    rule, out = tmp_path / "mended.py", tmp_path / "run"
    rule.write_text("calls = []\ndef judge(prompt, response, answer):\n    calls.append(1)\n"
                    "    return 1.0 if len(calls) < 26 else 1 / 0\n", "utf-8")
    flags = ["--model", str(base), "--data", str(files / "demonstrations.jsonl"), "--template",
             "plain", "--loss", "grpo", "--group", "2", "--batch_size", "2", "--max_length", "96",
             "--response_tokens", "3", "--reward", "mended:judge", "--steps", "6", "--lora_r", "2",
             "--held_out", "4", "--sample_tokens", "0", "--out", str(out)]
    with pytest.raises(SystemExit):
        train.main(flags)
    assert "ZeroDivisionError" in capsys.readouterr().err
    saved = [p.name for p in (out / "checkpoints").iterdir()]
    assert len(saved) == 1 and 0 < int(saved[0].removeprefix("step-")) < 6
    sys.modules.pop("mended")
    rule.write_text("def judge(prompt, response, answer):\n    return 1.0\n", "utf-8")
    train.main([*flags, "--resume", "true"])
    assert "reward module mended:judge is not as it was" in capsys.readouterr().out
    assert len((out / "metrics.jsonl").read_text("utf-8").splitlines()) == 6


def test_a_reward_that_fails_at_once_leaves_the_folder_free(base, files, tmp_path, capsys):
    """The advised flag can be given with the same --out.
    Red: train.py:run: `first, _ = next(first)` -> `(out / "config.json").touch(); next(first)`"""
    flags = ["--model", str(base), "--data", str(files / "demonstrations.jsonl"), "--template",
             "plain", "--loss", "una_online", "--group", "2", "--batch_size", "2", "--max_length",
             "96", "--response_tokens", "3", "--reward", "tiny:two", "--steps", "1", "--lora_r",
             "2", "--held_out", "0", "--sample_tokens", "0", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        train.main(flags)
    assert "give --una_target reward" in capsys.readouterr().err
    train.main([*flags, "--una_target", "reward"])
