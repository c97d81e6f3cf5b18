"""Theorems about large files: read row by row they give what the whole file gives.

A file is large here because mixture.LARGE is set to 0.
"""
import json
import random
import tracemalloc
from collections import Counter

import pytest

import config
import lines
import mixture
import records
import tokens
import train

TEXTS = [json.dumps({"prompt": "q\u2028\x85 \u00e9", "response": str(i)}, ensure_ascii=False)
         for i in range(5)]
FORMS = {
    "lines": "\n".join(TEXTS) + "\n", "no last line feed": "\n".join(TEXTS), "nothing": "",
    "BOM and CRLF": "\ufeff" + "\r\n".join(TEXTS) + "\r\n", "one line": TEXTS[0],
    "blank lines": "\n \n" + "\n\r\n\t\n\n".join(TEXTS) + "\n\n \n", "only blank lines": "\n\r\n ",
    "indented": " " + "\n  ".join(TEXTS)}


@pytest.fixture(params=["whole", "a byte"])
def chunks(request, monkeypatch):
    """The file scanned at once, and byte by byte."""
    monkeypatch.setattr(lines, "CHUNK", 2**20 if request.param == "whole" else 1)


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS)
def test_rows_by_offset_are_the_rows_of_the_file(tmp_path, content, chunks):
    """Each with its line's number, in any order, blank lines counted but not there.
    Red: lines.py:Lines.at: `searchsorted(i, "right")` -> `searchsorted(i)`
    Red: lines.py:Lines.scan: `last + chunk` -> `chunk`
    Red: lines.py:Lines.scan: `<= ord(" ")` -> `== ord("{")`
    Red: lines.py:Lines.__init__: `np.delete(starts, blank) if len(blank) else ` -> ``"""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode())
    found, want = lines.Lines(path), list(records.rows(path))
    assert len(found) == len(want)
    assert [found[i] for i in reversed(range(len(want)))] == want[::-1]


@pytest.mark.parametrize("line", ["{", '{"a": NaN}', "[1]", '"\ufeff"', "\ufeff", "7 7", "nul"])
def test_a_bad_line_is_refused_when_asked_for_and_in_the_same_words(tmp_path, line):
    """And no other line is.
    Red: records.py:read_line: `return line` -> `return line.strip()`"""
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{TEXTS[0]}\n\n{line} \n\n\n{TEXTS[1]}", "utf-8")
    with pytest.raises(ValueError, match="rows.jsonl:3: ") as whole:
        list(records.rows(path))
    found = lines.Lines(path)
    assert [found[i][0][-2:] for i in (0, 2)] == [":1", ":6"]
    with pytest.raises(ValueError, match="rows.jsonl:3: ") as one:
        found[1]
    assert str(one.value) == str(whole.value)


