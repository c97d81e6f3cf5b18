"""The tour says true things: its numbers are read back from its text and worked out again."""
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import model
import scoring
import tokens
from lab import tour as lab_tour

ROOT = Path(__file__).resolve().parent.parent
NUMBER = r"(-?\d+(?:\.\d+)?(?:e[-+]\d+)?)"


@pytest.fixture(scope="module")
def tour():
    """What `python -m lab.tour` prints, by stop: {"1": ..., "2": ...}."""
    began = time.monotonic()
    run = subprocess.run([sys.executable, "-m", "lab.tour"], cwd=ROOT, capture_output=True,
                         text=True, check=True, timeout=120)
    assert run.stderr == "" and time.monotonic() - began < 60
    parts = re.split(r"\n(\d)\. ", run.stdout)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def numbers(text: str, before: str) -> list[float]:
    """The number behind every `before`, and the one behind its arrow, if any."""
    found = re.findall(re.escape(before) + rf"\s*{NUMBER}(?: -> {NUMBER})?", text)
    return [float(x) for pair in found for x in pair if x]


def eq7(gain: float, reward: float, beta: float) -> float:
    """(sigmoid(beta gain) - r)^2, written out once more."""
    return (1 / (1 + math.exp(-beta * gain)) - reward) ** 2


def moves(text: str) -> list[list[float]]:
    """[logps before, after, loss before, after] of every step that `text` tells."""
    arrow = rf"\s+{NUMBER} -> {NUMBER}"
    return [[float(x) for x in found] for found in re.findall(
        rf"logps{arrow}.*?loss{arrow}", text.replace("ref_logps", "ref"), re.DOTALL)]


def test_the_tour_has_nine_stops_in_plain_text_within_a_hundred_columns(tour):
    """Red: lab/tour.py:main: `    show_step(stop, after)` -> `    pass`
    Red: lab/tour.py:show_record: `line, 97` -> `line, 197`"""
    text = "\n".join(tour.values())
    assert list(tour) == list("123456789") and text.isascii()
    assert max(len(line) for line in text.split("\n")) <= 97  # `1. ` is split off


def test_the_scored_rows_of_the_table_are_the_response_and_their_sum_is_logps(tour):
    """Red: tokens.py:collate: `(start <= position)` -> `(start < position)`
    Red: lab/tour.py:show_logps: `digits(stop.scores.logps)` -> `digits(stop.scores.logps / 2)`"""
    rows = re.findall(rf"\n +\d+  '.*?' +(\d+)  (yes|no)(?: +{NUMBER})?(?=\n)", tour["4"])
    given, said = (re.findall(r"\d+", line) for line in re.findall(r"\[(.*)\]", tour["3"]))
    assert [i for i, scored, _ in rows if scored == "no"] == given
    assert [i for i, scored, _ in rows if scored == "yes"] == said
    total = sum(float(x) for _, _, x in rows if x)
    assert total == pytest.approx(numbers(tour["4"], "   logps")[0], abs=1e-5)


def test_the_tour_s_log_probability_is_that_of_the_bundled_base(tour):
    """Red: lab/tour.py:show_record: `data.read(path)[0][0]` -> `data.read(path)[0][1]`
    Red: lora.py:LoRALinear.__init__: `zeros(outputs` -> `ones(outputs`"""
    chat, net = tokens.Chat(ROOT / "lab/base"), model.load(ROOT / "lab/base", torch.float64)
    example = data.read(ROOT / "lab/data/demonstrations.jsonl")[0][0]
    batch = tokens.collate([tokens.encode(example, chat, 96)])
    logps = scoring.score(net, batch, reference=False).logps.item()
    assert repr(example.response) in tour["2"]
    for name in ("   logps", "ref_logps"):
        assert numbers(tour["4"], name) == [pytest.approx(logps, abs=1e-4)]


def test_at_the_start_the_implicit_reward_is_zero_and_the_loss_a_quarter(tour):
    """Red: losses.py:implicit_reward: `logps - ref_logps` -> `logps - 2 * ref_logps`
    Red: losses.py:uft: `- rewards).square()` -> `- 2 * rewards).square()`"""
    assert numbers(tour["5"], "ref_logps) =") == [0] and numbers(tour["5"], "sigmoid(u) =") == [0.5]
    assert numbers(tour["5"], "(s - r)^2 =") == [eq7(0, 1, 0.1)] == [0.25]


def test_gradients_by_hand_are_autograd_s_to_a_millionth(tour):
    """Red: lab/tour.py:eq7: `2 * BETA` -> `BETA`
    Red: lab/tour.py:show_gradient: `logits_SV.softmax(-1))` -> `logits_SV.sigmoid())`
    Red: lab/tour.py:show_gradient: `slope * slopes` -> `2 * slope * slopes`
    Red: losses.py:uft: `.square()` -> `.pow(4)`"""
    hand, auto, most = (numbers(tour["6"], b) for b in ("by hand", "by autograd", "by at most"))
    assert hand[0] == -0.1 / 4 and len(hand) == 3  # 2 beta (s - r) s (1 - s), s = 1/2, r = 1
    assert hand == pytest.approx(auto, abs=1e-6) and max(most) < 1e-6 and min(hand[1:]) > 1e-3
    assert numbers(tour["6"], "dL/dA has norm") == [0]


