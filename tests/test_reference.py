"""Kept log-probs of the reference are those of the pass they replace, and say whose they are."""
import contextlib
import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import data
import lora
import model
import reference
import scoring
import tokens
import train


@pytest.fixture
def units(base, files):
    """Pairs, encoded."""
    chat = tokens.Chat(base, "plain")
    rows = tokens.encode_all(data.read(files / "pairs.jsonl")[0], chat, 128)[0]
    return data.units(rows, "pairs")[0]


def refs(units):
    return torch.tensor([row.ref_logps for unit in units for row in unit])


def refuse(*_):
    raise AssertionError("a reference pass was run")


def test_a_filled_row_carries_what_its_reference_pass_gives_bit_for_bit(adapted, units):
    """The adapter changes nothing of it.
    Red: reference.py:fill: `with lora.disabled(net)` -> `with torch.no_grad()`
    Red: reference.py:fill: `zip(names, logps` -> `zip(names[::-1], logps`"""
    batch = tokens.collate([row for unit in units for row in unit])
    want = scoring.score(adapted, batch, reference=True).ref_logps
    assert torch.equal(refs(reference.fill(adapted, units, {}, 10**6)), want)


def test_what_is_known_needs_no_pass(adapted, units, monkeypatch):
    """From the store, or carried by the row itself; both the very numbers.
    Red: reference.py:fill: `row.ref_logps is None and k not in known` -> `True`"""
    known = {}
    filled = reference.fill(adapted, units, known, 1)
    monkeypatch.setattr(adapted, "response_logps", refuse)
    assert reference.fill(adapted, units, known, 1) == filled
    assert reference.fill(adapted, filled, {}, 1) == filled


