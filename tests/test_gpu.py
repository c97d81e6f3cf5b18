"""The GPU bench in miniature, on the CPU: its weights, its work, its count and what it prints."""
import json

import pytest
import torch

import lora
from bench import floor, gpu, gpu_step

MINI = ["--device", "cpu", "--rows", "3", "--length", "32", "--steps", "2", "--warmup", "1"]
KEYS = {"driver", "task", "model", "dtype", "device", "checkpointing", "batch", "length", "steps",
        "warmup", "rows", "seconds_per_step", "tokens_per_second", "tflops", "tflops_once",
        "peak_gib", "losses", "first_logps", "peak_tflops", "mfu", "mfu_once"}
UNIT = [gpu_step.Encoded([1, 2, 3, 4, 5], 3, 0.5, "scored", "", ())]
LINE = {"driver": "ours", "model": "tiny", "device": "NVIDIA H200", "tokens_per_second": 1234.5,
        "seconds_per_step": 0.5, "tflops": 494.5, "tflops_once": 247.25, "peak_gib": 70.25,
        "losses": [0.25, 0.2], "first_logps": -50.0, "rows": 7}


def options(*flags):
    """Those of a driver, on the tiny shape."""
    parser = gpu_step.parser("")
    parser.set_defaults(shape="tiny")
    return parser.parse_args([*MINI, *flags])


def record(*lines):
    """What gpu.py writes, of made-up lines."""
    return {"versions": {"torch": "2"}, "lines": [LINE | line for line in lines],
            "options": {"rows": 3, "length": 32, "dtype": "bfloat16"}}


@pytest.mark.parametrize(("name", "count"), [
    ("tiny", 107072), ("mistral-7b", 7241732096), ("qwen2.5-32b", 32763876352)])
def test_a_model_has_the_parameters_of_its_shape(name, count):
    """What the checkpoints of the two large shapes hold; the tiny one by hand: 2*256*64 + 64, and
    a layer 2*64*64 + 2*64*32 + 64 + 2*32 (biases) + 3*64*128 + 2*64 = 37120. No memory is taken.
    Red: bench/gpu_step.py:blank: `shape(name)` -> `shape(name) | {"tie_word_embeddings": True}`
    Red: bench/gpu_step.py: `(5120, 64, 40, 8, 128, 27648` -> `(5120, 64, 40, 4, 128, 27648`
    Red: bench/gpu_step.py: `(4096, 32, 32, 8, 128, 14336` -> `(4096, 32, 32, 8, 128, 14335`
    Red: bench/gpu_step.py:blank: `net.to(dtype)` -> `net`"""
    net = gpu_step.blank(name, torch.bfloat16, "meta")
    assert sum(p.numel() for p in net.parameters()) == count
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


def test_weights_depend_on_their_name_alone_as_the_checkpoint_spells_it():
    """PEFT's names for the same tensors get the same numbers; B is zero, so policy is reference.
    Red: bench/gpu_step.py:draw: `zlib.crc32(name.encode())` -> `len(name)`
    Red: bench/gpu_step.py:draw: `.replace(".base_layer.", ".")` -> ``
    Red: bench/gpu_step.py:draw: `.replace(".default.weight", "")` -> ``
    Red: bench/gpu_step.py:draw: `weight.zero_()` -> `weight.fill_(1)`
    Red: bench/gpu_step.py:draw: `weight.shape[1]**-0.5` -> `1`
    Red: bench/gpu_step.py:draw: `normal_(1, 0.1` -> `normal_(0, 0.1`"""
    net = gpu_step.blank("tiny", torch.bfloat16, "cpu")
    lora.inject(net, 4, 8.0)
    gpu_step.draw(net.named_parameters())
    first, second = net.model.layers
    q = first.self_attn.q_proj
    assert q.weight.float().std() == pytest.approx(1 / 8, rel=0.1)
    assert first.input_layernorm.weight.float().mean() == pytest.approx(1, abs=0.1)
    assert not torch.equal(q.weight, second.self_attn.q_proj.weight)
    assert not q.lora_B.any() and q.lora_A.any()
    start = "base_model.model.model.layers.0.self_attn.q_proj."
    for end, want in (("base_layer.weight", q.weight), ("lora_A.default.weight", q.lora_A)):
        twin = torch.empty_like(want)
        gpu_step.draw([(start + end, twin)])
        assert torch.equal(twin, want)


