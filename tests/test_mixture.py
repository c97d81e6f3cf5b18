"""Theorems about mixing files: what is held out, and in which order the rest comes."""
import pytest

import config
import mixture
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
