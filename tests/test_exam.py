"""Theorems about what a run is asked before and after, and about the demo that asks it."""
import json
import shlex
from pathlib import Path

import pytest
import torch

import config
import exam
import generate
import lora
import model
import questions
import report
import tokens
import train

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = ({"one": ".*e.*", "two": "(?s:.*)"}, {"six": "no", "ten": ".*"})
CHOICES = {"choices": ["a", "b"], "labels": [1, 0]}
GAINS = {"a correct": {"before": 0.25, "after": 0.5, "change": 0.25, "interval": [0.125, 0.375],
                       "n": 40},
         "b mc2": {"before": 0.5, "after": 0.25, "change": -0.25, "interval": None, "n": 1}}


@pytest.fixture
def tests(tmp_path):
    """Paths of two files of patterns and one of choices."""
    rows = [[{"prompt": f"Say {word}.", "pattern": p} for word, p in some.items()]
            for some in PATTERNS]
    rows.append([{"question": "Say one.", "mc1_targets": CHOICES, "mc2_targets": CHOICES}])
    paths = [tmp_path / f"{name}.jsonl" for name in ("words", "more", "truth")]
    for path, some in zip(paths, rows, strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")
    return [str(p) for p in paths]


def run(base, file, out, tests, *more):
    """train.main with some tests, small and fast; returns results.json."""
    train.main(["--model", str(base), "--data", str(file), "--template", "plain", "--lr", "0.05",
                "--max_length", "128", "--steps", "4", "--lora_r", "2", "--sample_tokens", "5",
                "--held_out", "4", "--out", str(out), *more,
                *(word for path in tests for word in ("--test", path))])
    return json.loads((out / "results.json").read_text("utf-8"))


def test_results_are_the_gains_from_base_to_adapter(base, files, tests, tmp_path, capsys):
    """Asked again of the base and of the saved adapter, the tests give the same numbers.
    Red: train.py:run: `compare(before, exam` -> `compare(before, before or exam`
    Red: exam.py:compare: `before["scores"][name], scores)` -> `scores, scores)`
    Red: exam.py:compare: `"before": before["held_out"]` -> `"before": after["held_out"]`
    Red: exam.py:compare: `"after": after["lengths"]` -> `"after": before["lengths"]`
    Red: exam.py:examine: `{name: mean_tokens(chat, texts)} if texts` -> `{name: 1.0} if 1`
    Red: train.py:run: `"seconds": time.perf_counter() - began` -> `"seconds": 0`"""
    found = run(base, files / "scores.jsonl", tmp_path / "run", tests)
    asked, scores = exam.read_tests(config.Config("m", ("d",), tuple(tests))), []
    for adapter in (None, tmp_path / "run/adapter"):
        net, chat = model.load(base, torch.float32), tokens.Chat(base, "plain")
        if adapter:
            lora.load(net, adapter)
        scores.append({f"{name} {metric}": values for name, some in asked.items() for metric, values
                       in questions.ask(net, chat, some, 5)[0].items()})
    assert found["tests"].keys() == {"words correct", "more correct", "truth mc1", "truth mc2"}
    for name, gain in json.loads(json.dumps(found["tests"])).items():
        want = questions.gain(scores[0][name], scores[1][name])
        assert gain.pop("interval") == pytest.approx(want.pop("interval"), abs=1e-6)
        assert gain == pytest.approx(want, abs=1e-6)
    assert abs(found["tests"]["truth mc2"]["change"]) > 1e-3 and found["seconds"] > 0
    lengths = found["lengths"]
    assert lengths["before"].keys() == lengths["after"].keys() == {"words", "more"}
    assert lengths["before"]["words"] != lengths["after"]["words"]
    held = found["held_out"]
    assert held["before"]["dlogp/scored"] == 0 != held["after"]["dlogp/scored"]
    told = capsys.readouterr().out
    assert report.test_table(found["tests"]) in told and report.verdict(
        *held.values(), found["tests"]) == found["verdict"] in told


def test_a_resumed_run_is_asked_of_the_base_before(base, files, tests, tmp_path):
    """Gone on with after its last step, a run has the same tests before and after as at first.
    Red: train.py:run: `lora.disabled(net)` -> `torch.no_grad()`
    Red: checkpoint.py: `"sample_tokens", "test")` -> `"sample_tokens")`"""
    first = run(base, files / "scores.jsonl", tmp_path / "run", tests[1:])
    again = run(base, files / "scores.jsonl", tmp_path / "run", tests, "--resume", "true")
    assert first["held_out"] == again["held_out"]
    assert first["tests"].items() <= again["tests"].items() and "words correct" in again["tests"]


def test_samples_are_the_first_questions_of_the_files_in_turn(base, files, tests, tmp_path, capsys):
    """First of the first file, first of the second, second of the first; marked as judged.
    Red: exam.py:examine: `itertools.zip_longest(*answered)` -> `answered`
    Red: exam.py:examine: `text, right > 0)` -> `text, right < 1)`
    Red: exam.py:examine: `asked, exam.config.sample_tokens)` -> `asked, 1)`
    Red: report.py:samples: `True: "right  ", False: "wrong  "` -> `True: "", False: ""`
    Red: exam.py:compare: `"right_before": was` -> `"right_before": now and was`"""
    samples = run(base, files / "scores.jsonl", tmp_path / "run", tests[::-1])["samples"]
    assert [s["prompt"] for s in samples] == ["Say six.", "Say one.", "Say ten."]
    assert [s["right_after"] for s in samples] == [False, "e" in samples[1]["after"], True]
    assert [s["right_before"] for s in samples] == [False, "e" in samples[1]["before"], True]
    net, chat = model.load(base, torch.float32), tokens.Chat(base, "plain")
    assert samples[2]["before"] == generate.complete(net, chat, [(("user", "Say ten."),)], 5)[0]
    told = capsys.readouterr().out
    assert f"before  right  {samples[2]['before']!r}\n" in told
    assert f"after   wrong  {samples[0]['after']!r}\n" in told


def test_without_patterns_samples_are_held_out_prompts_without_a_mark(base, files, tests, tmp_path):
    """Red: exam.py:examine: `if not shown:` -> `if 0:`
    Red: exam.py:examine: `{"samples": mean` -> `{"sample": mean`
    Red: train.py:run: `(held or first)` -> `first`"""
    found = run(base, files / "pairs.jsonl", tmp_path / "run", tests[2:])
    setup = config.Config("m", (f"{files}/pairs.jsonl",), held_out=4, max_length=128)
    held = train.mixture.load_data(setup, tokens.Chat(base, "plain"), "rows")[2]
    assert [s["prompt"] for s in found["samples"]] == [u[0].prompt[0][1] for u in held[:3]]
    assert all(s["right_before"] is s["right_after"] is None for s in found["samples"])
    assert found["lengths"]["after"].keys() == {"samples"}


def test_a_test_bears_its_files_name_or_its_path_where_two_share_that(tests, tmp_path):
    """Red: exam.py:read_tests: `if stems.count(stem) == 1` -> `if 1`
    Red: exam.py:read_tests: `.split(".")[0]` -> ``"""
    (tmp_path / "x").mkdir()
    twin = tmp_path / "x/words.jsonl"
    twin.write_text(Path(tests[0]).read_text("utf-8"), "utf-8")
    found = exam.read_tests(config.Config("m", ("d",), (*tests, str(twin))))
    assert list(found) == [tests[0], "more", "truth", str(twin)]


def test_a_question_beyond_the_context_is_found_before_it_is_asked(base):
    """Its prompt and one token of an answer, or its longest choice, have to fit.
    Red: exam.py:check_room: `max(ends, default=1)` -> `0`
    Red: exam.py:check_room: `q.mc1[:1] + q.mc2[:1]` -> `q.mc1[:1]`
    Red: exam.py:check_room: `) > context:` -> `) > context + 1:`"""
    chat, said = tokens.Chat(base, "plain"), (("user", "Say one."),)
    prompt, answers = len(chat.prompt_ids(said)), (("a", "one two six"), (1, 0))
    choice = len(chat.response_ids("one two six"))
    for asked, need in ((questions.Question(said, "x"), prompt + 1),
                        (questions.Question(said, "", (("a", "b"), (1, 0)), answers),
                         prompt + choice)):
        exam.check_room({"t": [asked]}, chat, need)
        with pytest.raises(ValueError, match=f"--test t: 'Say one.' needs {need} tokens"):
            exam.check_room({"t": [asked]}, chat, need - 1)


def test_the_table_of_tests_is_in_percent_and_points():
    """Red: report.py:test_table: `100 * g['change']` -> `g['change']`
    Red: report.py:test_table: `{100 * x:+.1f}` -> `{x:+.1f}`
    Red: report.py:test_table: `or 'unknown'` -> `or ''`"""
    head, *rows = report.test_table(GAINS).splitlines()
    assert head.split() == ["tests", "start", "end", "change", "95%", "interval", "questions"]
    assert [row.split() for row in rows] == [
        ["a", "correct", "25.0%", "50.0%", "+25.0", "+12.5", "to", "+37.5", "40"],
        ["b", "mc2", "50.0%", "25.0%", "-25.0", "unknown", "1"]]
    assert len({len(line) for line in (head, *rows)}) == 1


def test_a_test_moved_if_its_interval_leaves_out_zero():
    """Red: report.py:verdict: `if low > 0` -> `if high > 0`
    Red: report.py:verdict: `if high < 0` -> `if low < 0`"""
    wide = GAINS["a correct"] | {"interval": [-0.1, 0.6]}
    worse = GAINS["a correct"] | {"interval": [-0.6, -0.1]}
    told = report.verdict({}, {}, GAINS | {"c": wide, "d": worse}).split("; ")
    assert told == ["a correct rose, 25.0% to 50.0%", "b mc2 did not clearly move, 50.0% to 25.0%",
                    "c did not clearly move, 25.0% to 50.0%", "d fell, 25.0% to 50.0%"]


@pytest.mark.parametrize("place", [".", "tests"])
def test_without_flags_the_demo_runs_and_shows_its_command(place, capsys, monkeypatch):
    """The printed words, given to the parser, are the run; its paths lead to lab/ from anywhere.
    Red: train.py:main: `if not argv:` -> `if 0:`
    Red: train.py:demo_flags: `os.path.relpath(here / word)` -> `word`
    Red: train.py:main: `{shlex.join(argv)}` -> `{argv[:2]}`"""
    got = []
    monkeypatch.chdir(ROOT / place)
    monkeypatch.setattr(train, "train", got.append)
    monkeypatch.setattr("sys.argv", ["train.py"])
    train.main()
    said, demo, python, script, *words = shlex.split("- " + capsys.readouterr().out)
    assert (said, demo, python) == ("-", "demo", "python") and Path(script).is_file()
    train.main(words)
    assert got[0] == got[1] and (place != "." or words == train.DEMO.split())
    paths = (got[0].model, *got[0].data, *got[0].test)
    assert all(Path(p).resolve().is_relative_to(ROOT / "lab") for p in paths)
    assert len(got[0].test) == 3 and exam.Exam._fields[1] == "tests"
