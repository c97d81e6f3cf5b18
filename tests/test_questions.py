"""Theorems about tests with a right answer: how they are read, asked and compared."""
import json
import math
import re
from pathlib import Path

import folder
import pytest
import torch

import data
import generate
import lora
import questions
import tokens

TRUTHFULQA = Path(__file__).resolve().parents[2] / "shared/data/datasets/truthfulqa/TruthfulQA.csv"
CSV = ("Type,Question,Best Answer,Correct Answers,Incorrect Answers\n"
       'A,"Is it, though?",Yes,No doubt; Yes ;,No;\n'
       "B,Why?,Because,Because,So; Just so\n")
SAID = (("user", "Say one."),)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def as_on_the_hub(question):
    return {"question": question.prompt[0][1]} | {
        name: dict(zip(("choices", "labels"), value, strict=True))
        for name, value in (("mc1_targets", question.mc1), ("mc2_targets", question.mc2))}


def forty(pattern="", mc=()):
    """Questions whose prompts differ in length."""
    return [questions.Question((("user", q * (1 + i % 3)),), pattern, mc, mc)
            for i, (q, _) in enumerate(folder.questions())]


def test_multiple_choice_takes_the_likeliest_and_the_mass_of_the_true():
    """Probabilities 1/8, 1/2, 3/8: the second is likeliest; 1/8 + 3/8 of the mass is true.
    Red: questions.py:multiple_choice: `weighed.argmax()` -> `weighed.argmin()`
    Red: questions.py:multiple_choice: `weighed.softmax(-1)` -> `weighed.exp().softmax(-1)`"""
    logps = {c: math.log(p) - 40 for c, p in (("a", 1 / 8), ("b", 1 / 2), ("c", 3 / 8))}
    for truth, want in (([1, 0, 1], (0, 0.5)), ([0, 1, 0], (1, 0.5)), ([1, 1, 0], (1, 0.625))):
        assert questions.multiple_choice(logps, "abc", truth) == pytest.approx(want, abs=1e-12)


def test_truthfulqa_rows_give_the_best_against_all_false_and_all_true_against_all_false(tmp_path):
    """Blanks around answers go, and the best answer comes once.
    Red: questions.py:hub_form: `a.strip() for a in` -> `a for a in`
    Red: questions.py:hub_form: `if a not in best]` -> `if a]`"""
    path = tmp_path / "q.csv"
    path.write_text(CSV, "utf-8-sig")
    assert [(q.prompt[0][1], q.mc1, q.mc2) for q in questions.read(path)] == [
        ("Is it, though?", (("Yes", "No"), (1, 0)), (("Yes", "No doubt", "No"), (1, 1, 0))),
        ("Why?", *[(("Because", "So", "Just so"), (1, 0, 0))] * 2)]


def test_the_hubs_form_of_multiple_choice_reads_as_the_csv(tmp_path):
    """Red: questions.py:choices: `in ("choices", "labels"))` -> `in ("labels", "choices"))`"""
    (tmp_path / "q.csv").write_text(CSV, "utf-8")
    found = questions.read(tmp_path / "q.csv")
    assert questions.read(write(tmp_path / "q.jsonl", map(as_on_the_hub, found))) == found


@pytest.mark.skipif(not TRUTHFULQA.is_file(), reason="shared data is not here")
def test_the_real_truthfulqa_has_817_questions():
    """Every one with one best answer among its true ones, and at least one false.
    Seen red with `[:1]` behind read(TRUTHFULQA); tests/red.py has no shared data to run it."""
    found = questions.read(TRUTHFULQA)
    assert len(found) == 817 and all(sum(q.mc1[1]) == 1 < len(q.mc1[1]) for q in found)
    assert all(q.mc2[0][0] == q.mc1[0][0] and sum(q.mc2[1]) < len(q.mc2[1]) for q in found)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_choice_is_scored_as_a_response_by_sum_or_by_mean(base, adapted, normalise):
    """With dropout off, and the model left in training as it was.
    Red: questions.py:weigh: `mask.sum(-1) if normalise` -> `1 if normalise`
    Red: questions.py:weigh: `if normalise else 1` -> `if normalise else 2`
    Red: questions.py:weigh: `net.eval()` -> `pass`
    Red: questions.py:weigh: `net.train(training)` -> `pass`
    Red: questions.py:ask: `("mc1", "mc2")` -> `("mc2", "mc1")`"""
    chat, choices, truth = tokens.Chat(base, "plain"), ("one", "one two ten", "six"), (1, 0, 1)
    logps = {}
    for choice in choices:
        row = data.Example(SAID, choice, 1.0, "sft", "")
        batch = tokens.collate([tokens.encode(row, chat, 99)])
        with torch.no_grad():
            total = adapted.response_logps(batch.ids, batch.response_mask)[0].sum().item()
        logps[choice] = total / batch.response_mask.sum().item() if normalise else total
    for layer in lora.adapters(adapted.train()).values():
        layer.dropout = 0.5
    asked = [questions.Question(SAID, "", (choices, truth), (choices, truth))]
    found, texts = questions.ask(adapted, chat, asked, normalise=normalise)
    mc1, mc2 = questions.multiple_choice(logps, choices, truth)
    assert found == {"mc1": [mc1], "mc2": [pytest.approx(mc2, abs=1e-6)]} and texts == []
    assert adapted.training


