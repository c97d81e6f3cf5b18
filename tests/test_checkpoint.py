"""checkpoint.py and stops.py: what is kept, what is refused, what a signal does.

tests/crash kills real runs; here one thing at a time is wrong, and the message names it.
"""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import checkpoint
import config
import durable
import lora
import stops
import train

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("--max_length", "100", "--sample_tokens", "0", "--held_out", "4", "--steps", "4", "--keep",
         "9", "--save_every", "1", "--template", "plain", "--lora_r", "2")


def command(base, files, out, *more):
    return ["--model", str(base), "--data", f"{files}/scores.jsonl:2", "--out", str(out), *FLAGS,
            *more]


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def done(base, files, tmp_path_factory):
    """A finished run of four steps with a checkpoint after each."""
    out = tmp_path_factory.mktemp("done") / "run"
    train.main(command(base, files, out))
    return out


@pytest.fixture
def run(done, tmp_path):
    return shutil.copytree(done, tmp_path / "run")


def policy(out):
    """(model, optimizer, config) with adapters after one step, and a run folder for them."""
    net = tiny.transformer()
    lora.inject(net, 2, 4.0)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text("{}")
    return net, optimizer, config.Config(model="m", data=("d",))


def numbers(*steps):
    return [f"step-{n}" for n in steps]


def test_the_newest_checkpoints_are_kept_and_nothing_of_the_users_is_touched(tmp_path):
    """Red: checkpoint.py:save: `[:-config.keep]` -> `[:-config.keep - 1]`
    Red: checkpoint.py:save: `if (p / durable.MANIFEST).is_file()` -> ``
    Red: checkpoint.py:steps: `re.fullmatch(r"step-\\d+", p.name)` -> `p.name[-4:] != "otes"`
    Red: checkpoint.py:number: `int(folder.name.removeprefix("step-"))` -> `folder.name`"""
    net, optimizer, settings = policy(tmp_path)
    for mine in ("step-3", "step-notes", "step-1.bak"):
        (tmp_path / "checkpoints" / mine).mkdir(parents=True)
    for step in (2, 9, 10, 100):
        checkpoint.save(net, optimizer, tmp_path, {"step": step}, settings)
    found = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert found == sorted([*numbers(3, 10, 100), "step-notes", "step-1.bak"])


def test_damaged_newer_checkpoints_count_for_nothing(tmp_path):
    """A run that went on from before them keeps its own.
    Red: checkpoint.py:save: `if number(p) <= state["step"]` -> ``"""
    net, optimizer, settings = policy(tmp_path)
    for step in (4, 8, 12, 6):
        checkpoint.save(net, optimizer, tmp_path, {"step": step}, replace(settings, keep=9))
    checkpoint.save(net, optimizer, tmp_path, {"step": 7}, settings)
    assert [p.name for p in checkpoint.steps(tmp_path)] == numbers(6, 7, 8, 12)


@pytest.mark.parametrize("place", ["lora_A", "lora_B", "exp_avg_sq"])
def test_nothing_that_is_not_finite_is_ever_saved(tmp_path, place):
    """Red: checkpoint.py:save: `if not t.sum().isfinite() and` -> `if False and`
    Red: checkpoint.py:save: `(trained | tensors).items()  #` -> `trained.items()  #`
    Red: checkpoint.py:save: `(trained | tensors).items()  #` -> `tensors.items()  #`"""
    net, optimizer, settings = policy(tmp_path)
    layer = next(iter(lora.adapters(net).values()))
    held = {"exp_avg_sq": optimizer.state[layer.lora_A]["exp_avg_sq"]}
    (held | {n: getattr(layer, n).data for n in ("lora_A", "lora_B")})[place][0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=f"{place}.* is not finite"):
        checkpoint.save(net, optimizer, tmp_path, {"step": 1}, settings)
    assert not (tmp_path / "checkpoints").exists()


