"""Theorems about what charts draw: bands, bins, baselines, the curves of theory."""
import math
import re

import calculus
import pytest
import torch

import charts
import config
import curves
import losses
import objectives

PLAIN = {"loss": "uft", "beta": 0.3, "label_smoothing": 0.1}
OFFLINE = ("uft", "uft_bce", "una_binary", "bco_pair", "sft", "dpo", "una_pair", "ipo")


def terms(loss, rewards=calculus.RATINGS):
    """Six rows in pairs, of calculus.py, as `loss` would read them."""
    setup = config.Config("m", ("d",), loss=loss, beta=calculus.BETA, label_smoothing=0.1,
                          desirable_weight=1.5, undesirable_weight=0.5)
    token_logps = calculus.LOGPS[:, None] / 4 * torch.ones(4)
    return objectives.Terms(
        calculus.LOGPS, calculus.REF, token_logps, torch.ones(6, 4).bool(), None, None, rewards,
        ("chosen", "rejected") * 3, calculus.real(0.4)[0], 4.0, setup)


def places(path):
    return [tuple(map(float, p.split())) for p in re.findall(r"[\d.]+ [\d.]+", path)]


@pytest.mark.parametrize("name", [n for n in calculus.ROWS if n in objectives.LOSSES
                                  and n not in ("dpo", "dro", "orpo", "reward_model", "simpo")])
def test_the_weight_of_a_row_is_the_size_of_its_slope(name):
    """Which tests/test_losses*.py prove to be the closed forms; the graph of the terms is whole.
    Red: objectives.py:weights: `return of_row.abs()` -> `return of_row`
    Red: objectives.py:weights: `.sum()` -> `.mean()`"""
    given = terms(name, calculus.LABELS.double() if name == "kto" else calculus.RATINGS)
    found = objectives.weights(objectives.LOSSES[name], given)
    calculus.close(found, calculus.slopes(name).abs(), 1e-12)
    assert not given.logps.requires_grad


def test_a_loss_of_single_tokens_gives_rows_no_weight():
    """Red: objectives.py:weights: `any(g is not None for g in of_token)` -> `0`
    Red: objectives.py:weights: `torch.full_like(terms.logps, math.nan)` -> `of_row`"""
    found = objectives.weights(objectives.LOSSES["sft_token_mean"], terms("sft_token_mean"))
    assert found.shape == (6,) and found.isnan().all()


@pytest.mark.parametrize("loss", OFFLINE)
def test_the_curve_of_theory_goes_through_every_measured_weight(loss):
    """Red: curves.py: `"uft": lambda s, r, beta: 2 * beta` -> `"uft": lambda s, r, beta: beta`
    Red: curves.py: `"uft_bce": lambda s, r, beta: beta *` -> `"uft_bce": lambda s, r, beta:`
    Red: curves.py: `beta * abs(sigmoid(-z) - e)` -> `beta * abs(sigmoid(-z))`
    Red: curves.py: `abs(2 * z - 1) / beta` -> `abs(2 * z - 2) / beta`
    Red: curves.py:sigmoid: `math.tanh(u / 2)` -> `math.tanh(u)`"""
    given = terms(loss, torch.tensor([1.0, 0, 1, 0, 1, 0]).double()
                  if loss == "bco_pair" else calculus.RATINGS)
    found = objectives.weights(objectives.LOSSES[loss], given).tolist()
    u = losses.implicit_reward(given.logps, given.ref_logps, calculus.BETA).tolist()
    if loss in curves.MARGINS:
        want = [curves.MARGINS[loss](a - b, calculus.BETA, 0.1)
                for a, b in zip(u[::2], u[1::2], strict=True)]
        assert found[::2] == found[1::2] == pytest.approx(want, rel=1e-12)
    else:
        assert found == pytest.approx([curves.WEIGHTS[loss](curves.sigmoid(x), r, calculus.BETA)
                                       for x, r in zip(u, given.rewards.tolist(), strict=True)])


def test_sigmoid_does_not_overflow():
    """Red: curves.py:sigmoid: `0.5 * (1 + math.tanh(u / 2))` -> `1 / (1 + math.exp(-u))`"""
    assert [curves.sigmoid(u) for u in (-1e4, 0, 1e4)] == [0, 0.5, 1]
    assert curves.sigmoid(1.3) == pytest.approx(1 / (1 + math.exp(-1.3)))