def test_the_whole_answer_must_match_the_pattern(base, monkeypatch):
    """Lines included: `.*` runs over line ends, and nothing may stand before or behind.
    Red: questions.py:ask: `re.fullmatch` -> `re.match`
    Red: questions.py:ask: `re.fullmatch` -> `re.search`
    Red: questions.py:ask: `, re.DOTALL` -> ``"""
    monkeypatch.setattr(generate, "complete", lambda *_: ["it is\nred ."] * 5)
    patterns = (r"it is\nred \.", r"it.*", r"it is", r"red \.", r".*RED.*")
    asked = [questions.Question(SAID, p) for p in patterns]
    found, texts = questions.ask(None, tokens.Chat(base, "plain"), asked)
    assert found == {"correct": [1, 1, 0, 0, 0]} and texts == ["it is\nred ."] * 5


def test_batches_change_no_answer_and_no_score(base, adapted, monkeypatch):
    """Asked one by one, in batches, or all together: every question gets its own answer.
    Red: questions.py:answer: `for i in range(len(questions))]` -> `for i in order]`
    Red: questions.py:answer: `start : start + BATCH]]` -> `: BATCH]]`
    Red: questions.py:weigh: `asked[int(e.where)]` -> `asked[0]`"""
    chat, net, seen = tokens.Chat(base, "plain"), adapted.double(), []
    mc = (("one", "one two ten", "six"), (1, 0, 1))
    for batch, budget in ((1, 1), (7, 99), (256, 8192)):
        monkeypatch.setattr(questions, "BATCH", batch)
        monkeypatch.setattr(questions, "BUDGET", budget)
        found, texts = questions.ask(net, chat, forty(".*e.*"), 6)
        seen.append((found, texts, questions.ask(net, chat, forty("", mc))[0]))
    alone = [generate.complete(net, chat, [q.prompt], 6)[0] for q in forty(".*")]
    assert all((found, texts) == seen[0][:2] and texts == alone for found, texts, _ in seen)
    assert len(set(alone)) > 9 and 0 < sum(seen[0][0]["correct"]) < 40
    for _, _, weighed in seen:
        assert weighed["mc1"] == seen[0][2]["mc1"]
        assert weighed["mc2"] == pytest.approx(seen[0][2]["mc2"], abs=1e-6)
    assert len(set(seen[0][2]["mc2"])) > 9


def test_the_gain_is_the_mean_change_within_1_96_standard_errors():
    """Changes 1, 1, 0, 0: mean 1/2, variance (4 / 4) / 3 = 1/3, standard error sqrt(1/3 / 4).
    Red: questions.py:gain: `max(1, n - 1)` -> `n`
    Red: questions.py:gain: `change - 1.96` -> `change - 2`
    Red: questions.py:gain: `b - a for` -> `abs(b - a) for`
    Red: questions.py:gain: `if n > 1 else None` -> `if 1 else None`"""
    error = 1.96 * (1 / 12) ** 0.5
    assert questions.gain([0, 0, 0, 1], [1, 1, 0, 1]) == {
        "before": 0.25, "after": 0.75, "change": 0.5, "n": 4,
        "interval": [pytest.approx(0.5 - error), pytest.approx(0.5 + error)]}
    assert questions.gain([1, 0], [0, 0])["change"] == -0.5
    assert questions.gain([0], [1])["interval"] is None


