"""The lab's arithmetic: budgets, intervals, what each arm trains on, and one cell of the tables."""
import itertools
import math
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

import lora
import model
import objectives
import train
from lab import (
    beta,
    experiment,
    measure,
    mixture,
    saturation,
    scores,
    shapes,
    summary,
    tables,
    world,
)
from lab.experiment import Stage

MIXED = Stage("uft", "both", 5e-3, 0.1, sizes=(64, 64))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the lab's workers run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache of its own: nothing of the user's is read or written."""
    patch = pytest.MonkeyPatch()
    patch.setattr(experiment, "CACHE", tmp_path_factory.mktemp("lab"))
    yield
    patch.undo()


def test_every_arm_tries_the_same_number_of_settings():
    """Red: lab/tables.py: `USUAL = grid((3e-3, 5e-3,` -> `USUAL = grid((5e-3,`"""
    tables.check_budget(tables.ARMS)


def test_an_arm_that_tries_more_settings_is_refused():
    """Red: lab/tables.py:check_budget: `if wrong:` -> `if not wrong:`
    Red: lab/tables.py:check_budget: `!= BUDGET}` -> `< BUDGET}`"""
    arms = {"sft": tables.ARMS["sft"]}
    tables.check_budget(arms)
    with pytest.raises(ValueError, match="every arm must try 8 settings.*'more': 9"):
        tables.check_budget(arms | {"more": (None, [(i, 0.1) for i in range(9)])})


def test_an_interval_is_student_s():
    """Red: lab/summary.py:interval: `/ (count - 1)` -> `/ count`
    Red: lab/summary.py:interval: `count - 2` -> `count - 1`
    Red: lab/summary.py:interval: `variance / count` -> `variance`"""
    mean, half = summary.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))  # sd 1, t(2) = 4.303
    assert summary.interval([5.0]) == (5.0, math.inf)


def test_a_difference_is_paired_by_seed():
    """Red: lab/summary.py:difference: `x[name] - y[name]` -> `x[name] - b[0][name]`"""
    a, b = ([{"truth": v} for v in values] for values in ((1.0, 5.0, 3.0), (0.0, 4.0, 2.0)))
    assert summary.difference(a, b, "truth") == (1.0, 0.0)


def test_a_difference_is_starred_where_its_interval_excludes_zero():
    """Red: lab/summary.py:cell: `abs(mean) > half` -> `abs(mean) < half`"""
    assert summary.cell(0.1, 0.05, "truth", True) == "+10.0 +- 5.0*"
    assert summary.cell(0.1, 0.15, "truth", True) == "+10.0 +- 15.0"
    assert summary.cell(1.5, 0.1, "kl_base") == "1.50 +- 0.10"


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_best_of_k_is_the_mean_over_all_choices_of_k(k):
    """Red: lab/summary.py:best_of: `math.comb(i, k - 1)` -> `math.comb(i, k)`
    Red: lab/summary.py:best_of: `/ math.comb(n, k)` -> `/ n`"""
    values = [3.0, 1.0, 4.0, 1.5]
    drawn = [max(c) for c in itertools.combinations(values, k)]
    assert summary.best_of(values)[k - 1] == pytest.approx(sum(drawn) / len(drawn))


ARMS = {f"tables, {n}": arm(tried[0], [Stage("sft", "demonstrations", 5e-3)])
        for n, (arm, tried) in tables.ARMS.items()} | {
    f"{m.__name__}, {n}": stages for m in (scores, mixture, shapes, beta)
    for n, stages in m.arms().items()}


@pytest.mark.parametrize("name", [n for n in ARMS if n.startswith("tables")])
def test_every_arm_of_the_tables_moves_the_policy_on_its_own_rows(name):
    """Red: lab/experiment.py:fit: `lora.merge(net)` -> `pass`
    Red: lab/experiment.py:fit: `next(batches[step % len(batches)])` -> `[]`"""
    stage = replace(ARMS[name][-1], steps=2, sizes=(64, 64))
    net = model.load(measure.BASE, torch.float32)
    experiment.fit(net, stage, 1)
    weight = "model.layers.0.self_attn.q_proj.weight"
    assert not lora.adapters(net)
    assert not torch.equal(net.state_dict()[weight], measure.base().state_dict()[weight])


KINDS = {"demonstrations": {"sft"}, "feedback": {"scored"}, "both": {"sft", "scored"},
         "good": {"sft", "chosen"}}


@pytest.mark.parametrize("rows", list(KINDS))
def test_an_arm_trains_on_the_rows_it_names(rows):
    """Red: lab/experiment.py:units: `e.reward >= 0.75` -> `e.reward >= 0.25`
    Red: lab/experiment.py:units: `* (stage.rows != "feedback")` -> `* 1`
    Red: lab/experiment.py:units: `* (stage.rows != "demonstrations")` -> `* 0`"""
    loss = "sft" if rows in ("demonstrations", "good") else "uft"
    found = [e for u in experiment.units(replace(MIXED, loss=loss, rows=rows), 1) for e in u]
    assert {e.kind for e in found} == KINDS[rows]
    given = measure.encoded(world.feedback(world.build(0), 1, 32))
    good = sum(e.reward >= 0.75 for e in given)
    counts = {"demonstrations": 64, "feedback": 64, "both": 128, "good": 64 + good}
    assert len(found) == counts[rows] and 0 < good < 64


def test_the_penalised_step_is_sft_plus_the_exact_kl():
    """Against autograd of the same sum, row by row.
    Red: lab/experiment.py:penalised_step: `(kl_BT - said_BT)` -> `(0 * kl_BT - said_BT)`
    Red: lab/experiment.py:penalised_step: `wanted.beta / 4` -> `wanted.beta / 2`
    Red: lab/experiment.py:penalised_step: `response_mask[:, 1:]` -> `response_mask[:, :-1]`"""
    rows = experiment.units(replace(MIXED, loss="sft", rows="demonstrations"), 1)[:4]
    net = model.load(measure.BASE, torch.float32)
    lora.inject(net, 2, 2, generator=torch.Generator().manual_seed(0))
    weights = [p for p in net.parameters() if p.requires_grad]
    for layer in lora.adapters(net).values():
        layer.lora_B.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    row_losses = []
    for row, in rows:
        ids = torch.tensor([row.ids])
        with torch.no_grad(), lora.disabled(net):
            ref = net.logits(net(ids))[0].log_softmax(-1)
        logp = net.logits(net(ids))[0].log_softmax(-1)
        row_losses += [(logp[t - 1].exp() * (logp[t - 1] - ref[t - 1])).sum()
                       - logp[t - 1, row.ids[t]] for t in range(row.prompt_len, len(row.ids))]
    expected = torch.autograd.grad(0.3 / 4 * sum(row_losses) / 4, weights)
    seen = []
    optimizer = torch.optim.SGD(weights, lr=1.0)
    optimizer.step = lambda: seen.extend(p.grad.clone() for p in weights)
    wanted = experiment.settings(replace(MIXED, beta=0.3), 0)
    experiment.penalised_step(net, optimizer, rows, wanted, 0.1)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(seen, expected, strict=True))


class FailingPool:
    """Stands in for ProcessPoolExecutor: every job fails, `cancelled` is what was asked then."""

    cancelled = None

    def __init__(self, workers, context, start, given):
        assert (workers, start, given) == (1, experiment.start_worker, (experiment.CACHE,))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def submit(self, *job):
        future = Future()
        future.set_exception(KeyError("a job failed"))
        return future

    def shutdown(self, wait, cancel_futures):
        FailingPool.cancelled = cancel_futures


def test_a_failed_job_stops_the_rest(monkeypatch):
    """Red: lab/experiment.py:run_all: `cancel_futures=True` -> `cancel_futures=False`
    Red: lab/experiment.py:run_all: `start_worker, (CACHE,)` -> `start_worker, (BASE,)`"""
    monkeypatch.setattr(experiment, "ProcessPoolExecutor", FailingPool)
    with pytest.raises(KeyError, match="a job failed"):
        experiment.run_all([([MIXED], seed, "test") for seed in range(5)], 1, "")
    assert FailingPool.cancelled is True


def test_equal_runs_have_equal_names_and_others_do_not():
    """Red: lab/experiment.py:key: `seed, split])` -> `seed])`
    Red: lab/experiment.py:key: `for s in stages]` -> `for s in stages[:1]]`"""
    runs = [([MIXED], 1, "test"), ([MIXED], 1, "validation"), ([MIXED], 2, "test"),
            ([MIXED, MIXED], 1, "test"), ([replace(MIXED, lr=1e-3)], 1, "test")]
    assert len({experiment.key(*run) for run in runs}) == len(runs)
    assert experiment.key(*runs[0]) == experiment.key([replace(MIXED)], 1, "test")


@pytest.mark.parametrize("name", list(ARMS))
def test_every_arm_names_a_loss_and_sees_as_many_rows_a_step(name):
    """Two passes of pairs would be two times the rows of one pass of answers.
    Red: lab/tables.py: `after_sft("dpo", "feedback", 16)` -> `after_sft("dpo", "feedback", 32)`
    Red: lab/scores.py:arms: `0.1, batch=16)` -> `0.1)`"""
    for stage in ARMS[name]:
        assert stage.loss == "sft_kl" or stage.loss in train.LOSSES | experiment.OWN
        given = experiment.units(replace(stage, sizes=(64, 64)), 1)
        assert len(given[0]) * stage.batch == 32


def gradients(name, beta, gains, rewards, kinds):
    """dL/dlogps of a loss of the lab, by autograd."""
    logps = torch.tensor(gains, dtype=torch.float64, requires_grad=True)
    terms = objectives.Terms(
        logps, torch.zeros_like(logps), None, None, None, None, torch.tensor(rewards).double(),
        kinds, torch.zeros(()), 1.0, experiment.settings(MIXED, 0).__class__(
            model="m", data=("d",), beta=beta))
    (train.LOSSES | experiment.OWN)[name].loss(terms).sum().backward()
    return logps.grad


@pytest.mark.parametrize("name", ["sft_una", "sft_quarter", "uft_bce_half", "kto_rows", "sft_stop",
                                  "weighted_sft", "uft"])
def test_a_fresh_demonstration_has_the_same_weight_in_every_loss_of_the_lab(name):
    """Red: lab/experiment.py: `(*objectives.row(t)) / 2` -> `(*objectives.row(t)) / 1`
    Red: lab/experiment.py: `t.config.beta / 2 * (t.rewards` -> `t.config.beta * (t.rewards`
    Red: lab/experiment.py: `< 2, t.config.beta / 4, 0.0)` -> `< 2, t.config.beta, 0.0)`"""
    found = gradients(name, 0.3, [0.0], [1.0], ("sft",))
    assert found.item() == pytest.approx(-0.3 / 4)


def test_weighted_sft_is_the_limit_of_uft_for_small_beta():
    """Red: lab/experiment.py: `(t.rewards - 0.5) * losses.sft` -> `t.rewards * losses.sft`"""
    rows = [2.0, -3.0, 1.0], [1.0, 0.2, 0.5], ("sft", "scored", "scored")
    small = 1e-6
    limit, uft = (gradients(n, small, *rows) / small for n in ("weighted_sft", "uft"))
    assert torch.allclose(limit, uft, atol=1e-5)


def test_sft_stop_lets_a_row_go_at_two_over_beta():
    """Red: lab/experiment.py: `(t.logps - t.ref_logps) < 2` -> `(t.logps - t.ref_logps) < 20`"""
    found = gradients("sft_stop", 0.5, [3.9, 4.1], [1.0, 1.0], ("sft", "sft"))
    assert found.tolist() == [-0.125, 0.0]


def test_the_mixed_loss_is_sft_on_demonstrations_and_una_on_scores():
    """Red: lab/experiment.py:is_demonstration: `k == "sft"` -> `k != "sft"`"""
    rows = [2.0, 2.0], [1.0, 0.2], ("sft", "scored")
    mixed, uft = gradients("sft_una", 0.3, *rows), gradients("uft", 0.3, *rows)
    assert mixed.tolist() == [pytest.approx(-0.3 / 4), pytest.approx(uft[1].item())]


@pytest.mark.parametrize("kind", scores.KINDS)
def test_scores_keep_their_rows_and_mean(kind):
    """Shuffled scores are those of the same prompt; a constant is their mean.
    Red: lab/experiment.py:rescored: `rows[i ^ 1].reward` -> `rows[i - 1].reward`
    Red: lab/experiment.py:rescored: `float(r > 0.5)` -> `float(r < 0.5)`
    Red: lab/experiment.py:rescored: `[mean]` -> `[0.5]`
    Red: lab/experiment.py:rescored: `r - mean + 0.5` -> `r - mean`"""
    rows = measure.encoded(world.feedback(world.build(0), 3, 200))
    changed = experiment.rescored(rows, kind, 3)
    assert [e.ids for e in changed] == [e.ids for e in rows]
    pairs = list(zip(changed[0::2], changed[1::2], rows[0::2], rows[1::2], strict=True))
    if kind in ("given", "shuffled"):
        assert all({a.reward, b.reward} == {c.reward, d.reward} for a, b, c, d in pairs)
        assert (kind == "given") == all(a.reward == c.reward for a, _, c, _ in pairs)
    elif kind == "binary":
        assert all(a.reward == (b.reward > 0.5) for a, b in zip(changed, rows, strict=True))
    elif kind == "constant":
        assert {e.reward for e in changed} == {sum(e.reward for e in rows) / len(rows)}
    else:
        assert sum(e.reward for e in changed) / len(changed) == pytest.approx(0.5)
        assert len({round(a.reward - c.reward, 9) for a, _, c, _ in pairs}) == 1


def test_interleaved_steps_alternate_between_the_two_kinds():
    """Red: lab/experiment.py:halves: `(u[0].kind == "sft") == taught` -> `True`"""
    taught, scored = experiment.halves(experiment.units(replace(MIXED, loss="sft_una"), 1))
    assert {u[0].kind for u in taught} == {"sft"} and {u[0].kind for u in scored} == {"scored"}


def test_a_run_reads_every_row_once_a_pass():
    """Red: lab/experiment.py:stream: `for epoch in itertools.count()` -> `for epoch in (0, 0, 0)`
    Red: lab/experiment.py:stream: `given[row]` -> `given[0]`"""
    batches = experiment.stream([(i,) for i in range(12)], 4, 5)
    first, second = ([u for _ in range(3) for u in next(batches)] for _ in range(2))
    assert sorted(first) == sorted(second) == [(i,) for i in range(12)]
    assert first != second


def test_next_token_kl_is_the_exact_divergence():
    """Red: lab/measure.py:next_token_kl: `(logp.exp() * (logp - logq))` -> `(logp - logq)`
    Red: lab/measure.py:next_token_kl: `response_mask[:, 1:]` -> `response_mask[:, :-1]`"""
    p, q = measure.base(), model.load(measure.BASE, torch.float32)
    q.model.norm.weight.data *= 0.5
    row = measure.held_out("validation")[0][0]
    found = measure.next_token_kl(p, q, [row]).item()
    total = 0.0
    for end in range(row.prompt_len, len(row.ids)):
        ids = torch.tensor([row.ids[:end]])
        a, b = (n.logits(n(ids))[0, -1].softmax(-1).double() for n in (p, q))
        total += (a * (a / b).log()).sum().item()
    assert found == pytest.approx(total, rel=1e-4) and found > 0.01
    assert measure.next_token_kl(p, p, [row]).item() == 0


def test_the_weight_is_the_gradient_of_eq_7_over_a_fresh_demonstration_s():
    """Red: lab/saturation.py:weights: `return 8 *` -> `return 4 *`
    Red: lab/saturation.py:weights: `* (1 - s)).abs()` -> `).abs()`"""
    gains, rewards = [-4.0, 0.0, 6.0], [1.0, 1.0, 0.3]
    found = gradients("uft", 0.3, gains, rewards, ("sft", "sft", "scored")).abs() / (0.3 / 4)
    weight = saturation.weights(torch.tensor(gains).double(), torch.tensor(rewards).double(), 0.3)
    assert torch.allclose(weight, found)


def test_a_later_stage_starts_from_the_merged_earlier_one():
    """Red: lab/experiment.py:policy: `net = policy(stages[:-1], seed)` -> `pass`
    Red: lab/experiment.py:policy: `net.load_state_dict(load_file(path))` -> `pass`"""
    first = replace(MIXED, loss="sft", rows="demonstrations", steps=2)
    idle = replace(MIXED, lr=1e-30, steps=1)  # too small a step for any weight
    alone, then, again = (experiment.policy(s, 1) for s in ([first], [first, idle], [first, idle]))
    for name, weight in alone.state_dict().items():
        assert torch.equal(weight, then.state_dict()[name])
        assert torch.equal(weight, again.state_dict()[name])


def test_a_cell_of_the_tables_is_what_its_command_gives():
    """The arm `uft`, its first seed: trained and measured anew, compared with the record.
    Red: lab/experiment.py:fit: `lora.inject(net, 16, 16` -> `lora.inject(net, 16, 8`
    Red: lab/measure.py:measure: `for name in ("truth",` -> `for name in ("facts",`"""
    held = summary.load("tables")
    setting = tables.best(held["tuned"]["uft"])
    found = experiment.run(tables.ARMS["uft"][0](setting, []), held["seeds"][0], "test")
    for name, value in held["rows"]["uft"][0].items():
        loose = 0.02 if name in ("nll", "mc2", "kl_text") else 0.1  # greedy words can flip
        loose = 0.3 if name in ("kl_policy", "kl_base") else loose  # 120 samples
        assert found[name] == pytest.approx(value, rel=loose, abs=loose / 2), name
