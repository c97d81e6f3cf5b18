"""Theorems about measuring: numbers small enough to check by hand, and the evaluation command."""
import math

import pytest
import tiny
import torch

import data
import evaluate
import lora
import losses
import model
import questions
import scoring
import tokens

KINDS = ("chosen", "rejected", "sft", "scored", "scored")
LOGPS = torch.tensor([-1.0, -4.0, -2.0, -3.0, -6.0])
REF_LOGPS = torch.tensor([-3.0, -5.0, -2.0, -2.0, -8.0])  # log-ratios 2, 1, 0, -1, 2
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.25, 0.75])
CHOICES = ("Question,Best Answer,Correct Answers,Incorrect Answers\n"
           '"Is it, though?",Yes,No doubt; Yes ;,No;\nWhy?,Because,Because,So; Just so\n')
ASKED = '{"prompt": "Say one.", "pattern": ".*"}\n{"prompt": "Say one.", "pattern": "one"}\n'


def units(base, *paths):
    rows = [e for path in paths for e in data.read(path)[0]]
    return data.grouped(tokens.encode_all(rows, tokens.Chat(base, "plain"), 128)[0])


def measure(rows=range(5), pairs=(0, 3), ref_logps=REF_LOGPS, rewards=REWARDS):
    rows = list(rows)
    refs = None if ref_logps is None else ref_logps[rows]
    return evaluate.measure(LOGPS[rows], refs, rewards[rows], [KINDS[i] for i in rows], pairs, 0.5)


def test_the_reference_is_the_base_model_bit_for_bit(base, adapted, files):
    """And the policy is the model with its adapters on.
    Red: scoring.py:score: `lora.disabled(net)` -> `torch.no_grad()`
    Red: scoring.py:score: `Scores(token_logps.sum(-1)` -> `Scores(token_logps.mean(-1)`"""
    batch = tokens.collate([e for unit in units(base, files / "pairs.jsonl") for e in unit])
    scores = scoring.score(adapted, batch, reference=True)
    plain, mask = model.load(base, torch.float32).response_logps(batch.ids, batch.response_mask)
    assert torch.equal(scores.ref_logps, plain.sum(-1)) and not scores.ref_logps.requires_grad
    policy = adapted.response_logps(batch.ids, batch.response_mask)[0]
    assert torch.equal(scores.logps, policy.sum(-1)) and torch.equal(scores.mask, mask)
    assert scores.logps.requires_grad and not torch.allclose(scores.logps, scores.ref_logps)


def test_measures_are_means_over_rows_by_kind():
    """beta = 0.5, so r_theta is 1, .5, 0, -.5, 1. Margins: 1 - .5 = .5, and -(-.5 - 1) = 1.5 as the
    second score is the better; both are above 0.
    Red: evaluate.py:measure_rewards: `u.mean()` -> `u.sum()`
    Red: evaluate.py:measure: `(logps - ref_logps)[rows]` -> `(0.5 * (logps - ref_logps))[rows]`
    Red: evaluate.py:measure: `if kind not in ("sft", "sampled")` -> `if kind`
    Red: evaluate.py:measure_rewards: `+ 1]).sign()` -> `+ 1]).abs()`"""
    s = [1 / (1 + math.exp(-u)) for u in (1, 0.5, -0.5, 1)]
    errors = [(s[0] - 1) ** 2, (s[1] - 0) ** 2, (s[2] - 0.25) ** 2, (s[3] - 0.75) ** 2]
    assert measure() == pytest.approx({
        "logps/chosen": -1, "logps/rejected": -4, "logps/sft": -2, "logps/scored": (-3 - 6) / 2,
        "dlogp/chosen": 2, "dlogp/rejected": 1, "dlogp/sft": 0, "dlogp/scored": (-1 + 2) / 2,
        "rewards/chosen": 1, "rewards/rejected": 0.5, "rewards/sft": 0, "rewards/scored": 0.25,
        "rewards/mean": (1 + 0.5 + 0 - 0.5 + 1) / 5, "target/mean": (1 + 0 + 1 + 0.25 + 0.75) / 5,
        "score_mse": sum(errors) / 4, "rewards/margins": 1.0, "rewards/accuracies": 1.0})


def test_a_pair_in_the_wrong_order_is_inaccurate_and_a_tie_does_not_count():
    """Ratings turned round in the first pair, equal in the second: one pair counts, at -.5. It
    counts half where the implicit rewards are equal.
    Red: evaluate.py:measure_rewards: `if rewards[i] != rewards[i + 1]]` -> `if 1]`
    Red: evaluate.py:measure_rewards: `(margins.sign() + 1) / 2` -> `margins.sign()`
    Red: evaluate.py:measure_rewards: `(margins.sign() + 1) / 2` -> `(margins > 0).float()`"""
    found = measure(rewards=torch.tensor([0.0, 1.0, 1.0, 0.5, 0.5]))
    assert (found["rewards/margins"], found["rewards/accuracies"]) == (-0.5, 0.0)
    alone = measure(rewards=torch.tensor([0.5, 0.5, 1.0, 0.5, 0.5]))
    assert alone.keys() == found.keys() - {"rewards/margins", "rewards/accuracies"}
    assert measure(ref_logps=LOGPS)["rewards/accuracies"] == 0.5


