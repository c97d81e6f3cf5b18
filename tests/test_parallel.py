"""One run in several processes is the run in one; and when one of them fails, the others say so.

The processes are forked by tests/processes.py, where what they work out and how they fail stands.
A world is their number; the fixtures below start worlds of 1, 2 and 4 at once, over gloo.
"""
import json
import os
import random
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import processes
import pytest
import test_train
import torch
from safetensors.torch import load_file

import parallel
import stops
import train

LATE = 5  # seconds that the end may come after the timeout
TOLD = r"another process died or did not answer for 5 s at step 3; start again with --resume true"
ENDS = {  # exit code and sentence of each rank
    "kill": ((2, rf"^train.py: {TOLD} \(.*(reset|closed) by peer.*\)$"), (-9, "")),
    "stop": ((2, rf"^train.py: {TOLD} \(.*Timed out.*\)$"), (2, rf"^rank 1: train.py: {TOLD}")),
    "fail": ((2, rf"^train.py: {TOLD}"), (2, "^rank 1: train.py: no room$")),
    "alone": ((2, "^train.py: 2 processes did not meet within 5 s: start all of them, on a port"),),
    "port": ((2, r"^train.py: 2 processes did not meet within 5 s: .* EADDRINUSE"),)}


ONLINE = "--reward tiny:ranked --group 3 --response_tokens 5"  # a reward of the process's own
RUNS = {"run": "dpo pairs", "run-grpo": f"grpo demonstrations --updates 2 {ONLINE}",
        "run-ppo": f"ppo demonstrations {ONLINE}", "run-reward_model": "reward_model pairs"}