@pytest.mark.parametrize("loss", ["uft", "uft_bce", "una_binary", "dpo"])
def test_baselines_are_the_reference_and_the_best_of_all_constants(loss):
    """Tried out: the loss of rows that all have the implicit reward 0, or c, for many c. Of DPO,
    which reads differences, every constant is the reference.
    Red: curves.py:baselines: `start - (0.5 - mean) ** 2` -> `start - mean ** 2`
    Red: curves.py:baselines: `-sum(p * math.log(p)` -> `sum(p * math.log(p)`
    Red: curves.py:baselines: `{"reference": start}` -> `{}`"""
    given, objective = terms(loss), objectives.LOSSES[loss]
    setup, ratings = given.config, given.rewards
    start = torch.as_tensor(objective.start(ratings, setup)).mean().item()
    found = curves.baselines([{"loss/start": start, "target/mean": ratings.mean().item()}] * 3,
                             PLAIN | {"loss": loss}, {})
    grid = [objective.loss(given._replace(logps=given.ref_logps + c / 100 / setup.beta)
                           ).mean().item() for c in range(-300, 300)]
    if loss == "dpo":  # smoothed here, which leaves log 2 at the reference
        assert found == {"reference": pytest.approx(grid[0])}
    else:
        assert found == {"reference": pytest.approx(grid[300]),
                         "best constant": pytest.approx(min(grid), abs=1e-5)}


def test_sampled_rows_have_no_constant_baseline_and_sft_a_measured_one():
    """Red: curves.py:baselines: ` and "reward" not in r` -> ``
    Red: curves.py:baselines: `{"reference": looked["reference_loss"]} if` -> `{} if`"""
    row = {"loss/start": 0.2, "target/mean": 0.5}
    assert curves.baselines([row | {"reward": 0.1}], PLAIN, {}) == {}
    assert curves.baselines([{}], PLAIN, {"reference_loss": 8.5}) == {"reference": 8.5}
    assert curves.baselines([row], PLAIN | {"loss": "dro"}, {})["best constant"] == \
        pytest.approx(0.2 - 0.25 / 2)


def test_bins_are_the_means_of_equally_many_rows_in_order():
    """Twenty rows (i/20, 1 if i is 3 mod 4): pairs of neighbours; seven rows are seven bins; eleven
    rows in three bins are 4, 3 and 4.
    Red: charts.py:bins: `sorted(pairs)` -> `list(pairs)`
    Red: charts.py:bins: `sum(part) / (b - a)` -> `sum(part) / 2`
    Red: charts.py:bins: `min(count, len(pairs))` -> `count`"""
    rows = [(i / 20, float(i % 4 == 3)) for i in range(20)]
    found = charts.bins(rows[::-1])
    assert [y for _, y in found] == [0, 0.5] * 5
    assert [x for x, _ in found] == pytest.approx([(2 * i + 0.5) / 20 for i in range(10)])
    assert charts.bins(rows[:7]) == rows[:7]
    some = [(float(i), float(i * i)) for i in range(11)]
    assert charts.bins(some, 3) == [(1.5, 14 / 4), (5, (16 + 25 + 36) / 3), (8.5, 294 / 4)]


def test_a_band_runs_along_its_upper_edge_and_back_along_the_lower():
    """Of a metric with quantiles; its dots give way to it.
    Red: charts.py:path: `[(x, high) for x, _, high` -> `[(x, high) for x, high, _`
    Red: charts.py:path: `reversed(mark.points)` -> `mark.points`
    Red: curves.py:over_steps: `for p in (1, 9)` -> `for p in (9, 1)`"""
    rows = [{"step": i, "rewards/sft": 1.0 * i, "rewards/sft/p10": i - 1.0,
             "rewards/sft/p90": i + 2.0} for i in (1, 2, 3)]
    text = curves.over_steps(rows, PLAIN, {})
    band, = (places(p) for p in re.findall(r'class="band" fill="[^"]*" d="([^"]*)"', text))
    line, = (places(p) for p in re.findall(r'class="line" stroke="[^"]*" d="([^"]*)"', text))
    assert 'class="dots"' not in text
    assert [x for x, _ in band] == [x for x, _ in line] + [x for x, _ in line[::-1]]
    up = [a[1] - b[1] for a, b in zip(line, band[:3], strict=True)]
    down = [b[1] - a[1] for a, b in zip(line, band[:2:-1], strict=True)]
    assert up == pytest.approx([2 * d for d in down], abs=0.2) and min(down) > 10


def test_labels_of_the_baselines_stand_at_opposite_ends_inside_the_drawing():
    """Red: charts.py:labels: `-(number + 1) % 2` -> `0`
    Red: charts.py:labels: `max(y - 4, TOP + 10)` -> `y - 40`"""
    rows = [{"step": i, "loss": 0.2, "loss/start": 0.25, "target/mean": 0.75} for i in (1, 2, 3)]
    text = curves.over_steps(rows, PLAIN, {})
    found = re.findall(r'label" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]*)', text)
    (x, y, side, name), (x2, y2, side2, name2) = found
    assert (name, side, name2, side2) == (
        "reference 0.25", "end", "best constant 0.188", "start")
    assert float(x2) < charts.WIDTH / 4 < float(x) and charts.TOP < float(y) < float(y2)


def test_nothing_is_calibrated_where_all_targets_are_one():
    """Red: curves.py:calibration: `len(set(rows["reward"])) < 2` -> `0`"""
    rows = {"kind": ["sft"] * 3, "reward": [1.0] * 3, "implicit_reward": [0.1, 0.2, 0.3]}
    assert curves.calibration(rows) == ""
    assert "Calibration" in curves.calibration(rows | {"reward": [1.0, 0.5, 1.0]})