@pytest.mark.parametrize("rows, words", [
    ([{"prompt": "a", "pattern": "("}], "q.jsonl:1: the pattern is no regular expression: missing"),
    ([{"prompt": "a", "pattern": ""}], "q.jsonl:1: an empty prompt or pattern"),
    ([{"prompt": " ", "pattern": "a"}], "q.jsonl:1: an empty prompt or pattern"),
    ([{"prompt": "a", "pattern": 7}], "q.jsonl:1: pattern must be a text, found 7"),
    ([{"pattern": "a"}], "q.jsonl:1: no column 'prompt'. A question has the columns prompt and"),
    ([{"prompt": "a", "pattern": "a"}, {"question": "a", "mc1_targets": {
        "choices": ["x", "y"], "labels": [1, 0]}}], "q.jsonl:2: no column 'mc2_targets'"),
    ([{"prompt": "a", "pattern": "a"}, {"question": "a"} | {f"mc{i}_targets": {
        "choices": ["x", "y"], "labels": [1, 0]} for i in (1, 2)}],
     "q.jsonl:2: patterns and choices in"),
    ([{"question": "a", "mc1_targets": {"choices": "ab", "labels": [1, 0]}}],
     "q.jsonl:1: mc1_targets's choices must be a list"),
    ([{"question": "a", "mc1_targets": [1]}], "q.jsonl:1: mc1_targets must hold choices and"),
    ([{"question": "a", "mc1_targets": {"choices": ["a", " "], "labels": [1, 0]}}],
     "q.jsonl:1: mc1_targets: a choice is empty"),
    ([{"prompt": "a", "pattern": "a{99999999999}"}], "q.jsonl:1: the pattern is no regular"),
    ([{"question": "a"} | {f"mc{i}_targets": {"choices": ["x", "y"], "labels": [0, 0]}
                           for i in (1, 2)}], "q.jsonl:1: 2 choices have the labels [0, 0]"),
    ([{"question": "a"} | {f"mc{i}_targets": {"choices": ["x"], "labels": [1, 0]}
                           for i in (1, 2)}], "q.jsonl:1: 1 choices have the labels [1, 0]"),
    ([], "q.jsonl holds no question")])
def test_a_wrong_question_is_refused_with_file_and_line(rows, words, tmp_path):
    """Red: questions.py:read: `ValueError, re.error, OverflowError` -> `ValueError, OverflowError`
    Red: questions.py:read: `re.error, OverflowError,` -> `re.error,`
    Red: questions.py:choices: `if not isinstance(value, dict) or` -> `if`
    Red: questions.py:choices: `"a choice").strip()` -> `"a choice")`
    Red: questions.py:read: `bool(out[-1].pattern) != bool(out[0].pattern)` -> `False`
    Red: questions.py:choices: `len(text) != len(labels) or` -> ``
    Red: questions.py:choices: `or len(set(labels)) < 2` -> ``
    Red: questions.py:parse: `out.prompt[-1][1].strip() and` -> ``
    Red: questions.py:read: `if not out:` -> `if 0:`"""
    with pytest.raises(ValueError, match=re.escape(words)):
        questions.read(write(tmp_path / "q.jsonl", rows))


def test_a_pattern_that_never_ends_is_refused_after_a_second(base, monkeypatch):
    """Of computing: a repeated repeat tries every way to cut the answer.
    Red: questions.py:ask: `bounds.deadline(1)` -> `bounds.deadline(0.2)`
    Red: questions.py:ask: `except TimeoutError` -> `except KeyError`"""
    monkeypatch.setattr(generate, "complete", lambda *_: ["a" * 60])
    asked = [questions.Question(SAID, "(?:.|.|.)*(?:.|.|.)*b")]
    with pytest.raises(ValueError, match=r"patterns: it takes longer than 1 seconds? .* repeats"):
        questions.ask(None, tokens.Chat(base, "plain"), asked)


def test_a_choice_beyond_the_context_is_refused(base, adapted):
    """Its log-prob would be that of positions the model has never seen.
    Red: questions.py:weigh: `if batch.ids.shape[1] > net` -> `if 0 > net`"""
    mc = (("one", "one " * 200), (1, 0))
    with pytest.raises(ValueError, match="beyond the context"):
        questions.ask(adapted, tokens.Chat(base, "plain"), [questions.Question(SAID, "", mc, mc)])


def test_choices_of_no_number_are_refused(base, adapted):
    """Red: questions.py:weigh: `if not totals.isfinite().all()` -> `if 0`"""
    for layer in lora.adapters(adapted).values():
        layer.lora_B.data.fill_(1e38)
    mc = (("one", "two"), (1, 0))
    with pytest.raises(ValueError, match="not finite"):
        questions.ask(adapted, tokens.Chat(base, "plain"), [questions.Question(SAID, "", mc, mc)])


def test_a_file_of_questions_is_told_from_feedback(files, tmp_path):
    """By its columns; others do not matter, and a prompt may be messages.
    Red: questions.py:is_questions: `"pattern", ` -> ``
    Red: questions.py:is_questions: `, "mc1_targets"` -> ``
    Red: questions.py:is_questions: `path.suffix == ".csv" or` -> ``"""
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say one."}]
    path = write(tmp_path / "q.jsonl", [{"prompt": asked, "pattern": "one", "id": 3}])
    assert questions.read(path) == [questions.Question((("system", "Be brief."), *SAID), "one")]
    (tmp_path / "q.csv").write_text(CSV, "utf-8")
    hub = write(tmp_path / "h.jsonl", map(as_on_the_hub, questions.read(tmp_path / "q.csv")))
    assert all(map(questions.is_questions, (path, hub, tmp_path / "q.csv")))
    assert not any(map(questions.is_questions, files.glob("*.jsonl")))
