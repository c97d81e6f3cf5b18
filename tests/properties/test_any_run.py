"""Properties of mixture.py, lines.py and config.py: any files, any place to go on from."""
import itertools
import json
import math
from collections import Counter
from dataclasses import fields

import folder
import pytest
from anything import KINDS, seeds, texts
from hypothesis import given
from hypothesis import strategies as st

import config
import data
import lines
import mixture
import tokens

ASKED = tuple(f"Say {i}." for i in range(3))
sizes = st.lists(st.integers(1, 7), min_size=1, max_size=3)
weights = st.sampled_from((0.3, 0.5, 1.0, 1.7, 3.0))
row = st.one_of(
    st.fixed_dictionaries({"prompt": st.sampled_from(ASKED), "response": st.just("one"),
                           "score": st.sampled_from((0, 0.5, 1))}),
    st.fixed_dictionaries({"prompt": st.sampled_from(ASKED), "chosen": st.just("one"),
                           "rejected": st.sampled_from(("two", "long " * 30, " "))}),
    st.fixed_dictionaries({"messages": st.lists(st.sampled_from(("user", "assistant")), max_size=4)
                           .map(lambda said: [{"role": r, "content": "Say 1."} for r in said])}))


class Later(lines.Units):
    """A large file whose rows begin `counts` units each, some none: (row, number) stands for one.
    """

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, i: int) -> tuple[list, list]:
        return [(i, n) for n in range(self.counts[i])], []


def drawn(setup, files, shares, place, count):
    """(batches, places behind them) of a stream from a place on."""
    return list(itertools.islice(mixture.stream(files, shares, setup, place), count))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return tokens.Chat(folder.write_model(tmp_path_factory.mktemp("run") / "tiny"), "plain")


@given(st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=5).filter(any), weights),
                min_size=1, max_size=3).filter(lambda fs: any(round(w * len(c)) for c, w in fs)),
       st.integers(1, 4), seeds)
def test_from_every_place_the_stream_goes_on_as_if_it_had_never_stopped(files, size, seed):
    """Also where a row gave several units and a batch ended between them.
    Red: mixture.py:stream: `for unit in units[used:]` -> `for unit in units`
    Red: mixture.py:stream: `used % len(units))` -> `0)`
    Red: mixture.py:stream: `at * (e == first)` -> `at`"""
    later = [Later(counts) for counts, _ in files]
    setup = config.Config("m", ("d",), batch_size=size, seed=seed)
    picks = set(itertools.islice(
        (p for e in range(3) for p in data.order(
            [len(f) for f in later], [w for _, w in files], seed, e)), 60))
    if not any(later[f].counts[r] for f, r in picks):
        return  # an epoch that holds rows without a unit only
    shares = [w for _, w in files]
    whole = drawn(setup, later, shares, (0, 0), 7)
    for k in range(6):
        assert drawn(setup, later, shares, whole[k][1], 6 - k) == whole[k + 1:]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=3).filter(
    lambda files: any(map(any, files))), seeds)
def test_an_epoch_of_the_stream_has_every_unit_once(files, seed):
    """None twice, none skipped, whatever rows begin none or several.
    Red: mixture.py:stream: `drawn, used = drawn + 1, 0` -> `drawn, used = drawn + 1, used`
    Red: mixture.py:stream: `(drawn + used // len(units)` -> `(drawn + 1`"""
    later, total = [Later(counts) for counts in files], sum(map(sum, files))
    setup = config.Config("m", ("d",), batch_size=1, seed=seed)
    shares = [1.0] * len(files)
    for epoch in range(2):
        found = [batch[0] for batch, _ in drawn(
            setup, later, shares, (epoch * sum(map(len, files)), 0), total)]
        assert Counter(found) == Counter(u for f in later for i in range(len(f)) for u in f[i][0])
    assert drawn(setup, later, shares, (0, 0), 2 * total)[-1][1][1] in range(3)


@given(sizes, st.integers(1, 4), seeds, st.integers(0, 6))
def test_batches_have_their_size_and_follow_the_order_of_the_data(counts, size, seed, start):
    """Units that are whole rows: batch k is rows k * size and on of data.order, epoch by epoch.
    Red: mixture.py:stream: `if len(batch) == config.batch_size` -> `if len(batch) >= 3`
    Red: mixture.py:stream: `config.seed, e,` -> `config.seed, 0,`"""
    files = [[(f, i) for i in range(n)] for f, n in enumerate(counts)]
    setup, shares = config.Config("m", ("d",), batch_size=size, seed=seed), [1.0] * len(counts)
    flat = [pick for epoch in range(30) for pick in data.order(counts, shares, seed, epoch)]
    for k, (batch, place) in enumerate(drawn(setup, files, shares, (start, 0), 5)):
        assert batch == flat[start + k * size:start + (k + 1) * size]
        assert place == (start + (k + 1) * size, 0)


