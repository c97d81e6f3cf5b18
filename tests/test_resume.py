"""A run may stop behind any step, a checkpoint may lose any part: it goes on exactly, or says why.

Numbers are compared as hex floats and tensors by their bytes: resuming has no tolerance.
"""
import json
import os
import shutil
from pathlib import Path

import pytest
from crash import trial
from safetensors.torch import load_file, save_file

import checkpoint
import config
import durable
import train

STEPS = 21  # of 12 of 36 rows: every third ends an epoch
STATE = ("step", "num_tokens", "place", "inputs", "format", "config", "versions")
FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json")


def command(base, files, out, *more):
    return ["--model", str(base), "--data", f"{files}/scores.jsonl", "--template", "plain", "--lr",
            "0.01", "--max_length", "128", "--held_out", "4", "--sample_tokens", "0", "--lora_r",
            "2", "--lora_dropout", "0.2", "--batch_size", "12", "--micro_batch_tokens", "512",
            "--steps", str(STEPS), "--save_every", "1", "--keep", "99", "--out", str(out), *more]


def rows_of(argv):
    """The rows that each step of a run reads."""
    step, seen = train.train_step, []

    def watched(net, optimizer, units, settings, rate):
        seen.append([e.where for unit in units for e in unit])
        return step(net, optimizer, units, settings, rate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", watched)
        train.main(argv)
    return seen


@pytest.fixture(scope="module")
def whole(base, files, tmp_path_factory):
    """(the run that nobody disturbed, its rows, the files)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, rows_of(command(base, files, out))


@pytest.fixture
def run(whole, tmp_path):
    """The run as it was behind step 10: its end is missing, two checkpoints are there."""
    return stopped(whole[0], tmp_path / "run", 10)


def stopped(whole, out, step):
    """A copy of a run as a kill behind `step` would have left it, and half a line further on."""
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns(
        "adapter", "results.json", "report.html", "step-*"))
    for n in range(max(1, step - 1), step + 1):
        shutil.copytree(whole / f"checkpoints/step-{n}", out / f"checkpoints/step-{n}")
    lines = (whole / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:step]) + lines[0][:40], "utf-8")
    return out


@pytest.fixture(scope="module")
def fresh(base, files):
    """(model with fresh adapters, its optimizer, settings, SHA-256 of the inputs)."""
    settings = config.parse_flags(command(base, files, "run"), {})
    weights = sorted(Path(base).glob("*.safetensors"))
    return *train.adapted(settings, base), settings, checkpoint.inputs(settings, base, weights)


def resumed(run, fresh):
    """What checkpoint.resume returns for the run."""
    net, optimizer, settings, inputs = fresh
    start = {"step": 0, "num_tokens": 0, "place": (0, 0), "inputs": inputs}
    return checkpoint.resume(net, optimizer, run, settings, start)


def rewritten(folder):
    """Makes the manifest true again, as an attacker or a careless tool would."""
    (folder / durable.MANIFEST).unlink()
    durable.write_manifest(folder)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_goes_on_behind_any_step_bit_for_bit(whole, base, files, tmp_path, step):
    """In an epoch, at its border, behind the last step: log, rows, adapter, newest checkpoint.
    Red: train.py:run_steps: `learning_rate(step, steps, ` -> `learning_rate(step, steps + start, `
    Red: train.py:run: `state["place"], ` -> `(0, 0), `
    Red: mixture.py:stream: `at * (e == first)` -> `0`
    Red: checkpoint.py:number: `int(folder.name.removeprefix("step-"))` -> `folder.name`
    Red: checkpoint.py:restore: `weights[name].data.copy_(tensor)` -> `pass`"""
    out = stopped(whole[0], tmp_path / "run", step)
    notes = out / "checkpoints/step-notes"
    notes.mkdir()
    rows = rows_of(command(base, files, out, "--resume", "true"))
    assert rows == whole[1][step:] and len(whole[1]) == STEPS
    assert trial.differences(whole[0], out) == [] and notes.is_dir()


def test_a_finished_run_takes_no_further_step(whole, base, files, tmp_path):
    """Twice in a row: exit code 0, and everything is as it was.
    Red: train.py:run_steps: `range(start, steps)` -> `range(start, steps + 1)`"""
    out = shutil.copytree(whole[0], tmp_path / "run")
    for _ in range(2):
        assert rows_of(command(base, files, out, "--resume", "true")) == []
        assert len(whole[1]) == STEPS
        assert trial.differences(whole[0], out) == []


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_checkpoint_without_one_of_its_files_is_named_and_left_out(run, fresh, name):
    """Red: durable.py:damage: `listed.keys() ^ {` -> `set() & {`
    Red: checkpoint.py:newest: `if not (why := durable` -> `if (why := durable`"""
    (run / "checkpoints/step-10" / name).unlink()
    state, told = resumed(run, fresh)
    assert state["step"] == 9
    assert "step-10 is damaged" in told[0] and name in told[0]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_checkpoint_with_a_flipped_bit_or_a_lost_end_is_named_and_left_out(
        run, fresh, name):
    """A bit in the first, the middle and the last byte; cut to nothing, to a byte, to all but one.
    Red: durable.py:damage: `path.stat().st_size, digest` -> `*listed[path.name]`"""
    path = run / "checkpoints/step-10" / name
    whole = path.read_bytes()
    for at in (0, len(whole) // 2, len(whole) - 2):  # the last is a line break in manifest.json
        spoiled = bytearray(whole)
        spoiled[at] ^= 16
        for content in (bytes(spoiled), whole[:at]):
            path.write_bytes(content)
            why = durable.damage(path.parent)
            assert why and name in why, (at, len(content))
    state, told = resumed(run, fresh)
    assert state["step"] == 9 and name in told[0]


def test_where_every_checkpoint_is_damaged_the_run_is_refused_and_untouched(run, base, files):
    """Red: checkpoint.py:newest: `    if told:` -> `    if False:`"""
    for folder in checkpoint.steps(run):
        os.truncate(folder / "optimizer.safetensors", 99)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stop:
        train.main(command(base, files, run, "--resume", "true"))
    assert stop.value.code == 2
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize("key", STATE)
def test_a_state_without_one_of_its_keys_is_refused_by_name_though_its_hash_is_right(
        run, fresh, key):
    """Red: checkpoint.py:resume: `| {"format", "config", "versions"}` -> ``
    Red: checkpoint.py:resume: `(start.keys() | {` -> `({`"""
    path = run / "checkpoints/step-10/state.json"
    state = json.loads(path.read_text("utf-8"))
    assert sorted(state) == sorted(STATE)
    path.write_text(json.dumps({k: v for k, v in state.items() if k != key}), "utf-8")
    rewritten(path.parent)
    with pytest.raises(ValueError, match=rf"step-10.*{key}"):
        resumed(run, fresh)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_without_one_of_its_tensors_is_refused_by_name_though_its_hash_is_right(
        run, fresh, name):
    """Each half of each adapter; the step and both moments of each.
    Red: checkpoint.py:restore: `for n in wanted | found if` -> `for n in found if`"""
    path = run / "checkpoints/step-10" / name
    held = load_file(path)
    assert len(held) == (28 if name[0] == "a" else 84)
    for lost in held:
        save_file({n: t.clone() for n, t in held.items() if n != lost}, path)
        rewritten(path.parent)
        layer = lost.removeprefix("base_model.model.").split(".lora_")[0]
        with pytest.raises(ValueError, match=layer):
            resumed(run, fresh)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_with_a_tensor_of_another_shape_is_refused_though_its_hash_is_right(
        run, fresh, name):
    """A tensor that would be spread by broadcasting, or a scalar where a matrix was.
    Red: checkpoint.py:restore: `wanted.get(n) != found.get(n)` -> `n not in found`"""
    path = run / "checkpoints/step-10" / name
    held = load_file(path)
    key = next(n for n in held if n.endswith(("lora_A.weight", "lora_A/exp_avg")))
    save_file({n: (t[:1] if n == key else t).clone() for n, t in held.items()}, path)
    rewritten(path.parent)
    with pytest.raises(ValueError, match=r"step-10|shape"):
        resumed(run, fresh)