def test_a_save_that_fails_says_what_it_needs_and_keeps_older_ones(tmp_path, monkeypatch):
    """Red: checkpoint.py:save: `except OSError as error:` -> `except KeyError as error:`
    Red: checkpoint.py:save: `sum(t.nbytes for t` -> `sum(1 for t`"""
    net, optimizer, settings = policy(tmp_path)
    checkpoint.save(net, optimizer, tmp_path, {"step": 1}, settings)
    monkeypatch.setattr(os, "fsync", lambda handle: os.stat("/missing"))
    net.requires_grad_(True)
    with pytest.raises(ValueError, match=r"step-2 failed.*needs 0.03 MB"):
        checkpoint.save(net, optimizer, tmp_path, {"step": 2}, settings)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
        run, done, base, files, capsys):
    """Red: checkpoint.py:newest: `reversed(steps(out))` -> `steps(out)`
    Red: checkpoint.py:newest: `why := durable.damage(folder)` -> `why := None`
    Red: checkpoint.py:newest: `told.append(` -> `str(`"""
    (run / "checkpoints/step-4/optimizer.safetensors").write_bytes(b"half")
    os.truncate(run / "checkpoints/step-3/state.json", 20)
    train.main(command(base, files, run, "--resume", "true"))
    told = capsys.readouterr().out
    assert "step-4 is damaged and is left out: optimizer.safetensors is not as it was" in told
    assert "step-3 is damaged" in told and "resume  after step 2" in told
    for name in ("adapter", "checkpoints/step-4", "checkpoints/step-3"):
        a, b = (load_file(o / name / "adapter_model.safetensors") for o in (run, done))
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert durable.damage(run / "checkpoints/step-4") is None


def test_a_run_without_a_whole_checkpoint_is_refused_and_left_alone(run, base, files, capsys):
    """Red: checkpoint.py:newest: `    if told:` -> `    if False:`"""
    for folder in checkpoint.steps(run):
        (folder / "state.json").unlink()
    before = {p: p.read_bytes() for p in run.rglob("*.*") if p.is_file()}
    told = refusal(capsys, *command(base, files, run, "--resume", "true"))
    assert "none of its checkpoints is whole" in told and "state.json is missing" in told
    assert before == {p: p.read_bytes() for p in run.rglob("*.*") if p.is_file()}


def test_a_run_killed_before_its_first_checkpoint_begins_anew_with_the_same_flags_only(
        run, done, base, files, capsys):
    """Red: checkpoint.py:resume: `"config": kept` -> `"config": asdict(config)`"""
    shutil.rmtree(run / "checkpoints")
    assert "lr was" in refusal(capsys, *command(base, files, run, "--resume", "true", "--lr", "1"))
    train.main(command(base, files, run, "--resume", "true"))
    a, b = (load_file(o / "adapter/adapter_model.safetensors") for o in (run, done))
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json",
                                  "generation_config.json", "chat_template.jinja"])
def test_a_model_folder_that_changed_in_one_byte_is_refused_by_name(
        run, base, files, tmp_path, name, capsys):
    """The same files in another folder are the same model.
    Red: checkpoint.py: `"chat_template.jinja",` -> ``
    Red: checkpoint.py:inputs: `[*texts, *weights, ` -> `[*texts, *weights[1:], `
    Red: checkpoint.py: `CONTENT = ("model",` -> `CONTENT = (`"""
    moved = shutil.copytree(base, tmp_path / "moved")
    train.main(command(moved, files, run, "--resume", "true"))
    content = bytearray((moved / name).read_bytes() if (moved / name).exists() else b" {{x}}")
    binary = name.endswith(".safetensors")
    content[-1 if binary else content.index(b" ")] ^= 1 if binary else 42  # a blank, a line break
    (moved / name).write_bytes(content)
    told = refusal(capsys, *command(moved, files, run, "--resume", "true"))
    assert name in told


def test_other_rows_or_another_weight_of_a_data_file_are_refused(
        run, base, files, tmp_path, capsys):
    """The same file elsewhere is the same data.
    Red: checkpoint.py:inputs: `for path, _ in shares)` -> `for path, _ in shares[1:])`
    Red: checkpoint.py:inputs: `.name}:{share:g}` -> `.name}`"""
    moved = shutil.copytree(files, tmp_path / "moved")
    argv = command(base, moved, run, "--resume", "true")
    train.main(argv)
    lighter = [a.replace("jsonl:2", "jsonl:3") for a in argv]
    assert "data file 1, scores.jsonl:2 has changed" in refusal(capsys, *lighter)
    with open(moved / "scores.jsonl", "a") as file:
        file.write("\n")
    assert "data file 1, scores.jsonl:2 has changed" in refusal(capsys, *argv)