def test_rows_are_half_prompt_half_response_and_the_same_every_time():
    """Red: bench/gpu_step.py:work: `random.Random(0)` -> `random.Random()`
    Red: bench/gpu_step.py:work: `options.length // 2` -> `options.length`
    Red: bench/gpu_step.py:work: `options.warmup + options.steps` -> `options.steps`"""
    steps = gpu_step.work(options("--length", "64"))
    assert steps == gpu_step.work(options("--length", "64"))
    rows = [unit[0] for units in steps for unit in units]
    assert len(rows) == 9 and len({len(e.ids) for e in rows}) > 1
    for e in rows:
        assert 24 <= e.prompt_len <= 32 and 24 <= len(e.ids) - e.prompt_len <= 32
        assert max(e.ids) < 256


def test_the_flops_of_a_step_are_what_a_hand_counts():
    """Five tokens, two scored, rank 16. Keys and values have 4096 weights a layer, the rest 32768:
    2*(10*4096 + 7*32768) = 540672. Adapters 2*(10*3072 + 7*13312) = 247808. Attention 4*64*(15+9) =
    6144. Backward 540672 - 2*5*64*128, twice the adapters and the attention. Reference without
    adapters. Head 2*64*256*2, three times.
    Red: bench/gpu_step.py:flops: `"uft"` -> `"sft"`
    Red: bench/gpu_step.py:flops: `"uft", False` -> `"uft", True`
    Red: bench/gpu_step.py:flops: `sum(` -> `max(`"""
    once = 540672 + 247808 + 6144
    backward = 540672 - 81920 + 2 * 247808 + 2 * 6144
    reference, head = 540672 + 6144, 3 * 65536
    assert gpu_step.flops([UNIT], "tiny", False) == once + backward + reference + head
    assert gpu_step.flops([UNIT], "tiny", True) == 2 * once + backward + reference + head


def test_a_token_of_a_large_model_costs_four_passes_over_its_layers():
    """8 FLOPs a weight of the layers, and a tenth more at most for adapters and attention.
    Red: bench/gpu_step.py: `"vocab_size")` -> `"vocab")`
    Red: bench/floor.py:count: `backward + references * base` -> `references * base`"""
    for name in ("mistral-7b", "qwen2.5-32b"):
        shape = gpu_step.shape(name)
        body, head = floor.count([floor.Row(0, 2048, 1024)], shape, "uft", False, True)
        net = gpu_step.blank(name, torch.bfloat16, "meta")
        layers = sum(p.numel() for p in net.model.layers.parameters())
        assert 1 < body / 2048 / layers / 8 < 1.1
        assert head == 3 * 1024 * 2 * net.lm_head.weight.numel()


def test_it_measures_writes_its_file_and_prints_its_table(tmp_path, capsys):
    """Red: bench/gpu_step.py:line: `[options.warmup:]` -> `[:0]`
    Red: bench/gpu_step.py:build: `loss="uft"` -> `loss="uft_bce"`
    Red: bench/gpu.py:with_mfu: `line[rate] / peak` -> `line[rate]`
    Red: bench/gpu.py:main: `json.dumps(record, indent=1)` -> `json.dumps(lines)`
    Red: bench/gpu.py:measure: `[f"--{name}={getattr(options, name)}" for name in PASSED]` -> `[]`
    Red: bench/gpu.py:drivers: `or peers and found` -> `or found or True`"""
    out = tmp_path / "new" / "gpu.json"
    gpu.main([*MINI, "--shape", "tiny", "--no_peers", "--peak_tflops", "0.5", "--out", str(out)])
    said, stored = capsys.readouterr().out, json.loads(out.read_text("utf-8"))
    line, = stored["lines"]
    assert line.keys() == KEYS and said == gpu.page(stored)
    assert (line["driver"], line["model"], line["device"]) == ("ours", "tiny", "cpu")
    assert (len(line["losses"]), line["steps"], line["warmup"]) == (3, 2, 1)
    rows = [unit[0].reward for unit in gpu_step.work(options())[0]]
    assert line["losses"][0] == pytest.approx(sum((0.5 - r)**2 for r in rows) / 3, abs=1e-5)
    assert line["mfu"] == pytest.approx(line["tflops"] / 0.5, rel=1e-4)
    assert line["tokens_per_second"] > 0 < line["tflops_once"] < line["tflops"]


@pytest.mark.parametrize(("steps", "where"), [(0, "before the first step was done"),
                                              (1, "at step 2")])