def launch(folder, *jobs):
    """Every process of (job, world), each by its own name: what it found, its end, its stderr."""
    command = [sys.executable, "-B", Path(__file__).with_name("processes.py"), folder]
    root = Path(__file__).resolve().parent.parent
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    subprocess.run([*command, *(str(x) for job in jobs for x in job)], check=True, env=env)
    return json.loads((folder / "ends.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """{world: [what each rank found]}."""
    folder, worlds = tmp_path_factory.mktemp("numbers"), (1, 2, 4)
    ends = launch(folder, *(("numbers", world) for world in worlds))
    told = "".join(path.read_text("utf-8") for path in folder.glob("*.err"))
    assert {code for code, _ in ends.values()} == {0}, told
    return {world: [json.loads((folder / f"numbers-{world}-{rank}.json").read_text("utf-8"))
                    for rank in range(world)] for world in worlds}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """(the folder of what was printed, {job-world-rank: (exit code, when)})."""
    folder = tmp_path_factory.mktemp("faults")
    return folder, launch(folder, *((job, 2) for job in ENDS))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base, files):
    """A folder that holds run1 and run2, the same command in one process and in two, and so on for
    every job of RUNS."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--model", base, "--template", "plain", "--lr", ".01", "--max_length", "128",
             "--held_out", "4", "--sample_tokens", "2", "--lora_r", "2", "--steps", "4",
             "--save_every", "2", "--batch_size", "5", "--micro_batch_tokens", "64"]
    for job, more in RUNS.items():
        loss, file, *rest = more.split()
        argv = [*flags, "--data", files / f"{file}.jsonl", "--loss", loss, *rest]
        (folder / f"{job}.json").write_text(json.dumps(list(map(str, argv))), "utf-8")
    ends = launch(folder, *((job, world) for job in RUNS for world in (1, 2)))
    told = "".join(path.read_text("utf-8") for path in folder.glob("*.err"))
    assert {code for code, _ in ends.values()} == {0}, told
    return folder


def difference(a, b):
    """The largest, over all metrics of all steps and all adapters."""
    pairs = [*zip(a["weights"], b["weights"], strict=True), *(
        (x[key], y[key]) for x, y in zip(a["metrics"], b["metrics"], strict=True) for key in x)]
    return max(abs(x - y) for x, y in pairs)


def tokens_of(units):
    return sum(len(e.ids) for unit in units for e in unit)


def test_slices_keep_every_unit_once_and_end_where_the_tokens_are_nearly_equal():
    """None empty, none longer than its part by more than the longest unit; 300 random batches.
    Red: parallel.py:share: `cuts[-1] + 1, len` -> `cuts[-1], len`
    Red: parallel.py:share: `- world + i + 1)` -> `+ 1)`
    Red: parallel.py:share: `- ends[-1] * i)` -> `- ends[0] * i)`"""
    draw = random.Random(0)
    for _ in range(300):
        world = draw.randint(1, 6)
        units = [processes.row(i, 3, draw.randint(1, 60)) for i in range(draw.randint(world, 20))]
        cuts = parallel.share(units, world)
        sizes = [tokens_of(units[a:b]) for a, b in pairwise(cuts)]
        assert (cuts[0], cuts[-1], len(sizes)) == (0, len(units), world) and min(sizes) > 0
        longest = max(len(e.ids) for e, in units)
        if longest * world < tokens_of(units) / 2:  # else one unit may be more than a part
            assert max(sizes) <= tokens_of(units) / world + longest


def test_whoever_has_fewer_micro_batches_runs_its_first_again(monkeypatch):
    """All take as many turns; those that count are every unit once; places follow one another.
    Red: parallel.py:turns: `own + own[:1] * (most - len(own)), len(own)` -> `own, len(own)`
    Red: parallel.py:turns: `units[:cuts[rank()]]` -> `units[:cuts[0]]`"""
    monkeypatch.setattr(parallel, "size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        parts.append(parallel.turns(processes.UNEVEN, 10))
    assert [(len(groups), own, before) for groups, own, before in parts] == [(4, 1, 0), (4, 4, 1)]
    assert [u for g, own, _ in parts for group in g[:own] for u in group] == processes.UNEVEN
    assert parts[0][0] == [processes.UNEVEN[:1]] * 4


def test_without_torchrun_nothing_happens():
    """Red: parallel.py:start: `== 1` -> `== 2`
    Red: parallel.py:together: `size() > 1` -> `size() > 0`"""
    x, error = torch.ones(3), RuntimeError("mat1 and mat2 shapes")
    assert parallel.start(test_train.settings(device="meta")) == "meta"
    assert parallel.together(x, 2, 9) is x and stops.told(error, "", 1) is error
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("changes", "world"), [
    ({"batch_size": 3}, 4), ({"reference_cache": "dir"}, 2), ({"device": "mps"}, 2)])
def test_what_several_processes_cannot_do_is_refused(monkeypatch, changes, world):
    """Red: parallel.py:start: `config.batch_size < world` -> `False`
    Red: parallel.py:start: `config.reference_cache or ` -> ``
    Red: parallel.py:start: `config.device not in ("cpu", "cuda")` -> `False`"""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=rf"--batch_size .*{world} processes need {world} or more"):
        parallel.start(test_train.settings(**changes))


@pytest.mark.parametrize("loss", train.LOSSES)
def test_a_step_is_the_same_in_one_two_and_four_processes(numbers, loss):
    """Gradient and every metric, in float64, on every rank; z0 of kto, pairs, reference pass. Four
    processes step by four of the losses only.
    Red: parallel.py:sum_gradients: `size() > 1` -> `size() > 2`
    Red: parallel.py:turns: `units[:cuts[rank()]]` -> `units[:cuts[0]]`
    Red: update.py:train_step: `found[:own]` -> `found`
    Red: update.py:train_step: `float(number < own)` -> `1.0`"""
    for found in (*numbers[2], *(found for found in numbers[4] if loss in found)):
        assert difference(found[loss], numbers[1][0][loss]) < 1e-12


@pytest.mark.parametrize("case", ["checkpointing", "tied", "head", "qwen", "uneven"])
def test_so_it_is_with_checkpointing_a_tied_or_adapted_head_biases_and_uneven_turns(numbers, case):
    """Red: parallel.py:shard: `("packed",)` -> `()`
    Red: update.py:train_step: `float(number < own)` -> `1.0`"""
    for found in (*numbers[2], *numbers[4]):
        assert difference(found[case], numbers[1][0][case]) < 1e-12