def test_what_needs_a_reference_or_feedback_is_left_out_without_it():
    """Red: evaluate.py:measure: `if ref_logps is None:` -> `if 0:`
    Red: evaluate.py:measure: `if kind not in ("sft", "sampled")` -> `if kind`"""
    assert measure(ref_logps=None).keys() == {
        "logps/chosen", "logps/rejected", "logps/sft", "logps/scored", "target/mean"}
    assert measure([2], ()).keys() == {
        "logps/sft", "dlogp/sft", "rewards/sft", "rewards/mean", "target/mean"}


def test_pair_starts_counts_rows_across_units():
    """Red: evaluate.py:pair_starts: `== (0, 2)` -> `== (1, 2)`"""
    assert evaluate.pair_starts([(7,), (7, 7), (7,), (7, 7), (7, 7)]) == [1, 4, 6]


def test_held_out_numbers_do_not_depend_on_the_budget(base, adapted, files):
    """Red: evaluate.py:held_out: `in zip(*parts, strict=True)` -> `in zip(*parts[:9])`"""
    mixture = units(base, *(files / f"{n}.jsonl" for n in ("demonstrations", "scores", "pairs")))
    one, many = (evaluate.held_out(adapted.double(), mixture, 0.3, n) for n in (10**6, 1))
    assert len(one) == 21 and one == pytest.approx(many, abs=1e-6, rel=1e-6)


def test_baselines_are_the_variance_and_the_distance_from_one_half(base, adapted, files):
    """Scores 0, 1/4, 2/4, 3/4, 1 equally often: mean 1/2, so both are (4 + 1 + 0 + 1 + 4) / 16 / 5;
    labels are 1 in 26 of 40 rows: variance p (1 - p), while (r - 1/2)^2 is always 1/4.
    Red: evaluate.py:held_out: `given.var(correction=0)` -> `given.var()`
    Red: evaluate.py:held_out: `(given - 0.5)` -> `(given - given.mean())`"""
    scores, labels = (evaluate.held_out(adapted, units(base, files / f"{n}.jsonl"), 0.3, 10**6)
                      for n in ("scores", "labels"))
    assert scores["score_mse/mean"] == scores["score_mse/half"] == pytest.approx(10 / 80)
    assert labels["score_mse/mean"] == pytest.approx(26 / 40 * 14 / 40)
    assert labels["score_mse/half"] == 0.25


def test_held_out_loss_is_equation_7_and_likelihood_is_per_token_of_good_rows(base, adapted, files):
    """With dropout off, and the model left in training as it was; margins are those of the pairs.
    Red: evaluate.py:held_out: `pair_starts(units), beta` -> `pair_starts(units[1:]), beta`
    Red: evaluate.py:held_out: `net.eval()` -> `pass`
    Red: evaluate.py:held_out: `net.train(training)` -> `pass`
    Red: evaluate.py:held_out: `k in ("sft", "chosen")` -> `k in ("sft", "rejected")`
    Red: evaluate.py:held_out: `losses.uft(` -> `losses.uft_bce(`"""
    rows = [e for unit in units(base, files / "pairs.jsonl") for e in unit]
    batch = tokens.collate(rows)
    with torch.no_grad():
        logps, ref_logps, _, mask, _ = scoring.score(adapted, batch, reference=True)
    for layer in lora.adapters(adapted.train()).values():
        layer.dropout = 0.5
    found = evaluate.held_out(adapted, data.grouped(rows), 0.3, 10**6)
    assert adapted.training and found["uft_loss"] == pytest.approx(
        losses.uft(logps, ref_logps, batch.rewards, 0.3).mean().item(), rel=1e-5)
    change = logps - ref_logps
    assert found["rewards/margins"] == pytest.approx(
        0.3 * (change[::2] - change[1::2]).mean().item(), rel=1e-4)
    assert found["nll_per_token"] == pytest.approx(
        -(logps[::2].sum() / mask[::2].sum()).item(), rel=1e-5)


