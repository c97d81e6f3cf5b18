"""Properties of records.py, data.py and lines.py over rows and files that nobody thought of."""
import gzip
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from anything import KINDS, line, messages, rows, seeds, texts, values, words
from hypothesis import example, given
from hypothesis import strategies as st

import data
import doubts
import lines
import records

WHERE = Path("somewhere/rows.jsonl")
examples = st.builds(
    data.Example, prompt=st.sampled_from("pqrst").map(lambda p: (("user", p),)), response=words,
    reward=st.sampled_from((0.0, 0.3, 0.5, 0.7, 1.0)), kind=st.sampled_from(KINDS), where=texts)
many = st.lists(examples, max_size=12).map(
    lambda found: [replace(e, where=str(i)) for i, e in enumerate(found)])
READS = st.sampled_from(("prompts", "rows", "demonstrations", "pairs", "labels"))
pieces = st.one_of(
    st.dictionaries(texts, values, max_size=2).map(line), values.map(line),
    st.sampled_from((b"", b" ", b"\t\r", b"\xef\xbb\xbf", b"{", b"[1]", b"NaN", b'"\xff"')),
    st.binary(max_size=6), st.just(b'{"prompt": "q", "response": "a"}'))


@st.composite
def contents(draw):
    """Bytes of a file: lines of every kind, each ended by LF, CRLF or (the last) nothing."""
    ended = st.tuples(pieces, st.sampled_from((b"\n", b"\n", b"\r\n")))
    body = b"".join(a + b for a, b in draw(st.lists(ended, max_size=5)))
    return draw(st.sampled_from((b"", b"\xef\xbb\xbf"))) + body + draw(st.sampled_from(
        (b"", b"{}", b" ", b'{"a": 1}')))


def drained(iterator):
    """What comes out of an iterator, and the words of the ValueError that ends it, if one does."""
    out = []
    try:
        while True:
            out.append(next(iterator))
    except StopIteration:
        return out, None
    except ValueError as error:
        return out, str(error)


@given(st.lists(rows, min_size=1, max_size=4))
def test_any_rows_are_examples_or_a_value_error_that_names_file_and_line(found):
    """Never another exception, whatever the columns hold.
    Red: data.py:read_rows: `(ValueError, TypeError, Attri` -> `(TypeError, Attri`
    Red: data.py:read_rows: `f"{where}: {error}"` -> `f"{error}"`"""
    try:
        kept, dropped, _ = data.read_rows(
            records.json_lines(WHERE, enumerate(map(line, found), 1)), (0, 1))
    except ValueError as error:
        assert str(error).startswith(f"{WHERE}:")
        return
    assert {int(d["where"].rpartition(":")[2]) for d in dropped} <= set(range(1, len(found) + 1))
    assert all(set(d) == {"where", "reason"} for d in dropped)
    for e in kept:
        assert 0 <= e.reward <= 1 and e.prompt and e.kind in (*KINDS, "prompt")
        assert e.response.strip() or e.kind == "prompt"
        assert all(role in ("system", "user", "assistant") and isinstance(content, str)
                   for role, content in e.prompt)


@given(st.lists(rows, min_size=1, max_size=4))
def test_every_row_is_used_dropped_or_refused(found):
    """None disappears: each row that is not dropped gives an example that names its line.
    Red: data.py:read_rows: `records.refuse(f"{where}: {error}", bad)` -> `pass`
    Red: data.py:read_rows: `usable(made)` -> `usable(made)[:0]`"""
    try:
        kept, dropped, _ = data.read_rows(
            records.json_lines(WHERE, enumerate(map(line, found), 1)), (0, 1))
    except ValueError:
        return
    named = [{d["where"] for d in dropped}, {e.where for e in kept}]
    assert named[0] | named[1] == {f"{WHERE}:{i}" for i in range(1, len(found) + 1)}
    assert not named[0] & named[1]