def test_a_run_folder_in_use_is_refused(run, base, files, capsys):
    """Red: checkpoint.py:locked: `fcntl.LOCK_EX | fcntl.LOCK_NB` -> `fcntl.LOCK_SH`"""
    with checkpoint.locked(run):
        told = refusal(capsys, *command(base, files, run, "--resume", "true"))
    assert "is in use by another run" in told


def test_a_run_that_began_meanwhile_is_not_overwritten(run, base, files, monkeypatch, capsys):
    """Red: train.py:train: `run_folder(replace(config, out=str(out)))` -> `pass`"""
    hidden = run.rename(run.parent / "hidden")
    load = train.adapted
    monkeypatch.setattr(train, "adapted", lambda *a: hidden.rename(run) and load(*a))
    assert "holds a run already" in refusal(capsys, *command(base, files, run))


def test_a_disk_too_small_for_one_checkpoint_is_refused_before_training(
        base, files, tmp_path, monkeypatch, capsys):
    """Weights and both moments: 28 tensors of 1,120 numbers together, 12 bytes a number.
    Red: checkpoint.py:check_room: `need = 3 *` -> `need = 2 *`
    Red: train.py:train: `checkpoint.check_room(net, out)` -> `pass`"""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    told = refusal(capsys, *command(base, files, tmp_path / "run"))
    assert "takes 0.01 MB, the disk has 0.01 MB free" in told
    assert not (tmp_path / "run/config.json").exists()


def test_leftovers_of_a_killed_run_are_swept(run):
    """Red: checkpoint.py:locked: `durable.sweep(out)` -> `pass`
    Red: checkpoint.py:locked: `durable.sweep(out / "checkpoints")` -> `pass`"""
    left = [run / "tmp-results.json-7", run / "checkpoints/tmp-step-9-7"]
    left[0].touch()
    left[1].mkdir()
    with checkpoint.locked(run):
        assert not left[0].exists() and not left[1].exists()


@pytest.mark.parametrize("change, words", [
    ({"format": 2}, "format 2, this code reads 1"),
    ({"num_tokens": None}, "state.json has no 'num_tokens'"),
    ({"versions": {"torch": "2.0", "threads": 1}}, "torch was 2.0 and is now")])
def test_another_format_is_refused_and_another_torch_is_told(run, base, files, change, words):
    """And a state that lacks a key.
    Red: checkpoint.py:resume: `!= FORMAT` -> `== 0`
    Red: checkpoint.py:resume: `if lost := sorted(` -> `if lost := (lambda x: None)(`
    Red: checkpoint.py:resume: `if versions()[key] != value` -> `if False`"""
    path = run / "checkpoints/step-4/state.json"
    changed = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))
    (path.parent / "manifest.json").unlink()
    durable.write_manifest(path.parent)
    net, optimizer, settings = tuner(base, files, run)
    start = {"step": 0, "num_tokens": 0, "inputs": changed["inputs"]}
    if "versions" not in change:
        with pytest.raises(ValueError, match=words):
            checkpoint.resume(net, optimizer, run, settings, start)
    else:
        state, told = checkpoint.resume(net, optimizer, run, settings, start)
        assert state["step"] == 4 and words in told[0]


def tuner(base, files, run):
    """What the run trained, fresh, and its Config."""
    settings = config.parse_flags(command(base, files, run), {})
    return *train.adapted(settings, base), settings