def test_the_command_prints_the_numbers_of_every_file(base, adapted, files, tmp_path, capsys):
    """Red: evaluate.py:main: `lora.load(net, args.adapter)` -> `pass`
    Red: evaluate.py:main: `            if asked:` -> `            if not asked:`
    Red: evaluate.py:main: `map(Path, args.data)` -> `map(Path, args.data[:1])`
    Red: evaluate.py:main: `sum(values) / len(rows)` -> `sum(values)`
    Red: evaluate.py:main: `note.get(name, '')` -> `''`"""
    (tmp_path / "choices.csv").write_text(CHOICES, "utf-8")
    (tmp_path / "asked.jsonl").write_text(ASKED, "utf-8")
    lora.save(adapted, tmp_path / "adapter", "tiny")
    paths = [files / "scores.jsonl", tmp_path / "choices.csv", tmp_path / "asked.jsonl"]
    flags = [word for path in paths for word in ("--data", str(path))]
    evaluate.main(["--model", str(base), "--adapter", str(tmp_path / "adapter"), "--template",
                   "plain", "--limit", "2", "--beta", "0.3", *flags])
    told, chat = capsys.readouterr().out, tokens.Chat(base, "plain")
    want = evaluate.held_out(adapted, units(base, paths[0])[:2], 0.3, 10**6)
    found = questions.ask(adapted, chat, questions.read(paths[1]))[0]
    want |= {name: sum(values) / 2 for name, values in found.items()}
    assert "scores.jsonl: 2 rows" in told and "choices.csv: 2 questions" in told
    assert all(f"  {name:<20} {value:.4f}\n" in told for name, value in want.items())
    assert f"  {'correct':<20} 0.5000 of 2 questions\n" in told


def test_five_hundred_log_probs_of_a_bfloat16_model_are_added_in_float32():
    """One by one in bfloat16 they would be off by a fiftieth.
    Red: scoring.py:score: `Scores(token_logps.sum` -> `Scores(token_logps.bfloat16().sum`
    Red: scoring.py:score: `Scores(token_logps.sum` -> `Scores(token_logps.bfloat16().sum`"""
    net = tiny.transformer(dtype=torch.bfloat16, max_position_embeddings=600)
    lora.inject(net, 2, 4.0)
    row = tokens.Encoded([i % 20 + 3 for i in range(503)], 3, 1.0, "sft", "f:1", ())
    scores = scoring.score(net, tokens.collate([row]), reference=True)
    exact = scores.token_logps.double().sum(-1)
    torch.testing.assert_close(scores.logps.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(scores.ref_logps.double(), exact, rtol=1e-6, atol=0)
    wrong = torch.tensor(0.0, dtype=torch.bfloat16)
    for logp in scores.token_logps[0].bfloat16():
        wrong += logp
    assert abs(wrong.double() / exact - 1) > 0.02


def test_measuring_is_exact_in_float64():
    """A bit of rounding would show: u = beta (logps - ref_logps) of one row, alone.
    Red: losses.py:implicit_reward: `(logps - ref_logps)` -> `(logps - ref_logps).float()`"""
    net, (ids, mask) = tiny.transformer(), tiny.batch(((3, 4),))
    lora.inject(net, 2, 4.0, generator=torch.Generator().manual_seed(0))
    lora.adapters(net)["model.layers.1.mlp.up_proj"].lora_B.data.fill_(0.1)
    batch = tokens.Batch(ids, mask, torch.tensor([1.0]), ("sft",), None)
    logps, ref_logps, *_ = scoring.score(net, batch, reference=True)
    found = evaluate.measure(logps, ref_logps, batch.rewards, batch.kinds, (), 0.3)
    assert found["rewards/sft"] == pytest.approx(0.3 * (logps - ref_logps).item(), rel=1e-14)


def test_numbers_of_a_policy_that_gives_none_are_refused(base, adapted, files):
    """No mean may hold a NaN: the first such row is named.
    Red: evaluate.py:held_out: `check_finite(sum(others, logps),` -> `(lambda *_: 0)(logps,`
    Red: evaluate.py:check_finite: `rows[bad[0]].where` -> `rows[-1].where`"""
    for layer in lora.adapters(adapted).values():
        layer.lora_B.data.fill_(1e38)
    with pytest.raises(ValueError, match=r"scores.jsonl:1: the log-prob .* \(and of 39 more\)"):
        evaluate.held_out(adapted, units(base, files / "scores.jsonl"), 0.1, 999)


def test_rows_beyond_the_context_are_too_long_by_default(base, files, tmp_path, capsys):
    """And a --max_length beyond it is refused.
    Red: evaluate.py:main: `min(2048, context)` -> `2048`
    Red: evaluate.py:main: `if longest > context` -> `if 0`"""
    path, flags = tmp_path / "rows.jsonl", ["--model", str(base), "--template", "plain"]
    path.write_text('{"prompt": "q", "response": "a"}\n'
                    '{"prompt": "q", "response": "%s"}\n' % ("one two " * 99))
    evaluate.main([*flags, "--data", str(path)])
    assert f"{path}: 1 rows, 1 too long" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate.main([*flags, "--data", str(path), "--max_length", "129"])
    assert "--max_length 129 is more than the model's context of 128" in capsys.readouterr().err