@pytest.mark.parametrize("dtype", ["torch.float64", "torch.float32", "torch.bfloat16"])
def test_two_processes_are_one_with_two_micro_batches_bit_for_bit(numbers, dtype):
    """Five steps of AdamW: every metric, every adapter, over a base of each dtype. Two summands
    have but one order; four have more.
    Red: parallel.py:sum_gradients: `g.flatten() for` -> `g.flatten() / 3 * 3 for`"""
    assert len(numbers[1][0][dtype]["metrics"]) == 5
    assert numbers[2][0][dtype] == numbers[2][1][dtype] == numbers[1][0][dtype]


def test_twenty_steps_give_the_same_curve_in_one_two_and_four_processes(numbers):
    """In float32, of rows of unequal length; measured 4e-6 in log-probs, 6e-7 in the adapters.
    Red: parallel.py:sum_gradients: `size() > 1` -> `size() > 2`"""
    one, two, four = (numbers[world][0]["curve"] for world in (1, 2, 4))
    assert len(one["metrics"]) == 20 and one["metrics"][0]["loss"] > 2 * one["metrics"][19]["loss"]
    for other in (two, four):
        losses = [(a["loss"], b["loss"]) for a, b in zip(
            one["metrics"], other["metrics"], strict=True)]
        assert max(abs(a - b) for a, b in losses) < 1e-6 and difference(one, other) < 1e-5


def test_a_process_holds_its_part_of_the_base_and_one_whole_block_at_a_time(numbers):
    """Of N numbers at most N / world plus a row of each of the 39 tensors; whole are, inside a
    block's forward and backward pass, that block and the root (embedding, norm, head).
    Red: parallel.py:shard: `(*net.model.layers, net)` -> `(net,)`
    Red: parallel.py:shard: `(*net.model.layers, net)` -> `net.model.layers`"""
    for world in (2, 4):
        for weights in (found["weights"] for found in numbers[world]):
            root = weights["all"] - 4 * weights["block"]
            assert weights["held"] < weights["all"] / world + 32
            assert weights["whole"] == weights["block"] + root
        assert sum(found["weights"]["held"] for found in numbers[world]) == weights["all"]


def test_a_sharded_model_samples_as_the_whole_and_starts_at_its_reference(numbers):
    """Red: parallel.py: `"extend", ` -> ``"""
    for found in (*numbers[2], *numbers[4]):
        assert all(found[name] == numbers[1][0][name] for name in ("sampled", "start"))
    assert [said.endswith("ok") for said in numbers[4][3]["start"]] == [True, True]


def test_nan_on_one_process_stops_all_in_the_same_step(numbers):
    """Before the update, with the same words; the rank that met it is the last.
    Red: parallel.py:together: `dist.all_reduce(x)` -> `pass`"""
    for found in (*numbers[2], *numbers[4]):
        said, unmoved = found["broken"]
        assert said.startswith("loss is nan, gradient norm nan, first bad tensor model") and unmoved
        assert found["broken"] == numbers[1][0]["broken"]


def test_every_process_names_whose_facts_differ(numbers):
    """Red: parallel.py:agree: `32 * rank(), ` -> `0, `
    Red: parallel.py:agree: `if not torch.equal(a, b)` -> `if torch.equal(a, b)`"""
    assert numbers[1][0]["agree"] is None
    for found in (*numbers[2], *numbers[4]):
        assert found["agree"].startswith("unlike rank 0: data of rank 1; start all")


@pytest.mark.parametrize("fault", ENDS)
def test_a_fault_ends_every_process_with_one_sentence_soon(faults, fault):
    """A process killed, stopped (and woken when the other has ended), failing alone or missing, and
    a port in use: all end within the timeout of 5 s and 5 s more, non-zero, without a traceback.
    Red: stops.py:told: `"gloo" in str(error)` -> `False`
    Red: stops.py:told: `type(error) is RuntimeError and ` -> ``
    Red: parallel.py:start: `except RuntimeError` -> `except KeyError`
    Red: parallel.py:start: `seconds=config.timeout` -> `seconds=4 * config.timeout`
    Red: stops.py:fail: `os._exit if parallel.size() > 1 else sys.exit` -> `print`
    Red: stops.py:fail: `f"rank {place}: train.py: {message}"` -> `f"train.py: {message}"`"""
    folder, ends = faults
    since = json.loads((folder / f"{fault}.json").read_text("utf-8"))  # when it happened
    for rank, (code, sentence) in enumerate(ENDS[fault]):
        found, when = ends[f"{fault}-2-{rank}"]
        said = (folder / f"{fault}-2-{rank}.err").read_text("utf-8")
        assert (found, said.count("\n")) == (code, len(sentence) > 0), said
        assert re.search(sentence, said), said
        woken = 2.5 * (fault == "stop" and rank == 1)  # after rank 0 has ended
        assert when - since < processes.TIMEOUT + LATE + woken


