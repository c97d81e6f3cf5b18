"""The scaling benchmark in miniature: what it makes, what a process measures, what it writes."""
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import mixture
import model
from bench import large, run, scaling, work

TINY = work.SHAPES["tiny"]
RECORD = {
    "machine": {"cores": 2, "memory_gib": 8, "torch": "2"},
    "rows": [{"rows": 1, "length": 256, "mib": 12.34, "seconds": 0.12345, "mib_saved": 1234.5,
              "seconds_saved": 99.99}],
    "load": [{"load": "7b", "cache": "on disk", "seconds": 4.5, "tensors_mib": 1000.0,
              "peak_mib": 1030.0, "ratio": 1.03, "anonymous_mib": 0.5, "mapped_mib": 1001.0}]}


def points(part, sizes, folder):
    return scaling.points(part, sizes, TINY, folder)


def test_the_table_shows_every_part_that_was_measured_and_no_other():
    """Red: bench/scaling.py:table: `{v:.3g}` -> `{v:.2g}`
    Red: bench/scaling.py:table: `for key in heads` -> `for key in [*heads][::-1]`
    Red: bench/scaling.py:table: `if p in record` -> `if p in ("load",)`"""
    text = scaling.table(RECORD)
    assert text.startswith("2 cores, 8 GiB, torch 2, two threads.\n\n")
    assert "| rows a step | MiB | MiB, checkpointing | seconds | seconds, checkpointing |" in text
    assert "\n| 1 | 12.3 | 1,234 | 0.123 | 100 |\n" in text
    assert "\n| 7b | on disk | 4.5 | 1,000 | 1,030 | 1.03 | 0.5 | 1,001 |\n" in text
    assert text.count("\n| --- |") == 2


def test_points_vary_one_number_and_share_the_model(tmp_path):
    """Red: bench/scaling.py:points: `vocabulary=point["vocabulary"]` -> `hidden=32`
    Red: bench/scaling.py:points: `part: size}` -> `"rows": size}`
    Red: bench/scaling.py:points: `if not place.exists()` -> `if place.exists()`"""
    found = [*points("length", (8, 16), tmp_path), *points("vocabulary", (512, 640), tmp_path)]
    assert [(p["rows"], p["length"], p["vocabulary"]) for p in found] == [
        (1, 8, 512), (1, 16, 512), (1, 1024, 512), (1, 1024, 640)]
    assert [p["folder"] for p in found] == [str(tmp_path / n) for n in ("512",) * 3 + ("640",)]
    for point in found:
        made = model.ModelConfig.from_folder(point["folder"])
        assert made.vocab_size == point["vocabulary"]
    full, = points("rows", (64,), tmp_path)
    assert (full["rows"], full["length"], full["micro_batch_tokens"]) == (64, 256, 2048)


STEPS = """
import json, sys
from bench import scaling
scaling.REPEAT, point = 2, json.loads(sys.argv[1])
scaling.step(point)  # what a process does once
print(json.dumps([scaling.step(point | {"micro_batch_tokens": n}) for n in (128, 4096)]))
"""


def test_a_step_grows_with_its_rows_until_a_micro_batch_is_full(tmp_path):
    """Thirty-two rows in micro-batches of one take what one takes, all together far more. In a
    process of its own: one that has run other tests has memory to spare.
    Red: bench/scaling.py:step: `point["micro_batch_tokens"]` -> `8192`
    Red: bench/scaling.py:step: `memory()["VmHWM"] - before["VmRSS"]` -> `memory()["VmRSS"]`"""
    point, = points("rows", (32,), tmp_path)
    point |= {"length": 128, "checkpointing": False}
    done = subprocess.run([sys.executable, "-c", STEPS, json.dumps(point)], cwd=run.ROOT, text=True,
                          stdout=subprocess.PIPE, check=True)
    cut, whole = json.loads(done.stdout)
    assert 4 * cut["mib"] < whole["mib"] < 200 and whole["mib"] > 4
    assert cut["seconds"] > 0


def test_checkpointing_reaches_the_step(tmp_path, monkeypatch):
    """Red: bench/scaling.py:step: `point["checkpointing"]` -> `False`
    Red: bench/scaling.py:step: `range(REPEAT)` -> `range(1, REPEAT)`
    Red: bench/scaling.py:step: `point["length"] // 2` -> `point["length"] - 1`"""
    met = []
    monkeypatch.setattr(scaling.train, "train_step", lambda net, optimizer, units, config, rate:
                        met.append((units, config, rate)))
    for on in (False, True):
        scaling.step(next(points("rows", (3,), tmp_path)) | {"checkpointing": on})
    assert [c.gradient_checkpointing for _, c, _ in met] == [False] * 3 + [True] * 3
    units, config, _ = met[0]
    assert (config.loss, config.lora_r, config.dtype) == ("uft", 16, "float32")
    assert [(len(e.ids), e.prompt_len) for e, in units] == [(256, 128)] * 3
    assert len({tuple(e.ids) for e, in units}) == 3