@given(contents())
@example(b"PAR1\n{}")
def test_any_bytes_are_rows_or_a_value_error_that_names_file_and_line(tmp_path_factory, content):
    """A file is read to its end or refused where it breaks.
    Red: records.py:json_lines: `f"{path}:{number}: {error}"` -> `f"{error}"`
    Red: records.py:json_lines: `if isinstance(row, dict)` -> `if True`"""
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes(content)
    found, error = drained(records.rows(path))
    assert error is None or error.startswith(f"{path}:") or (
        not found and error.startswith(f"{path} is ") and content.startswith(tuple(records.MAGIC)))
    assert all(isinstance(row, dict) and where.startswith(f"{path}:") for where, row in found)
    filled = sum(bool(text.strip()) for text in content.split(b"\n"))
    assert len(found) == filled or error and len(found) < filled


@given(st.lists(st.dictionaries(texts, values, max_size=3), min_size=1, max_size=4),
       st.sampled_from((".jsonl", ".json", ".jsonl.gz", ".json.gz")), st.booleans())
def test_rows_that_were_written_are_read_back(tmp_path_factory, found, suffix, listed):
    """One a line or as a list, packed or not, in whatever alphabet.
    Red: records.py:json_rows: `first == b"["` -> `first == b"("`
    Red: records.py:strict_json: `"utf-8-sig"` -> `"latin-1"`"""
    path = tmp_path_factory.getbasetemp() / f"written{suffix}"
    whole = listed and ".json" + ".gz" * suffix.endswith(".gz") == suffix
    content = line(found) if whole else b"\n".join(map(line, found))
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    assert [row for _, row in records.rows(path)] == found


@given(contents(), st.sampled_from((1, 3, 2**20)))
@example(b"\xef\xbb\xbf\n{}", 1)
@example(b"PK\x03\x04\n{}", 1)
def test_lines_by_offset_are_the_rows_of_any_file(tmp_path_factory, content, chunk):
    """The same rows, the same places and the same words of refusal.
    Red: lines.py:Lines.scan: `last + chunk` -> `b" " + chunk`
    Red: lines.py:Lines.at: `return n + 1, ` -> `return n, `"""
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK", chunk)
        try:
            found = lines.Lines(path)
        except ValueError as error:  # the bytes of an archive
            assert drained(records.rows(path)) == ([], str(error))
            return
    each = drained(found[i] for i in range(len(found)))
    assert each == drained(records.rows(path))
    backwards = [drained(found[j] for j in [i]) for i in reversed(range(len(found)))][::-1]
    assert [row for one, _ in backwards[:len(each[0])] for row in one] == each[0]
    found.file.close()


@given(many, st.integers(0, 15), seeds)
def test_holding_out_takes_whole_prompts_and_no_more_than_it_needs(found, count, seed):
    """At least `count` examples unless all are taken, and fewer without any prompt taken.
    Red: data.py:hold_out: `if total >= count` -> `if total > count`
    Red: data.py:hold_out: `total += sizes[prompt]` -> `total += 1`"""
    held, sizes = data.hold_out(found, count, seed), Counter(e.prompt for e in found)
    taken = sum(sizes[p] for p in held)
    assert held <= sizes.keys() and (taken >= count or held == sizes.keys())
    assert held == data.hold_out(found[::-1], count, seed)
    assert not held or taken - max(sizes[p] for p in held) < count
    assert bool(held) == bool(count and found)


sizes = st.lists(st.integers(0, 9), min_size=1, max_size=4)
weighted = sizes.flatmap(lambda s: st.tuples(st.just(s), st.lists(
    st.sampled_from((0.0, 0.3, 0.5, 1.0, 1.7, 3.0)), min_size=len(s), max_size=len(s))))