def test_the_offsets_of_a_file_take_8_bytes_a_row(tmp_path):
    """And less than 20 while they are found, whatever the length of a line.
    Red: lines.py:Lines.scan: `np.flatnonzero(text[:-1] == ord("\\n"))` -> `np.flatnonzero(text)`"""
    path, count = tmp_path / "rows.jsonl", 2 * 10**5
    path.write_bytes(b'{"prompt": "a long question, and "}\n' * count)
    tracemalloc.start()
    found = lines.Lines(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == count and held < 8.5 * count and peak < 20 * count + 4 * lines.CHUNK


def rows():
    """Rows in runs of one prompt and mostly of one format, some unusable and some too long."""
    draw, out = random.Random(0), []
    for _ in range(120):
        prompt, kinds = f"Say {draw.randrange(90)}.", draw.choice((range(1), range(1, 2), range(7)))
        for _ in range(draw.randrange(1, 6)):
            answer = draw.choice(("one", "two", "three", " ", "long " * 60))
            other, grade = draw.choice(("four", "five", "long " * 60)), draw.randrange(5)
            turns = [{"role": role, "content": text} for role, text in zip(
                ("user", "assistant") * 2, (prompt, answer, "And?", other), strict=True)]
            scores = {"score_chosen": grade % 2 + 1, "score_rejected": 1}
            out.append({"prompt": prompt} | (
                {"score": grade / 4, "response": answer}, {"label": grade > 1, "response": answer},
                {"chosen": answer, "rejected": other}, {"messages": turns}, {"response": answer},
                {"chosen": other, "rejected": answer},
                {"chosen": answer, "rejected": other, "metadata": scores})[draw.choice(kinds)])
    return out


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A file of `rows`, a blank line here and there."""
    path = tmp_path_factory.mktemp("mixed") / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" * (1 + i % 3) for i, r in enumerate(rows())))
    return path


def load(path, base, reads, **changes):
    """mixture.load_data of a file, and the settings it was read with."""
    wanted = {"held_out": 20, "max_length": 100, "batch_size": 3, "seed": 1} | changes
    setup = config.Config("m", (str(path),), **wanted)
    return mixture.load_data(setup, tokens.Chat(base, "plain"), reads), setup


def named(units):
    """How often each unit is there: where its rows are, what they say, and their feedback."""
    return Counter(tuple((e.where, tuple(e.ids), e.reward, e.kind) for e in u) for u in units)


READS = pytest.mark.parametrize("reads", ["prompts", "rows", "demonstrations", "pairs", "labels"])


@READS
@pytest.mark.parametrize("held_out", [0, 20])
def test_row_by_row_a_file_gives_the_units_of_the_whole_file(
        reads, held_out, mixed, base, monkeypatch):
    """Same pairs, same rows held out, same rows dropped, same size of an epoch.
    Red: lines.py:Units.begun: `"scored": LONG` -> `"scored": 1`
    Red: lines.py:Units.begun: `"rejected": 1` -> `"rejected": 0`
    Red: lines.py:Units.begun: `in ("scored", "chosen")` -> `in ("scored",)`
    Red: lines.py:Units.read: `if e.prompt not in self.held]` -> `if e.prompt]`
    Red: lines.py:Units.__getitem__: `not in ("rows", "demonstrations")` -> `not in ("pairs",)`
    Red: lines.py:Units.__getitem__: `lost + long` -> `lost`
    Red: mixture.py:load_data: `later.held = held` -> `pass`"""
    (units,), _, test, _, dropped, size = load(mixed, base, reads, held_out=held_out)[0]
    monkeypatch.setattr(mixture, "LARGE", 0)
    (later,), _, also, _, known, estimate = load(mixed, base, reads, held_out=held_out)[0]
    found = [later[i] for i in range(len(later))]
    assert named(u for us, _ in found for u in us) == named(units) and len(units) > 20
    assert {len(us) for us, _ in found} >= ({0, 1, 2} if reads != "pairs" else {0, 1})
    assert named(also) == named(test) and bool(test) == bool(held_out)
    assert sorted(map(str, dropped)) == sorted(str(d) for _, ds in found for d in ds) != known == []
    assert estimate == pytest.approx(size, abs=3) and size == len(units)


@READS
def test_no_prompt_that_is_held_out_of_a_sample_is_trained_on(reads, mixed, base, monkeypatch):
    """Wherever else in the file its rows are.
    Red: lines.py:Units.read: `if e.prompt not in self.held]` -> `if e.where]`"""
    monkeypatch.setattr(mixture, "LARGE", 0)
    monkeypatch.setattr(mixture, "SAMPLE", 60)
    (later,), _, test, *_ = load(mixed, base, reads)[0]
    held = {e.prompt for unit in test for e in unit}
    used = {e.prompt for i in range(len(later)) for unit in later[i][0] for e in unit}
    assert len(held) > 5 and len(used) > 5 and not held & used


@READS
def test_a_row_by_row_stream_goes_on_from_the_place_behind_any_batch(
        reads, mixed, base, monkeypatch):
    """Rows that give 0, 1 and 2 units, two epochs; nothing before the place is read again.
    Red: mixture.py:stream: `units[used:]` -> `units`
    Red: mixture.py:stream: `drawn + used // len(units)` -> `drawn`
    Red: mixture.py:stream: `used % len(units))` -> `0)`"""
    monkeypatch.setattr(mixture, "LARGE", 0)
    (files, weights, *_, size), setup = load(mixed, base, reads)
    whole = mixture.stream(files, weights, setup)
    batches = [next(whole) for _ in range(2 * size // 3 - 1)]
    assert named(u for us, _ in batches[:size // 3 - 2] for u in us).most_common(1)[0][1] == 1
    place = (0, 0)
    for k, (units, behind) in enumerate(batches):
        again = mixture.stream(files, weights, setup, tuple(json.loads(json.dumps(place))))
        assert [next(again) for _ in range(2)][:len(batches) - k] == batches[k:k + 2]
        assert len(units) == 3
        place = behind


def test_a_run_over_a_large_file_reads_a_sample_before_its_first_batch(
        tmp_path, base, monkeypatch):
    """Not the file: 25 rows and their neighbours of 4000, and the pairs that begin in them; the
    size of an epoch is told as an estimate.
    Red: lines.py:Units.sample: `len(self), count,` -> `len(self), len(self),`
    Red: lines.py:Units.sample: `mine and self.begun(i, mine)` -> `mine`
    Red: mixture.py:load_data: `max(1, len(later) / SAMPLE)` -> `1`
    Red: mixture.py:load_data: `min(SAMPLE, len(later or ()))` -> `len(later or ())`"""
    path, asked = tmp_path / "rows.jsonl", []
    path.write_text("".join(json.dumps(
        {"prompt": f"q{i // 2}", "response": "ab"[i % 2], "score": i % 2}) + "\n"
        for i in range(4000)))
    monkeypatch.setattr(mixture, "LARGE", 0)
    monkeypatch.setattr(mixture, "SAMPLE", 25)
    read = json.loads
    monkeypatch.setattr(json, "loads", lambda *a, **k: asked.append(a) or read(*a, **k))
    (files, weights, test, told, _, size), setup = load(path, base, "pairs", held_out=6)
    next(mixture.stream(files, weights, setup))
    assert len(asked) < 4 * 25 + 60 and list(map(len, test)) == [2, 2, 2]
    assert 1000 < size < 3000 and told == [(
        f"{path}: scores, about {2 * size + 6 * 160} rows, estimated from a sample of 25; "
        f"to train on: about {size} pairs")]


def test_a_prompt_with_many_scores_is_paired_without_a_look_at_all_of_them(
        tmp_path, base, monkeypatch):
    """Each row in one pair, as in the whole file, and read 68 times at most: 300 of one prompt.
    Red: lines.py:Units.begun: `i % 2` -> `1`
    Red: lines.py:Units.begun: `"scored": LONG` -> `"scored": None`"""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "q", "response": "a", "score": i % 2}) + "\n"
                            for i in range(300)))
    (units,), *_ = load(path, base, "pairs", held_out=0)[0]
    monkeypatch.setattr(mixture, "LARGE", 0)
    monkeypatch.setattr(mixture, "SAMPLE", 8)
    (later,), *_ = load(path, base, "pairs", held_out=0)[0]
    asked, read = [], json.loads
    monkeypatch.setattr(json, "loads", lambda *a, **k: asked.append(a) or read(*a, **k))
    assert named(u for i in range(300) for u in later[i][0]) == named(units) and len(units) == 150
    assert len(asked) < 68 * 300


def run(base, path, out, *more):
    """train.main over a large file with a row that never fits, small and fast."""
    train.main(["--model", str(base), "--data", str(path), "--template", "plain", "--held_out", "4",
                "--max_length", "100", "--sample_tokens", "0", "--lora_r", "2", "--batch_size", "4",
                "--out", str(out), *more])
    return out


def test_dropped_rows_of_a_large_file_are_listed_once_when_met_also_after_a_stop(
        tmp_path, base, monkeypatch):
    """Three epochs, stopped in the second: the lists and the metrics end the same.
    Red: mixture.py:stream: `dropped[0]["where"] not in met` -> `True`
    Red: mixture.py:stream: `listed.read_text("utf-8")` -> `""`
    Red: train.py:run: `state["place"], listed` -> `(0, 0), listed`
    Red: train.py:run_steps: `"place": place}` -> `"place": (0, 0)}`"""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(
        {"prompt": f"Say {i}.", "response": ("yes", " ", "long " * 60)[i % 5 % 3]}) + "\n"
        for i in range(20)))
    monkeypatch.setattr(mixture, "LARGE", 0)
    whole = run(base, path, tmp_path / "whole", "--steps", "6", "--save_every", "3")
    part = run(base, path, tmp_path / "part", "--steps", "6", "--save_every", "3")
    (part / "checkpoints/step-6").rename(part / "checkpoints/tmp-step-6-1")
    run(base, path, part, "--steps", "6", "--save_every", "3", "--resume", "true")
    told = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            for out in (whole, part)]
    assert [[m["loss"] for m in ms] for ms in told] == [[m["loss"] for m in told[0]]] * 2
    lists = [(out / "dropped.jsonl").read_text() for out in (whole, part)]
    assert lists[0] == lists[1] and lists[0].count("\n") == len(set(lists[0].splitlines())) == 12


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    """Its offsets would lead into the middle of other rows.
    Red: records.py:read_line: `known and stamp(file) != known` -> `False`
    Red: lines.py:Lines.line: `, self.known)` -> `)`"""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(TEXTS), "utf-8")
    found = lines.Lines(path)
    assert found[1]
    path.write_text("\n".join(TEXTS[1:]), "utf-8")
    with pytest.raises(ValueError, match="rows.jsonl has changed"):
        found[1]


def test_a_bad_line_that_the_sample_did_not_meet_is_dropped_and_listed(tmp_path, base):
    """It ends no run that has come this far; a file that has changed does.
    Red: lines.py:Units.read: `except ValueError as error` -> `except KeyError as error`"""
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "q", "response": "a"})
    path.write_text(f"{good}\n{{\n{json.dumps({'text': 'q'})}\n{good}\n")
    settings = config.Config(model="m", data=(str(path),), max_length=99)
    units = lines.Units(path, settings, tokens.Chat(base, "plain"), "rows")
    found = [units[i] for i in range(4)]
    assert [len(mine) for mine, _ in found] == [1, 0, 0, 1]
    assert found[1][1][0]["where"] == f"{path}:2" and "not valid JSON" in found[1][1][0]["reason"]
    assert found[2][1][0]["where"] == f"{path}:3" and not found[3][1]
    path.write_text(good)
    with pytest.raises(ValueError, match="has changed"):
        units[0]


def test_a_bad_line_of_a_large_file_that_is_met_at_the_start_is_refused(
        tmp_path, base, monkeypatch, capsys):
    """Red: lines.py:Lines.at: `return n + 1, ` -> `return 0, `
    Red: lines.py:Units.sample: `refuse=True` -> `refuse=False`"""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "response": "a"}\n' * 30 + "{\n")
    monkeypatch.setattr(mixture, "LARGE", 0)
    with pytest.raises(SystemExit):
        run(base, path, tmp_path / "run")
    assert "rows.jsonl:31: not valid JSON" in capsys.readouterr().err