@given(st.lists(row, min_size=1, max_size=9), st.sampled_from(
    ("prompts", "rows", "demonstrations", "pairs", "labels")), st.integers(0, 4))
def test_any_file_read_row_by_row_gives_the_units_of_the_whole_file(
        tmp_path_factory, chat, found, reads, held):
    """Whatever formats stand beside one another; the same rows are dropped.
    Red: lines.py:Units.begun: `"rejected": 1` -> `"rejected": 0`
    Red: lines.py:Units.begun: `in ("scored", "chosen")` -> `in ("scored",)`
    Red: lines.py:Units.__getitem__: `lost + long` -> `lost`"""
    path = tmp_path_factory.getbasetemp() / "mixed.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in found), "utf-8")
    setup = config.Config("m", (str(path),), held_out=held, max_length=60)
    with pytest.MonkeyPatch.context() as patch:
        outcomes = []
        for large in (mixture.LARGE, 0):
            patch.setattr(mixture, "LARGE", large)
            try:
                outcomes.append(mixture.load_data(setup, chat, reads))
            except ValueError as error:
                outcomes.append("nothing is left" in str(error) or "no usable" in str(error))
    whole, later = outcomes
    if isinstance(whole, tuple) and isinstance(later, tuple):
        each = [later[0][0][i] for i in range(len(later[0][0]))]
        assert named(u for units, _ in each for u in units) == named(whole[0][0])
        assert [d for _, dropped in each for d in dropped] == sorted(
            whole[4], key=lambda d: int(d["where"].rpartition(":")[2]))
        assert named(whole[2]) == named(later[2])
    else:
        assert True in (whole, later)


def named(units):
    """How often each unit is there."""
    return Counter(tuple((e.where, tuple(e.ids), e.reward, e.kind) for e in u) for u in units)


FLAGS = [f.name for f in fields(config.Config) if f.type in (int, float)]


@given(st.sampled_from(FLAGS), st.one_of(st.integers(-3, 3), st.floats()))
def test_any_number_is_a_setting_or_refused_by_its_flag(name, value):
    """What is accepted is a finite number; NaN and infinity never are.
    Red: config.py:Config.__post_init__: `lambda x: 0 <= x <= 1,` -> `lambda x: x <= 1,`
    Red: config.py:Config.__post_init__: `lambda x: 0 < x <= 1e9` -> `lambda x: not x <= 0`"""
    try:
        setup = config.Config("m", ("d",), **{name: value})
    except ValueError as error:
        assert str(error).startswith(f"--{name}: found {value!r}")
        return
    assert math.isfinite(getattr(setup, name)) and getattr(setup, name) >= 0


@given(st.data())
def test_a_setting_written_as_flags_is_read_back(found):
    """Every field of Config, whatever its value, spelled as one word or two.
    Red: command.py:Parser.parse_args: `?=-[` -> `?=+[`
    Red: config.py:boolean: `return text == "true"` -> `return bool(text)`
    Red: config.py:parse_flags: `tuple(text.split(","))` -> `(text,)`"""
    word = st.text("abcde./_", min_size=1, max_size=5)
    draws = {str: word, bool: st.booleans(), int: st.integers(2, 2**16),
             float: st.floats(1e-6, 0.49), tuple[str, ...]: st.lists(word, min_size=1).map(tuple),
             tuple[float, float]: st.just((-2.0, 3.5))}
    given_ = {f.name: found.draw(draws[f.type]) for f in fields(config.Config)
              if f.name == "model" or found.draw(st.booleans()) or f.name == "data"}
    words = []
    for name, value in given_.items():
        many = value if name in config.REPEATED else [
            ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        for one in many:
            pair = [f"--{name}", one.lower() if isinstance(value, bool) else one]
            words += pair if found.draw(st.booleans()) else ["=".join(pair)]
    assert config.parse_flags(words, {}) == config.Config(**given_)


kinds = st.sampled_from(KINDS)


@given(st.lists(st.tuples(st.sampled_from(ASKED), kinds, st.integers(0, 3)), max_size=12), texts)
def test_the_parts_of_a_mixture_keep_their_prompts_apart(found, more):
    """Held-out prompts are whole, over all rows together: none is on both sides.
    Red: data.py:hold_out: `chosen.add(prompt)` -> `chosen.add(prompt[:0])`"""
    rows = [data.Example((("user", p + more),), "a", r / 3, k, "") for p, k, r in found]
    held = data.hold_out(rows, len(rows) // 2, 0)
    inside = [e for e in rows if e.prompt in held]
    assert len(inside) >= len(rows) // 2
    assert not {e.prompt for e in inside} & {e.prompt for e in rows if e.prompt not in held}