@given(weighted, seeds, st.integers(0, 5), st.integers(0, 40))
def test_an_epoch_holds_exactly_its_share_of_every_file_and_can_begin_anywhere(
        files, seed, epoch, start):
    """round(w * size) rows of each file, none out of range, and start k skips exactly k.
    Red: data.py:order: `range(start, at, 4096)` -> `range(start, at - 1, 4096)`
    Red: data.py:order: `round(weight * size)` -> `int(weight * size)`"""
    found = list(data.order(*files, seed, epoch))
    shares = [round(w * s) for s, w in zip(*files, strict=True)]
    assert Counter(f for f, _ in found) == Counter(dict(enumerate(shares))) - Counter()
    assert all(0 <= row < files[0][file] for file, row in found)
    assert list(data.order(*files, seed, epoch, start)) == found[start:]


@given(st.integers(1, 9), st.sampled_from((0.3, 0.5, 1.0, 1.7, 3.0)), seeds, st.integers(1, 6))
def test_after_any_number_of_epochs_rows_were_seen_equally_often(size, weight, seed, epochs):
    """Give or take one.
    Red: data.py:order: `[seed, file, lap]` -> `[seed, file, lap, slot]`
    Red: data.py:order: `slot, last = epoch * count,` -> `slot, last = (epoch and 1) * count,`"""
    seen = Counter(range(size))
    for epoch in range(epochs):
        seen.update(row for _, row in data.order([size], [weight], seed, epoch))
    assert max(seen.values()) - min(seen.values()) <= 1


@given(many, READS)
def test_units_and_rows_left_out_are_all_the_rows(found, reads):
    """Each row is in one unit or counted as left out, in the order of the file.
    Red: data.py:units: `left["a tie"] += len(group)` -> `left["a tie"] += 1`
    Red: data.py:grouped: `i += len(group)` -> `i += 1`"""
    made, left = data.units(found, reads)
    assert sum(map(len, made)) + sum(left.values()) == len(found)
    assert all(count > 0 for count in left.values())
    places = [sorted(int(e.where) for e in unit) for unit in made]
    flat = [place for unit in places for place in unit]
    assert flat == sorted(set(flat)) and all(unit[-1] - unit[0] == len(unit) - 1 for unit in places)


@given(many)
def test_groups_are_the_rows_cut_at_some_places(found):
    """Laid end to end they are the rows, and two rows of one group have one prompt.
    Red: data.py:grouped: `len(prompts) > 1` -> `len(prompts) > 2`
    Red: data.py:grouped: `group = group[:1]` -> `group = group[1:]`"""
    groups = data.grouped(found)
    assert [e for group in groups for e in group] == found
    assert all(len(g) == 1 or len(g) == 2 and g[0].prompt == g[1].prompt for g in groups)
    assert all(tuple(e.kind for e in g) in (("chosen", "rejected"), ("scored", "scored"))
               for g in groups if len(g) == 2)


@given(many)
def test_a_pair_prefers_something_and_says_so_in_its_kinds(found):
    """One prompt, chosen before rejected; of two scores the better; labels are 0 or 1.
    Red: data.py:units: `key=lambda e: -e.reward` -> `key=lambda e: e.reward`
    Red: data.py:units: `float(e.reward > 0.5)` -> `e.reward`"""
    for chosen, rejected in data.units(found, "pairs")[0]:
        assert chosen.prompt == rejected.prompt and chosen.reward != rejected.reward
        assert (chosen.kind, rejected.kind) == ("chosen", "rejected")
        assert chosen.reward > rejected.reward or found[int(chosen.where)].kind == "chosen"
    assert all(e.reward in (0, 1) for e, in data.units(found, "labels")[0])


ranges = st.tuples(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6)).map(lambda t: (t[0], t[0] + t[1]))


@given(ranges, st.floats(0, 1), st.floats(0, 1))
def test_a_score_range_is_mapped_onto_0_to_1_without_changing_the_order(limits, one, two):
    """Both ends exactly; a greater score is never a smaller reward.
    Red: data.py:scaled: `return (value - low) / (high - low)` -> `return (value - low) / high`
    Red: data.py:scaled: `return (value - low)` -> `return (high - value)`"""
    low, high = limits
    scores = [min(high, low + part * (high - low)) for part in sorted((one, two))]
    rewards = [data.scaled(s, "score", low, high) for s in (low, *scores, high)]
    assert rewards == sorted(rewards) and (rewards[0], rewards[-1]) == (0, 1)


