"""Theorems about mixing files: what is held out, and in which order the rest comes."""
import json

import pytest

import config
import mixture
import records
import tokens


def test_stream_from_step_k_is_the_stream_without_k_batches():
    """Where every row is a unit, step k begins with row k * batch_size of the order.
    Red: mixture.py:stream: `at * (e == first)` -> `at`
    Red: mixture.py:stream: `count(first)` -> `count(0)`"""
    files, setup = [list(range(7)), list(range(100, 103))], config.Config("m", ("d",), batch_size=4)
    whole = mixture.stream(files, [1.0, 0.5], setup)
    batches = [next(whole) for _ in range(9)]
    for k in range(9):
        assert next(mixture.stream(files, [1.0, 0.5], setup, (4 * k, 0))) == batches[k]
        assert batches[k][1] == (4 * k + 4, 0)


@pytest.mark.parametrize("file, reads", [("scores", "rows"), ("pairs", "pairs"),
                                         ("labels", "labels"), ("pairs", "demonstrations")])
def test_held_out_prompts_are_never_trained_on(file, reads, base, files):
    """Red: mixture.py:load_data: `if e.prompt not in held]` -> `if e.prompt]`"""
    setup = config.Config("m", (f"{files}/{file}.jsonl",), held_out=10)
    (units,), _, test, *_ = mixture.load_data(setup, tokens.Chat(base, "plain"), reads)
    kept, used = ({e.prompt for unit in us for e in unit} for us in (test, units))
    assert len(kept) in (5, 10) and len(kept) + len(used) == 40


def test_rows_that_repeat_or_contradict_earlier_ones_are_counted(tmp_path, base):
    """In a file and across files; they stay, for data sets hold such rows.
    Red: doubts.py:repeats: `seen[key] == row.reward` -> `key`
    Red: doubts.py:repeats: `seen.setdefault(key, row.reward)` -> `pass`
    Red: doubts.py:repeats: `tuple(row.ids)` -> `0`
    Red: mixture.py:load_data: `*doubt.items(), ` -> `*(), `"""
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, scores in zip(paths, ((1, 1, 0, 1), (1, 0.5)), strict=True):
        path.write_text("".join(json.dumps({"prompt": "q", "response": "ab"[i == 2], "score": s})
                                + "\n" for i, s in enumerate(scores)))
    setup = config.Config("m", tuple(map(str, paths)), held_out=0)
    told = mixture.load_data(setup, tokens.Chat(base, "plain"), "rows")[3]
    assert [t.split("; ")[1] for t in told] == [
        "to train on: 4 rows, 2 said before",
        "to train on: 2 rows, 1 said before, 1 said before with OTHER feedback"]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1e9", "1.2.3", "9" * 400, "1001"])
def test_a_weight_is_a_number_of_passes(weight):
    """ValueError names it; what is no number at all is part of the name.
    Red: records.py:weighted: `if not 0 < value <= 1000` -> `if not value <= 1000`
    Red: records.py:weighted: `if not 0 < value <= 1000` -> `if not 0 < value`
    Red: records.py:weighted: `value = 0.0` -> `value = 1.0`"""
    with pytest.raises(ValueError, match="found the weight"):
        records.weighted(f"x.jsonl:{weight}")
    assert records.weighted("x.jsonl:0.5") == ("x.jsonl", 0.5)
    assert records.weighted("C:x") == ("C:x", 1.0)
