"""Theorems about what a run leaves of its rows: quantiles, weights, positions; a page of each loss.

What a row's weight is, tests/test_charts.py asks.
"""
import json
from html.parser import HTMLParser

import pytest
import tiny
import torch

import anatomy
import config
import data
import evaluate
import exam
import lora
import objectives
import scoring
import tokens
import train

FILE = {loss: {"rows": "scores", "prompts": "demonstrations"}.get(o.reads, o.reads)
        for loss, o in objectives.LOSSES.items()}
VOID = {"meta", "path", "br"}
KINDS = ("sft", "scored", "sft", "sft", "scored", "sft")
U = torch.tensor([0.0, 1.0, 0.5, 1.0, 3.0, 1.5])


class Page(HTMLParser):
    """Whether every element is closed in turn; ids, tags and text as they are met."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.said = [], [], set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        """A start, which void elements leave open."""
        self.tags.add(tag)
        self.ids += [v for k, v in attrs if k == "id"]
        self.open += [tag] * (tag not in VOID)

    def handle_startendtag(self, tag, attrs):
        """An element that closes itself."""
        self.tags.add(tag)
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_endtag(self, tag):
        """The end of the newest element that is open."""
        assert self.open.pop() == tag

    def handle_data(self, text):
        """What a reader sees."""
        self.said.append(text)


def held(base, *names):
    """(units, settings) of files as train.py would hold them out."""
    rows = [e for path in names for e in data.read(path)[0]]
    return data.grouped(tokens.encode_all(rows, tokens.Chat(base, "plain"), 128)[0])


def rows(net, units, loss="uft", **changes):
    return anatomy.rows(net, units, config.Config("m", ("d",), loss=loss, beta=0.3, **changes))


def test_bands_are_the_quantiles_of_each_kind_and_weights_its_mean():
    """sft: 0, .5, 1, 1.5, so p10 lies 3 tenths from 0 to .5; scored: 1 and 3, a tenth of 2 inside.
    Red: evaluate.py:measure_kinds: `u[rows].quantile` -> `u.quantile`
    Red: evaluate.py:measure_kinds: `(1, 9)` -> `(2, 8)`
    Red: evaluate.py:measure_kinds: `weights[rows].mean()` -> `weights.mean()`"""
    weights = torch.tensor([1.0, float("nan"), 2.0, 3.0, 1.0, 6.0])
    found = evaluate.measure_kinds(U, weights, KINDS)
    assert found == pytest.approx({
        "rewards/sft/p10": 0.15, "rewards/sft/p90": 1.35, "rewards/scored/p10": 1.2,
        "rewards/scored/p90": 2.8, "weight/sft": (1 + 2 + 3 + 6) / 4})
    assert evaluate.measure_kinds(None, weights, KINDS).keys() == {"weight/sft"}


@pytest.mark.parametrize("loss", ["uft", "dpo", "sft", "kto"])
def test_rows_are_those_of_the_held_out_numbers_one_by_one(loss, base, adapted, files):
    """Their means are evaluate.held_out's, their log-prob changes add up over positions, and how
    they are cut into micro-batches changes nothing.
    Red: anatomy.py:rows: `terms.token_logps - refs` -> `terms.token_logps`
    Red: anatomy.py:rows: `refs.sum(-1), config.beta` -> `refs.sum(-1), 1.0`
    Red: anatomy.py:rows: `net.train(training)` -> `pass`
    Red: anatomy.py:positions: `if len(c) > place` -> `if 1`
    Red: anatomy.py:rows: `objective.reads)` -> `"rows")`"""
    units = held(base, files / ("demonstrations.jsonl" if loss == "sft" else "pairs.jsonl"))
    found = rows(adapted.train(), units, loss)
    assert adapted.training and len(found["kind"]) == (40 if loss == "sft" else 80)
    want = evaluate.held_out(adapted, units, 0.3, 10**6)
    for kind in set(found["kind"]):
        own = [i for i, k in enumerate(found["kind"]) if k == kind]
        mean = sum(found["implicit_reward"][i] for i in own) / len(own)
        kind = {"scored": "chosen"}.get(kind, kind)
        assert mean == pytest.approx(want[f"rewards/{kind}"], rel=1e-3, abs=1e-5)
    small = rows(adapted, units, loss, micro_batch_tokens=1)
    assert small["weight"] == pytest.approx(found["weight"], rel=1e-3)
    assert min(found["length"]) > 1 and ("reference_loss" in found) == (loss == "sft")
    batch = tokens.collate([e for unit in units for e in unit])
    change = scoring.score(adapted, batch, False)[2] - scoring.reference_logps(adapted, batch)
    first = change.gather(1, batch.response_mask.int().argmax(1)[:, None])[:, 0]
    for kind, at in found["positions"].items():
        own = [i for i, k in enumerate(found["kind"]) if k == kind]
        assert at[0][0] == pytest.approx(first[own].mean().item(), rel=1e-3)


def test_positions_are_means_and_quantiles_over_the_rows_that_reach_them():
    """Eleven rows of sft, 0 to 10 nats at the first token; two reach the second; one of scored.
    Red: anatomy.py:positions: `max(2, len(some) / 5)` -> `1`
    Red: anatomy.py:positions: `here.quantile(0.9)` -> `here.max()`
    Red: anatomy.py:positions: `if k == kind` -> `if k`"""
    changes = [torch.tensor([float(i)] + [2.0] * (i < 3) + [1.0] * (i < 1)) for i in range(11)]
    found = anatomy.positions([*changes, torch.tensor([9.0])], ["sft"] * 11 + ["scored"])
    assert found == {"scored": [], "sft": [[5.0, 1.0, 9.0], [2.0, 2.0, 2.0]]}


def test_no_more_than_a_few_hundred_rows_are_kept():
    """Red: anatomy.py:rows: `ROWS // len(units[0])` -> `ROWS`"""
    net = tiny.transformer(dtype=torch.float32)
    lora.inject(net, 2, 4.0)
    pairs = [tuple(tokens.Encoded([3, 4 + i % 9, 2], 1, r, kind, f"d:{i}", (("user", str(i)),))
                   for r, kind in ((1.0, "chosen"), (0.0, "rejected"))) for i in range(300)]
    assert len(rows(net, pairs, "dpo")["kind"]) == anatomy.ROWS == 400


def test_nothing_is_said_of_rows_that_a_loss_samples_scores_or_cannot_read(adapted, base, files):
    """Red: anatomy.py:rows: `or objective.online` -> ``
    Red: anatomy.py:rows: `not units or` -> ``"""
    units = held(base, files / "pairs.jsonl")
    assert [rows(adapted, u, loss) for u, loss in ((units, "grpo"), ([], "uft"), (
        held(base, files / "demonstrations.jsonl"), "dpo"))] == [{}] * 3


def test_answers_are_as_long_as_their_tokens_and_their_end(base):
    """Red: exam.py:mean_tokens: `len(chat.response_ids(text))` -> `len(text)`"""
    chat = tokens.Chat(base, "plain")
    assert exam.mean_tokens(chat, ["", "one", "!?"]) == pytest.approx(
        sum(len(chat.ids(t)) + 1 for t in ("", "one", "!?")) / 3)


@pytest.mark.parametrize("loss", objectives.LOSSES)
def test_the_page_of_every_loss_is_valid_and_its_first_step_is_that_of_the_reference(
        loss, base, files, tmp_path):
    """Parsed as HTML: no script, elements closed in turn, ids unique, no number that is none. At
    step 1 the loss is loss/start, all implicit rewards are 0, and UFT weighs by beta |1/2 - r| / 2.
    Red: update.py:train_step: `objective.start(about[0], config)` -> `0.125`
    Red: train.py:run: `results["rows"] = anatomy` -> `_ = anatomy`
    Red: page.py:section: `</div><p>` -> `<p>`
    Red: charts.py:chart: `</svg>` -> ``"""
    online = ("--reward", "tiny:letters", "--group", "2", "--response_tokens", "4")
    train.main(["--model", str(base), "--data", f"{files}/{FILE[loss]}.jsonl", "--template",
                "plain", "--max_length", "100", "--held_out", "6", "--sample_tokens", "3",
                "--lora_r", "2", "--lr", "0.05", "--steps", "2", "--loss", loss, "--beta", "0.5",
                "--out", str(tmp_path / "run"),
                *(online if objectives.LOSSES[loss].online else ())])
    text = (tmp_path / "run/report.html").read_text("utf-8")
    page, folder = Page(text), tmp_path / "run"
    assert not page.open and len(page.ids) == len(set(page.ids)) and "script" not in page.tags
    assert "nan" not in "".join(page.said) and "svg" in page.tags and text.count("Good: ") > 4
    result = json.loads((folder / "results.json").read_text("utf-8"))["rows"]
    first = json.loads((folder / "metrics.jsonl").read_text("utf-8").split("\n")[0])
    assert bool(result) == ("Where it changed" in text) == (
        not objectives.LOSSES[loss].online and loss != "reward_model")
    assert ("loss/start" in first) == bool(objectives.LOSSES[loss].start)
    assert first["loss"] == pytest.approx(first.get("loss/start", first["loss"]), rel=1e-5)
    assert all(v == 0 for k, v in first.items() if "/p" in k)
    if loss == "uft":
        off = sum(abs(i % 5 / 4 - 0.5) for i in range(5)) / 5
        assert first["weight/scored"] == pytest.approx(0.5 * off / 2, abs=0.05)