@given(ranges, st.one_of(st.floats(), values))
def test_what_is_not_a_number_of_the_range_is_refused(limits, value):
    """NaN, infinity, booleans, texts and numbers outside, by the name of the column.
    Red: data.py:scaled: `not low <= value <= high` -> `value < low or value > high`
    Red: data.py:scaled: `type(value) not in (int, float)` -> `not isinstance(value, int | float)`
    """
    inside = type(value) in (int, float) and limits[0] <= value <= limits[1]
    try:
        assert 0 <= data.scaled(value, "score", *limits) <= 1 and inside
    except ValueError as error:
        assert not inside and "score is" in str(error)


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4), st.integers(0, 2))
def test_a_better_helpsteer_grade_is_a_better_reward(h, c, k, which):
    """Each attribute counts, and the reward stays in [0, 1].
    Red: data.py:read_helpsteer: `16 * c` -> `0 * c`"""
    names = ("helpfulness", "correctness", "coherence")
    grades = dict(zip(names, (h, c, k), strict=True))

    def reward(given):
        return data.read_helpsteer({"prompt": "q", "response": "a"} | given, "")[0].reward

    better = grades | {names[which]: min(4, grades[names[which]] + 1)}
    assert 0 <= reward(grades) <= reward(better) <= 1
    assert (reward(grades) < reward(better)) == (grades != better)
    assert math.isclose(reward(grades), (0.65 * h + 0.8 * c + 0.45 * k) / 7.6)


@given(messages.map(lambda said: [m for m in said if m["role"] not in ("human", "gpt", "tool")]))
def test_a_conversation_is_cut_at_its_answers_and_loses_nothing(said):
    """Prompt and response of each row are the turns up to an answer; it ends with one, or is left.
    Red: data.py:read_messages: `if out and said[-1]` -> `if said and said[0]`
    Red: data.py:read_messages: `enumerate(said)` -> `enumerate(said[:2])`
    Red: data.py:read_messages: `said[:t]` -> `said[1:t]`"""
    turns = tuple((m["role"], m["content"]) for m in said)
    answers = [t for t, (role, _) in enumerate(turns) if role == "assistant" and t]
    if answers and turns[-1][0] != "assistant":
        with pytest.raises(doubts.Skip):
            data.read_messages({"messages": said}, "")
        return
    found = data.read_messages({"messages": said}, "")
    assert [e.prompt + (("assistant", e.response),) for e in found] == [
        turns[:t + 1] for t in answers]


@given(words, words, words, st.booleans())
def test_a_pair_says_the_same_as_texts_and_as_messages(prompt, chosen, rejected, shared):
    """Prompt apart or repeated in both answers: the same two rows, rewards 1 and 0.

    Two answers that are one text prefer nothing: such a row is left out, in both forms.
    Red: data.py:read_pair: `chosen == rejected and rewards` -> `False and rewards`
    Red: data.py:read_pair: `(1.0, 0.0)` -> `(1.0, 0.5)`
    Red: data.py:read_pair: `prompt = said or prompt` -> `prompt = said`"""
    asked = {"role": "user", "content": prompt}
    lead = [asked] if shared else []
    row = {"prompt": prompt} | {
        k: [*lead, {"role": "assistant", "content": v}]
        for k, v in (("chosen", chosen), ("rejected", rejected))}
    plain = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if chosen == rejected:
        for same in (row, plain):
            with pytest.raises(doubts.Skip):
                data.read_pair(same, "")
        return
    if "<extra_id_1>" not in prompt:
        assert data.read_pair(row, "") == data.read_pair(plain, "")
        assert [(e.response, e.reward) for e in data.read_pair(row, "")] == [
            (chosen, 1), (rejected, 0)]