def test_rows_are_of_the_length_that_is_told_and_differ(tmp_path):
    """Red: bench/large.py:rows: `{i} {text` -> `{text`
    Red: bench/large.py:rows: `text[at + 200:at + 415]` -> `text[at + 200:]`"""
    large.rows(tmp_path / "rows.jsonl", 300)
    lines = (tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)
    assert len({json.loads(line)["prompt"].split()[0] for line in lines}) == len(lines) == 300
    assert 450 <= min(map(len, lines)) and max(map(len, lines)) <= 490


def test_a_small_file_is_read_by_offset_too(tmp_path, monkeypatch):
    """Red: bench/scaling.py:start: `mixture.LARGE = 0` -> `mixture.LARGE = 1e9`
    Red: bench/scaling.py:start: `after[kind] - before["VmRSS"]` -> `after[kind]`"""
    monkeypatch.setattr(mixture, "LARGE", mixture.LARGE)
    monkeypatch.setattr(mixture, "SAMPLE", 150)
    point, = points("data", (200,), tmp_path)
    read, seen = mixture.read, []
    monkeypatch.setattr(mixture, "read", lambda *given: seen.append(read(*given)) or seen[-1])
    said = scaling.start(point)
    assert len(seen[0][-1]) == 200  # the file's lines.Units, None where it was read whole
    assert said["seconds"] > 0 and -50 < said["mib"] <= said["peak_mib"] < 100


def test_a_checkpoint_in_shards_loads_with_its_tensors_mapped(tmp_path):
    """Red: bench/large.py:checkpoint: `files |= dict.fromkeys` -> `files = dict.fromkeys`
    Red: bench/large.py:checkpoint: `row.bfloat16()` -> `row`
    Red: bench/scaling.py:load: `after["RssAnon"] - before["RssAnon"]` -> `after["RssFile"]`"""
    shape = TINY._replace(hidden=512, intermediate=2048, vocabulary=16384)
    large.checkpoint(tmp_path / "made", shape)
    assert len([*(tmp_path / "made").glob("*.safetensors")]) == 3
    said = scaling.load({"folder": str(tmp_path / "made")})
    assert said["tensors_mib"] == pytest.approx(48, abs=2)
    assert said["anonymous_mib"] < 24
    assert said["mapped_mib"] > 40
    assert said["ratio"] == pytest.approx(said["peak_mib"] / said["tensors_mib"])


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    """Red: bench/large.py:checkpoint: `if need >` -> `if need < 0 >`"""
    monkeypatch.setattr(large.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**10))
    with pytest.raises(ValueError, match="make room"):
        large.checkpoint(tmp_path / "made", TINY)
    assert [*(tmp_path / "made").iterdir()] == []


def test_a_process_of_its_own_says_what_is_recorded(tmp_path, monkeypatch):
    """Red: bench/scaling.py:measure: `k not in ("folder", "file")` -> `k`
    Red: bench/scaling.py:main: `"load": load` -> `"load": step`"""
    line = scaling.measure("load", next(points("load", ("tiny",), tmp_path)))
    assert line.keys() == scaling.TABLES["load"][1].keys()
    assert 50 < line["peak_mib"] < 1000


def test_the_figure_has_four_panels_and_no_date(tmp_path):
    """Also where a part is missing.
    Red: bench/scaling.py:figure: `metadata={"Date": None}` -> ``
    Red: bench/scaling.py:figure: `subplots(2, 2)` -> `subplots(2, 1)`"""
    pytest.importorskip("matplotlib")
    scaling.figure(RECORD, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text("utf-8")
    assert [f'id="axes_{i}"' in text for i in range(1, 6)] == [True] * 4 + [False]
    assert "<dc:date>" not in text


def test_the_recorded_table_stands_in_the_page():
    """Holds once both are recorded.
    Seen red by changing one number of docs/performance.md by hand."""
    files = run.ROOT / "bench/scaling.json", run.ROOT / "docs/performance.md"
    if not all(f.is_file() for f in files):
        pytest.skip("nothing is recorded yet")
    record, text = (f.read_text("utf-8") for f in files)
    assert scaling.table(json.loads(record)) in text