@pytest.mark.parametrize("part", ["step", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("change, words", [
    (None, "missing"), ("/x", "no such tensor"), ("", r"has shape torch.Size\(\[1, 1\]\)")])
def test_an_optimizer_that_does_not_fit_is_refused_by_name(run, base, files, part, change, words):
    """A part missing, unknown, or of a shape that would be broadcast.
    Red: checkpoint.py:restore: `if wanted.get(n) != found.get(n)` -> `if n not in found`
    Red: checkpoint.py:restore: `if wanted.get(n) != found.get(n)` -> `if n not in wanted`
    Red: checkpoint.py:restore: `("step", "exp_avg", "exp_avg_sq")` -> `("step", "exp_avg")`
    Red: checkpoint.py:restore: `torch.Size([]) if part == "step" else p.shape` -> `p.shape`"""
    path = run / "checkpoints/step-4/optimizer.safetensors"
    held = load_file(path)
    name = next(n for n in held if n.endswith(f"/{part}"))
    if change is None:
        del held[name]
    else:
        held[name + change] = torch.zeros(1, 1)
    checkpoint.save_file(held, path)
    net, optimizer, _ = tuner(base, files, run)
    with pytest.raises(ValueError, match=f"{part}.*{words}"):
        checkpoint.restore(net, optimizer, path.parent)
    assert not optimizer.state


@pytest.mark.parametrize("adapter, words", [
    ((3, 4.0), r"lora_A has shape torch.Size\(\[2, 24\]\), expected torch.Size\(\[3, 24\]\)"),
    ((2, 4.0, ["q_proj"]), "down_proj.lora_A.*no such tensor")])
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_copied(
        run, base, files, adapter, words):
    """Red: checkpoint.py:restore: `(saved | moments).items()` -> `moments.items()`"""
    net, optimizer, _ = tuner(base, files, run)
    lora.remove(net)
    lora.inject(net, *adapter)
    before = {n: p.clone() for n, p in net.named_parameters()}
    with pytest.raises(ValueError, match=words):
        checkpoint.restore(net, optimizer, run / "checkpoints/step-4")
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


MAY_CHANGE = ("resume save_every keep reference_cache out device micro_batch_tokens timeout test "
              "gradient_checkpointing sample_tokens memory_estimate model data").split()


@pytest.mark.parametrize("name", [f.name for f in fields(config.Config)])
def test_just_the_flags_that_no_number_depends_on_may_change(name):
    """Any other is refused by its name, with both values.
    Red: checkpoint.py: `"timeout",` -> ``
    Red: checkpoint.py: `FREE = (` -> `FREE = ("seed", `
    Red: checkpoint.py:compare: `old["config"].get(key) != value` -> `False`"""
    old = asdict(config.Config("m", ("d",)))
    states = [{"inputs": {}, "config": json.loads(json.dumps(old | more))}
              for more in ({}, {name: "changed"})]
    if name in MAY_CHANGE:
        checkpoint.compare(*states, Path("run"))
    else:
        with pytest.raises(ValueError, match=f"resume run: {name} was .* now 'changed'"):
            checkpoint.compare(*states, Path("run"))


def test_the_inputs_of_a_run_are_all_files_its_numbers_depend_on(tmp_path):
    """Each once, by name, with the SHA-256 of what it holds; a colon may be part of a name.
    Red: checkpoint.py: `"special_tokens_map.json")` -> `)`
    Red: records.py:weighted: `os.path.exists(spec)` -> `False`
    Red: checkpoint.py:inputs: `data file {i + 1}` -> `data file {i}`"""
    texts = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
             "chat_template.jinja", "special_tokens_map.json")
    for name in (*texts, "w.safetensors", "a.jsonl", "b:2", "README.md"):
        (tmp_path / name).write_text(name)
    data = (f"{tmp_path}/a.jsonl:0.5", f"{tmp_path}/b:2", f"{tmp_path}/a.jsonl")
    found = checkpoint.inputs(config.Config("m", data), tmp_path, [tmp_path / "w.safetensors"])
    named = {f"model file {n}": n for n in (*texts, "w.safetensors")} | {
        "data file 1, a.jsonl:0.5": "a.jsonl", "data file 2, b:2:1": "b:2",
        "data file 3, a.jsonl:1": "a.jsonl"}
    assert found == {k: hashlib.sha256(v.encode()).hexdigest() for k, v in named.items()}


START = """
import os, signal, sys, time, train
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored in the background
plain = train.train_step
def train_step(net, optimizer, units, config, rate):
    for _ in range({times}):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.1)
    return plain(net, optimizer, units, config, rate)
train.train_step = train_step
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_a_run_behind_a_saved_step_and_it_goes_on_bit_for_bit(
        done, base, files, tmp_path, name, code, capsys):
    """Red: stops.py:signals: `caught.append(number)` -> `pass`
    Red: stops.py: `signal.SIGINT, signal.SIGTERM` -> `signal.SIGINT, signal.SIGHUP`
    Red: train.py:run_steps: `(due or number)` -> `due`
    Red: train.py:main: `128 + stop.args[1]` -> `2`"""
    argv = command(base, files, tmp_path / "run", "--save_every", "0")
    ended = subprocess.run([sys.executable, "-c", START.format(times=1, name=name), *argv],
                           cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == code and "Traceback" not in ended.stderr
    assert "stopped after step 1 of 4, which is saved" in ended.stderr
    assert f"--out {tmp_path / 'run'} --resume true" in ended.stderr
    train.main([*argv, "--resume", "true"])
    assert "resume  after step 1, " in capsys.readouterr().out
    a, b = (load_file(o / "adapter/adapter_model.safetensors") for o in (tmp_path / "run", done))
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", -15)])
def test_a_second_signal_stops_at_once(base, files, tmp_path, name, code):
    """Red: stops.py:signals: `signal.signal(kind, before[kind])  # so` -> `pass  # so`"""
    argv = command(base, files, tmp_path / "run")
    ended = subprocess.run([sys.executable, "-c", START.format(times=2, name=name), *argv],
                           cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == code and "Traceback" not in ended.stderr
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("stream", [1, 2])
def test_ctrl_c_saves_even_where_it_ends_the_reader_of_the_output_too(
        base, files, tmp_path, stream):
    """As it ends `tee` behind a pipe: what is printed then meets a broken one.
    Red: stops.py:signals: `contextlib.suppress(OSError)` -> `contextlib.nullcontext()`
    Red: train.py:run_steps: `due = (step + 1)` -> `due = (print(flush=True) or step + 1)`
    """
    broken = f"reader, writer = os.pipe(); os.close(reader); os.dup2(writer, {stream})"
    start = START.format(times=1, name="SIGINT").replace("    for _", f"    {broken}\n    for _")
    subprocess.run([sys.executable, "-c", start, *command(base, files, tmp_path / "run",
                                                          "--save_every", "0")],
                   cwd=ROOT, check=False, capture_output=True)
    assert [p.name for p in checkpoint.steps(tmp_path / "run")] == ["step-1"]


def test_a_signal_that_is_ignored_stays_ignored():
    """Red: stops.py:signals: `if before[k] != signal.SIG_IGN` -> ``"""
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stops.signals() as caught:
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN and not caught
    finally:
        signal.signal(signal.SIGINT, old)


def test_handlers_are_put_back_after_a_run():
    """Red: stops.py:signals: `        yield caught` -> `        yield caught; here = False`"""
    before = signal.getsignal(signal.SIGTERM)
    with stops.signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_dropout_is_a_function_of_seed_and_step_alone(done, base, files, tmp_path):
    """Red: train.py:run_steps: `f"{config.seed} {step} ` -> `f"{step} `
    Red: train.py:run_steps: `torch.manual_seed(dropout.getrandbits(32))` -> `pass`"""
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(len(losses))
        out = tmp_path / str(len(losses))
        argv = command(base, files, out, "--lora_dropout", "0.5", "--seed", "5", "--lr", "0.1")
        settings = config.parse_flags(argv, {})
        net, optimizer = train.adapted(settings, base)
        rows = train.mixture.load_data(settings, train.open_chat(settings, base), "rows")[0]
        out.mkdir()
        batches = iter([(rows[0][i : i + 8], (i, 0)) for i in range(0, 32, 8)])
        (out / "config.json").write_text("{}")
        train.run_steps(net, optimizer, batches, {"step": 0, "num_tokens": 0}, 3, 32,
                        replace(settings, seed=seed), out)
        log = (out / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log])
    assert losses[0] == losses[2] and losses[0][1:] != losses[1][1:]