def test_only_the_first_process_prints_and_writes(runs):
    """And what it writes is what one process writes, the adapter to 1e-5.
    Red: parallel.py:start: `open(os.devnull, "w") if rank()` -> `open(os.devnull, "w") if False`
    Red: train.py:run_steps: `if first and (due` -> `if not first and (due`"""
    one, two = (runs / f"run{world}" for world in (1, 2))
    names = [sorted(p.relative_to(run).as_posix() for p in run.rglob("*.*")) for run in (one, two)]
    assert names[0] == names[1] and "checkpoints/step-4/optimizer.safetensors" in names[0]
    assert (runs / "run-2-1.out").read_text("utf-8") == ""
    assert "step     4/4" in (runs / "run-2-0.out").read_text("utf-8")
    metrics = [[json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").split("\n")
                if line] for run in (one, two)]
    assert [m["step"] for m in metrics[1]] == [1, 2, 3, 4]
    for a, b in zip(*metrics, strict=True):
        assert all(b[k] == pytest.approx(a[k], abs=1e-5, rel=1e-5) for k in a
                   if k not in ("tokens_per_s", "mem_mib"))
    a, b = (load_file(run / "adapter/adapter_model.safetensors") for run in (one, two))
    assert all(torch.allclose(a[name], b[name], atol=1e-5, rtol=0) for name in a)


@pytest.mark.parametrize("job", [job for job in RUNS if job != "run"])
def test_rollouts_and_heads_are_the_same_in_two_processes(runs, job):
    """Each process samples all responses, and the first one's rewards count.
    Red: rollouts.py:collect: `if parallel.size() > 1:` -> `if False:`
    Red: parallel.py: `"response_logps", "response_values", "end_states", ` -> `"response_logps", `
    Red: parallel.py:shard: `p.data = p.data.to(device)` -> `p.data = p.data * (1 + rank())`"""
    one, two = (runs / f"{job}{world}" for world in (1, 2))
    metrics = [[json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").split("\n")
                if line] for run in (one, two)]
    assert len(metrics[0]) == 4 and all(a.get("reward_std", 1) > 0.01 for a in metrics[0])
    for a, b in zip(*metrics, strict=True):
        assert all(b[k] == pytest.approx(a[k], abs=1e-5, rel=1e-4) for k in a
                   if k not in ("tokens_per_s", "mem_mib"))
    for name in ("adapter_model", "heads")[: 1 + (job != "run-grpo")]:
        a, b = (load_file(run / f"adapter/{name}.safetensors") for run in (one, two))
        assert all(torch.allclose(a[key], b[key], atol=1e-4, rtol=0) for key in a)


def test_a_run_goes_on_in_another_number_of_processes(runs, tmp_path):
    """From the checkpoint that two wrote, in one, to the end that two reached.
    Red: parallel.py:sum_gradients: `size() > 1` -> `size() > 2`"""
    part = shutil.copytree(runs / "run2", tmp_path / "run2")
    shutil.rmtree(part / "checkpoints/step-4")
    ends = [load_file(part / "adapter/adapter_model.safetensors")]
    flags = json.loads((runs / "run.json").read_text("utf-8"))
    train.main([*flags, "--out", str(part), "--resume", "true"])
    ends.append(load_file(part / "adapter/adapter_model.safetensors"))
    assert all(torch.allclose(ends[0][name], t, atol=1e-5, rtol=0) for name, t in ends[1].items())