def test_the_least_likely_token_is_pulled_up_and_its_rival_down(tour):
    """Red: lab/tour.py:show_gradient: `.argmin()` -> `.argmax()`
    Red: lab/tour.py:show_gradient: `one_SV - logits_SV` -> `0 * one_SV - logits_SV`"""
    said, up = re.search(rf"Least likely was ('.*?'): {NUMBER}, to rise", tour["6"]).groups()
    rival, down = re.search(rf"rival ('.*?'): {NUMBER}, to fall", tour["6"]).groups()
    rows = re.findall(rf"('.*?') +\d+  yes +{NUMBER}", tour["4"])
    assert said == min(rows, key=lambda row: float(row[1]))[0] != rival
    assert float(up) < -0.02 and float(down) > 0  # at most beta/4, the more the less likely


def test_after_the_step_every_number_follows_from_the_logps(tour):
    """Red: losses.py:uft: `- rewards).square()` -> `- 1 + rewards).square()`
    Red: lab/tour.py:show_step: `stop.scores.logps, after.logps` -> `after.logps, stop.scores.logps`
    Red: lora.py:disabled: `part.enabled = False` -> `part.enabled = part.enabled`"""
    start, end, before, after = moves(tour["7"])[0]
    ref, still = numbers(tour["7"], "ref_logps")
    assert end > start == ref == still and 0.25 == before > after
    assert numbers(tour["7"], "implicit reward") == [0, pytest.approx(0.1 * (end - ref), abs=2e-6)]
    assert after == pytest.approx(eq7(end - ref, 1, 0.1), abs=2e-6)


def test_the_step_moves_the_weights_of_every_b_by_the_learning_rate_and_no_a(tour):
    """AdamW's first step is rate * gradient / |gradient|; clipping changes no sign.
    Red: lab/tour.py:step: `CONFIG, RATE)` -> `CONFIG, RATE / 2)`
    Red: update.py:train_step: `optimizer.step()` -> `pass`"""
    example = data.read(ROOT / "lab/data/demonstrations.jsonl")[0][0]
    stop = lab_tour.visit(tokens.encode(example, tokens.Chat(lab_tour.BASE), 96))
    adapters = {n: p for n, p in stop.net.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in adapters.items()}
    lab_tour.step(stop)
    rate = numbers(tour["7"], "by about")[0]
    for name, p in adapters.items():
        moved = (p.detach() - start[name]).abs().median().item()
        assert moved == pytest.approx(rate if "lora_B" in name else 0, rel=0.01)


def test_a_score_below_one_half_is_pushed_down_and_one_above_pulled_up(tour):
    """Red: data.py:read_helpsteer: `/ 152` -> `/ 1520`
    Red: lab/tour.py:show_feedback: `slope > 0 else` -> `slope < 0 else`
    Red: lab/tour.py:step: `CONFIG, RATE)` -> `CONFIG, -RATE)`"""
    scores, texts = numbers(tour["8"], "r ="), tour["8"].split("r =")[1:]
    assert 0 < scores[0] < 0.5 < scores[1] < 1
    for r, text, (start, end, before, after) in zip(scores, texts, moves(tour["8"]), strict=True):
        assert ("pushed down" in text, "pulled up" in text) == (end < start, end > start)
        assert (end < start) == (r < 0.5) and after < before
        assert numbers(text, "dL/dlogps =") == [pytest.approx(0.1 / 2 * (0.5 - r), abs=2e-6)]
        assert after == pytest.approx(eq7(end - start, r, 0.1), abs=1e-5)


def test_sft_s_gradient_is_four_over_beta_times_larger_and_the_weight_fades(tour):
    """Red: losses.py:sft: `return -logps` -> `return -2 * logps`
    Red: lab/tour.py:show_sft: `eq7(stop, after)[2]` -> `eq7(stop, stop.scores)[2]`"""
    (ratio,), (quarter,) = numbers(tour["9"], "ratio"), numbers(tour["9"], "beta / 4 =")
    assert ratio == quarter == 0.1 / 4 and numbers(tour["9"], "by at most")[0] < 1e-6
    (ours,), (theirs,) = numbers(tour["9"], "weights: UFT"), numbers(tour["9"], ", SFT")
    assert ours / theirs == pytest.approx(ratio, rel=1e-4)
    start, end, *_ = moves(tour["7"])[0]
    s = 1 / (1 + math.exp(-0.1 * (end - start)))
    faded = float(re.search(rf"that weight\s+is {NUMBER}", tour["9"])[1])
    assert faded == pytest.approx(2 * 0.1 * s * (1 - s) ** 2, abs=2e-6) and faded < quarter