def test_no_neighbour_decides_the_last_bit(adapted, units, tmp_path, monkeypatch):
    """In steps of two, of five, or all at once: every unit runs alone.
    Red: reference.py:through: `known, 1)` -> `known, 10**6)`"""
    found, seen, real = [], [], tokens.collate
    monkeypatch.setattr(tokens, "collate", lambda rows: seen.append(len(rows)) or real(rows))
    for size in (2, 5, 40):
        steps = ((units[i:i + size], i) for i in range(0, 40, size))
        filled = reference.through(adapted, steps, tmp_path / str(size), {})
        found.append(refs([unit for part, _ in filled for unit in part]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert set(seen) == {2}


def test_a_store_gives_back_every_bit(adapted, units, tmp_path):
    """Red: reference.py:write: `list(known.values())` -> `[round(v, 3) for v in known.values()]`"""
    known = {}
    reference.fill(adapted, units, known, 1)
    reference.write(tmp_path / "deep/store.safetensors", known)
    assert reference.read(tmp_path / "deep/store.safetensors") == known and len(known) == 80
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["store.safetensors"]
    assert reference.read(tmp_path / "none.safetensors") == {}


def test_the_key_tells_ids_and_where_the_response_begins():
    """And the other rows of its unit.
    Red: reference.py:keys: `(row.prompt_len, row.ids)` -> `row.ids`
    Red: reference.py:keys: `repr((rows, i))` -> `repr((rows[i], i))`
    Red: reference.py:keys: `repr((rows, i))` -> `repr(rows)`"""
    rows = [tokens.Encoded(ids, start, 1.0, "sft", "f:1", ()) for ids, start in
            (([1, 2, 3], 1), ([1, 2, 3], 2), ([1, 2, 4], 1), ([1, 23], 1))]
    assert len({k for row in rows for k in reference.keys([row])}) == 4
    assert len({k for row in rows for k in reference.keys([rows[0], row])}) == 8


def test_what_is_known_of_one_unit_changes_no_bit_of_another(adapted, base):
    """Pairs that share a row, one of them known before, as after a stop.
    Red: reference.py:fill: `lost = [unit for` -> `lost = [unit[1:] for`
    """
    chat = tokens.Chat(base, "plain")
    said = [tokens.encode(data.Example((("user", "Say one and two."),), text, 1.0, "chosen", "f:1"),
                          chat, 99) for text in ("one two", "two", "one, one", "three four five")]
    pairs, whole, part = [(said[0], other) for other in said[1:]], {}, {}
    reference.fill(adapted, pairs, whole, 1)
    reference.fill(adapted, pairs[:1], part, 1)
    reference.fill(adapted, pairs, part, 1)
    assert whole == part and len(whole) == 6


@pytest.mark.parametrize("change", ["weights", "config", "dtype"])
def test_another_model_has_another_store(base, tmp_path, change):
    """Red: reference.py:fingerprint: `*model.weight_files(folder)` -> ``
    Red: reference.py:fingerprint: `folder / "config.json"` -> `folder / "tokenizer.json"`
    Red: reference.py:fingerprint: `f"{dtype} ` -> `f"`"""
    other, dtype = shutil.copytree(base, tmp_path / "other"), "float32"
    want = reference.fingerprint(base, dtype, "cpu")
    assert reference.fingerprint(other, dtype, "cpu") == reference.fingerprint(base, dtype, "cpu")
    if change == "weights":
        net = model.load(other, torch.float32)
        net.model.norm.weight[0] += 1
        model.save(net, other)
        shutil.copyfile(base / "config.json", other / "config.json")
    if change == "config":
        settings = json.loads((other / "config.json").read_text("utf-8")) | {"rope_theta": 9.0}
        (other / "config.json").write_text(json.dumps(settings), "utf-8")
    if change == "dtype":
        dtype = "bfloat16"
    assert reference.fingerprint(other, dtype, "cpu") != want


def test_a_damaged_store_is_named_and_nothing_is_guessed(tmp_path):
    """Red: reference.py:read: `(SafetensorError, KeyError)` -> `ZeroDivisionError`
    Red: reference.py:read: `not logps.isfinite().all()` -> `0`"""
    path = tmp_path / "store.safetensors"
    path.write_bytes(b"no header at all")
    with pytest.raises(ValueError, match=r"store\.safetensors is no store .* delete it"):
        reference.read(path)
    reference.write(path, {"0" * 32: float("nan")})
    with pytest.raises(ValueError, match=r"store\.safetensors is damaged: .* delete it"):
        reference.read(path)


def test_a_mismatched_row_does_not_inherit_the_log_probs_of_its_prompt():
    """Red: tokens.py:mismatch: `, ref_logps=None)` -> `)`"""
    rows = [tokens.Encoded([i, 5, 2], 1, 1.0, "sft", "f:1", (str(i),), -1.0) for i in (3, 4)]
    assert [row.ref_logps for row in tokens.mismatch(rows)] == [None, None]


@pytest.mark.parametrize("loss", ["uft", "dpo", "kto", "sft"])
def test_a_run_with_a_store_is_the_run_without_one(base, files, tmp_path, loss, monkeypatch):
    """Two epochs of single units: the store changes no number, and the second run makes no pass
    of its own over a trained row.
    Red: reference.py:store: `if not config.reference_cache` -> `if 1`
    Red: reference.py:through: `if len(known) > written:` -> `if False:`
    Red: scoring.py:score: `= ref_logps.to(` -> `= 2 * ref_logps.to(`"""
    name = {"uft": "scores", "dpo": "pairs", "kto": "labels", "sft": "demonstrations"}[loss]
    told, passes, real = [], [], reference.fill

    def spy(net, units, known, budget):
        passes.append(len(known))
        return real(net, units, known, budget)

    monkeypatch.setattr(reference, "fill", spy)
    for out, more in (("plain", ()), ("first", ("--reference_cache", str(tmp_path / "store"))),
                      ("second", ("--reference_cache", str(tmp_path / "store")))):
        passes.clear()
        train.main(["--model", str(base), "--data", str(files / f"{name}.jsonl"), "--template",
                    "plain", "--loss", loss, "--lr", "0.01", "--max_length", "128", "--held_out",
                    "4", "--sample_tokens", "0", "--lora_r", "2", "--batch_size", "4", "--epochs",
                    "2", "--micro_batch_tokens", "1", "--out", str(tmp_path / out), *more])
        told.append(load_file(tmp_path / out / "adapter/adapter_model.safetensors"))
        known = max(passes, default=0)
        assert (known > 0) == (out != "plain" and loss != "sft") and (
            out != "second" or loss == "sft" or passes[0] == known)
    for a, b in itertools.pairwise(told):
        close = {"atol": 1e-6, "rtol": 0} if loss == "kto" else {"atol": 0, "rtol": 0}
        assert all(torch.allclose(a[n], b[n], **close) for n in a)


def test_a_stopped_run_keeps_what_it_worked_out(adapted, units, tmp_path, monkeypatch):
    """Every NEW rows, and when the loop is left for whatever reason.
    Red: reference.py:through: `>= NEW:` -> `> NEW:`"""
    monkeypatch.setattr(reference, "NEW", 4)
    path = tmp_path / "store.safetensors"
    batches = reference.through(adapted, ((units[i:i + 2], i) for i in range(0, 40, 2)), path, {})
    with contextlib.closing(batches):
        next(batches)
        next(batches)
        assert len(reference.read(path)) == 4
    assert len(reference.read(path)) == 8
    assert lora.adapters(adapted)