def test_a_driver_that_runs_out_of_memory_says_so_in_one_line(steps, where):
    """Red: bench/gpu_step.py:line: `except torch.OutOfMemoryError` -> `except KeyError`
    Red: bench/gpu_step.py:line: `len(done) + 1` -> `len(done)`
    Red: bench/gpu.py:cells: `if "error" in line` -> `if not line`
    Red: bench/gpu.py:with_mfu: `if "error" in line` -> `if not line`"""
    def build(given):
        done = []

        def step(units):
            if len(done) == steps:
                raise torch.OutOfMemoryError(f"CUDA out of memory.\n{len(units)} {given.shape}")
            done.append(units)
            return 0.0, 0.0

        return step

    line = gpu.with_mfu(gpu_step.line(options(), "ours", build), 1.0)
    assert line["error"].startswith(f"out of memory {where}, at ") and "\n" not in line["error"]
    assert f"| tiny | ours | {line['error']} | - |" in gpu.page(record(line))


def test_a_driver_that_fails_otherwise_leaves_its_last_line(tmp_path):
    """Red: bench/gpu.py:measure: `.splitlines() or` -> `.splitlines()[:1] or`
    Red: bench/gpu.py:measure: `if done.returncode` -> `if not done`"""
    given = gpu.parse([*MINI, "--out", str(tmp_path / "no.json")])
    assert gpu.measure("ours", "round", given)["error"].startswith("gpu_step.py: error: argument "
                                                                   "--shape: invalid choice")


def test_without_a_gpu_one_sentence_is_said(monkeypatch, capsys):
    """Red: bench/gpu.py:parse: `parser.exit(2` -> `parser.exit(1`
    Red: bench/gpu.py:parse: `options.device == "cuda" and` -> ``"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.parse([])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "--device cpu" in said
    assert gpu.parse(["--device", "cpu"]).shape == ["mistral-7b", "qwen2.5-32b"]


def test_a_wrong_number_is_refused_with_what_was_expected(capsys):
    """Red: bench/gpu_step.py:at_least: `int(text) < least` -> `int(text) < 0`"""
    with pytest.raises(SystemExit):
        options("--steps", "0")
    assert "--steps: expected a whole number from 1, found 0" in capsys.readouterr().err


def test_shares_are_of_the_peak_rate_of_the_device_by_its_name():
    """Red: bench/gpu.py:cells: `("mfu", "mfu_once")` -> `("mfu_once", "mfu")`
    Red: bench/gpu.py:with_mfu: `peak or peak_tflops(line["device"])` -> `peak`
    Red: bench/gpu.py: `"H200 NVL": 835, "H200": 989` -> `"H200": 989, "H200 NVL": 835`"""
    names = ("NVIDIA H200", "NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe",
             "NVIDIA A100-SXM4-80GB", "NVIDIA L40S", "cpu")
    assert [gpu.peak_tflops(n) for n in names] == [989, 835, 989, 756, 312, 362, None]
    line = gpu.with_mfu(LINE, None)
    assert "| tiny | ours | 1234 | 0.5 | 50.0% | 25.0% | 70.2 | 0.250000 | -50.00 |" in gpu.page(
        record(line))
    assert "| 0.5 | - | - | 70.2 |" in gpu.page(record(gpu.with_mfu(LINE | {"device": "x"}, None)))
    assert gpu.with_mfu(LINE, 1978)["mfu"] == 0.25


@pytest.mark.parametrize(("changes", "void"), [
    ({}, ""), ({"rows": 8}, "the rows differ"), ({"losses": [0.26]}, "first losses 0.25 and 0.26"),
    ({"first_logps": -50.09}, ""), ({"first_logps": -50.11}, "first log-probs -50 and -50.11")])
def test_a_row_of_other_work_is_named_void(changes, void):
    """Red: bench/gpu.py:page: `if why := why_void(ours, line)` -> `if why := ""`
    Red: bench/gpu.py:why_void: `run.why_void(left, right)` -> `""`
    Red: bench/gpu.py:why_void: `2e-3` -> `1e-3`
    Red: bench/gpu.py:why_void: `2e-3` -> `3e-3`"""
    ours = gpu.with_mfu(LINE, None)
    text = gpu.page(record(ours, ours | {"driver": "loop"} | changes))
    assert ("Void: tiny, loop: " + void + ".\n" in text) == ("Void" in text) == (void != "")
