"""The benchmark measures what it says: its work, its floor, its pairing, and our own driver."""
import json
import random
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from tokenizers import Tokenizer

import model
from bench import clock, floor, ours, run, work

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 10,
         "num_key_value_heads": 1, "intermediate_size": 16}  # head size 4, so K is 4 and Q is 8
ROW = floor.Row(0, 5, 2)
KEYS = {"driver", "task", "model", "dtype", "checkpointing", "steps", "warmup", "batch", "threads",
        "tokens", "response_tokens", "cpu_seconds", "wall_seconds", "tokens_per_cpu_second",
        "tokens_per_second", "losses", "import_seconds", "setup_seconds", "peak_mib",
        "gflops_per_cpu_second", "rows"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny checkpoint with twelve rows a file."""
    return work.make("tiny", tmp_path_factory.mktemp("bench"), rows=12)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return Tokenizer.from_file(str(tiny / "tokenizer.json"))


def test_the_rows_are_the_same_every_time(tiny, tokenizer):
    """Red: bench/work.py:make_rows: `random.Random(seed), vocabulary()` -> `random.Random(), []`
    Red: bench/work.py:speaker: `draw.choices` -> `random.choices`"""
    again = work.make_rows(tokenizer, 12)
    for name in work.FILES.values():
        lines = (tiny / f"{name}.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line) for line in lines] == again[name]


def test_weights_are_seeded_and_stored_as_bfloat16(tiny):
    """Red: bench/work.py:weights: `weight.shape, generator=generator` -> `weight.shape`
    Red: bench/work.py:weights: `noise.to(torch.bfloat16)` -> `noise`"""
    stored = model.load(tiny, torch.bfloat16).state_dict()
    for name, weight in work.weights(work.SHAPES["tiny"], 0).state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, stored[name])


def test_lengths_lie_in_their_range_and_halve_at_the_median():
    """Red: bench/work.py:length: `least <= tokens <= most` -> `tokens <= most`
    Red: bench/work.py:length: `math.log(median)` -> `math.log(median + 30)`"""
    draw = random.Random(0)
    for least, middle, most in (work.PROMPT, work.RESPONSE):
        drawn = [work.length(draw, least, middle, most) for _ in range(4000)]
        assert least <= min(drawn) and max(drawn) <= most
        assert abs(median(drawn) / middle - 1) < 0.1


def test_texts_are_exactly_as_long_as_was_drawn(tokenizer):
    """Red: bench/work.py:text: `if cost[word] <= left` -> `if cost[word] <= left + 1`
    Red: bench/work.py:text: `tokens - len(lead) - 1` -> `tokens - len(lead)`"""
    said = work.vocabulary()
    words = work.speaker(random.Random(0))
    cost = {w: len(tokenizer.encode(" " + w).ids) for w in said}
    for lead in ("Q:", ""):
        for tokens in range(20, 60):
            assert len(tokenizer.encode(work.text(words, cost, lead, tokens)).ids) == tokens


def test_a_response_counts_its_end_token(tiny):
    """Red: bench/work.py:make_rows: `*RESPONSE) - 1` -> `*RESPONSE) + 600`"""
    for task, file in work.FILES.items():
        options = clock.parser("", tuple(ours.LOSS)).parse_args(
            ["--model", str(tiny), "--task", task, "--batch", "2"])
        options.micro_batch_tokens = 0
        for row in (e for unit in ours.read_units(ours.settings(options), 6) for e in unit):
            assert work.PROMPT[0] <= row.prompt_len <= work.PROMPT[2], file
            assert work.RESPONSE[0] <= len(row.ids) - row.prompt_len <= work.RESPONSE[2], file
            assert row.ids[-1] == work.CONTROL.index("</s>")


def test_the_floor_of_sft_is_what_a_hand_counts():
    """One row of 5 tokens, 2 scored, two layers: keys and values have 2*8*4 = 64 weights a layer,
    the rest 2*8*8 + 3*8*16 = 512. Run: 5 + 5 positions for the former, 5 + 2 for the latter.
    Forward 2*(10*64 + 7*512) = 8448; LoRA of rank 1: 24 and 2*16 + 3*24 = 104 weights a layer,
    2*(10*24 + 7*104) = 1936; query-key pairs 1+2+3+4+5 = 15 and 4+5 = 9, times 4*8: 768. Backward
    8448 less 2*5*8*(8 + 2*4) = 1280 at the embeddings, 2*1936 and 2*768. Head 2*8*10*2, twice.
    Red: bench/floor.py:forward: `((layers - 1) * run + row.scored)` -> `(layers * run)`
    Red: bench/floor.py:forward: `2 * run * width * (q + 2 * k)` -> `2 * run * width * (q + k)`
    Red: bench/floor.py:forward: `sum(i + o for` -> `sum(i * o for`
    Red: bench/floor.py:pairs: `last * (last + 1)` -> `last * last`
    Red: bench/floor.py:count: `+ 2 * f["adapters"]` -> `+ f["adapters"]`"""
    once = 8448 + 1936 + 768
    backward = 8448 - 1280 + 2 * 1936 + 2 * 768
    assert floor.count([ROW], SHAPE, "sft", False, False, 1) == (once + backward, 640)


def test_reference_checkpointing_and_kto_add_their_passes_to_the_floor():
    """Red: bench/floor.py:count: `(task != "sft" and not cached)` -> `(not cached)`
    Red: bench/floor.py:count: `once - f["adapters"]` -> `once`
    Red: bench/floor.py:count: `(1 + checkpointing + (task == "kto"))` -> `(1 + checkpointing)`
    Red: bench/floor.py:count: `(2 + (task == "kto") + references)` -> `(2 + references)`"""
    def more(task, cached, checkpointing):
        counts = floor.count([ROW], SHAPE, task, cached, checkpointing, 1)
        return tuple(a - b for a, b in zip(counts, least, strict=True))

    least, once, base = floor.count([ROW], SHAPE, "sft", False, False, 1), 11152, 9216
    assert more("sft", False, True) == (once, 0)
    assert more("uft", False, False) == more("dpo", False, False) == (base, 320)
    assert more("dpo", True, True) == (once, 0)
    assert more("kto", False, False) == (once + 2 * base, 3 * 320)
    assert more("kto", True, False) == (once, 320)


def test_a_shared_prompt_is_run_once_and_still_attended_to(tiny):
    """Red: bench/floor.py:rows_of: `if shared and i` -> `if shared`
    Red: bench/floor.py:pairs: `- first * (first + 1)` -> `- first * first`"""
    options = clock.parser("", ("dpo",)).parse_args(["--model", str(tiny), "--task", "dpo"])
    options.micro_batch_tokens = 0
    unit = ours.read_units(ours.settings(options), 1)[0]
    prompt = unit[0].prompt_len
    assert [r.start for r in floor.rows_of([unit], True)] == [0, prompt]
    assert [r.start for r in floor.rows_of([unit], False)] == [0, 0]
    parts = [floor.forward(floor.Row(*row), SHAPE, 1) for row in ((0, 3, 3), (3, 5, 2))]
    whole = floor.forward(floor.Row(0, 5, 5), SHAPE, 1)
    assert {k: sum(p[k] for p in parts) for k in whole} == whole


def line(driver, repeat, speed, loss=0.7, rows=1, dtype="float32"):
    """A made-up line of a dpo run."""
    return {"model": "small", "task": "dpo", "dtype": dtype, "checkpointing": False,
            "driver": driver, "repeat": repeat, "steps": 8, "losses": [loss, 0.1], "rows": rows,
            "tokens_per_cpu_second": speed, "tokens_per_second": 2 * speed,
            "peak_mib": 1000 / speed, "setup_seconds": 10 / speed}


def bare(driver, repeat, speed):
    """A made-up line of a floor."""
    keys = (*run.KEY, "repeat", "steps", "tokens_per_cpu_second")
    return {k: v for k, v in line(driver, repeat, speed).items() if k in keys}


RUNS = [line("ours", 0, 30.0), line("TRL", 0, 10.0), line("ours", 1, 40.0), line("TRL", 1, 8.0),
        line("ours", 2, 50.0), line("TRL", 2, 50.0), line("ours", 3, 90.0), bare("floor", 0, 60.0)]


def test_a_ratio_pairs_the_runs_that_took_turns_and_takes_the_median():
    """3, 5 and 1 give 3; the ratio of the medians would be 4. A run without its pair is left out.
    Red: bench/run.py:compare: `(median, min, max)` -> `(max, min, max)`
    Red: bench/run.py:compare: `a[k] / b[k]` -> `b[k] / a[k]`
    Red: bench/run.py:compare: `*setting, right, i` -> `*setting, right, 2 - i % 3`
    Red: bench/run.py:compare: `if a and b` -> `if a`"""
    row, least = run.compare(RUNS)
    assert (row["left"], row["right"], row["pairs"], row["void"]) == ("ours", "TRL", 3, "")
    assert row["ratios"]["tokens_per_cpu_second"] == [3, 1, 5]
    assert row["ratios"]["peak_mib"] == pytest.approx([1 / 3, 1 / 5, 1])
    assert row["left_medians"]["tokens_per_cpu_second"] == 40
    assert row["right_medians"]["tokens_per_cpu_second"] == 10
    assert (least["right"], least["ratios"]) == ("floor", {"tokens_per_cpu_second": [.5] * 3})


@pytest.mark.parametrize(("changes", "void"), [
    ({"loss": 0.7009}, ""), ({"loss": 0.7011}, "first losses 0.7 and 0.7011"),
    ({"rows": 2}, "the rows differ")])
def test_a_comparison_of_different_work_is_void(changes, void):
    """Red: bench/run.py:why_void: `1e-3` -> `1e-2`
    Red: bench/run.py:why_void: `1e-3` -> `1e-4`
    Red: bench/run.py:why_void: `!= right["rows"]` -> `is None`
    Red: bench/run.py:comparison_row: `"void" if row["void"]` -> `"void" if not row`"""
    rows = run.compare([line("ours", 0, 3.0), line("TRL", 0, 1.0, **changes)])
    assert rows[0]["void"] == void
    text = run.page(record(rows))
    assert ("Void: small, fp32: " + void in text) == ("| void |" in text) == (void != "")
    assert ("3.00 (3.00..3.00)" in text) == (void == "")


def record(rows):
    """What run.py writes, about a made-up machine."""
    runs = [{"dtype": "float32", "gflops_per_cpu_second": [90.0, 80.0]}, {"dtype": "float32"}]
    return {"command": "make bench", "steps": 8, "comparisons": rows, "runs": runs, "machine": {
        "cores": 2, "cpu": "a CPU", "memory_gib": 8, "python": "3.11", "versions": {"torch": "2"}}}


def test_the_page_shows_both_figures_beside_their_ratio_and_the_floor(tmp_path):
    """Red: bench/run.py:comparison_row: `("left", "right"))` -> `("right", "left"))`
    Red: bench/run.py:floor_row: `("left", "right"))` -> `("right", "left"))`
    Red: bench/run.py:yardsticks: `{min(rates):.0f}` -> `{rates[0]:.0f}`
    Red: bench/run.py:write: `page(record)` -> `page(record)[:-2]`"""
    run.write(record(run.shortened(run.compare(RUNS))), tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text("utf-8"))
    text = (tmp_path / "results.md").read_text("utf-8")
    assert run.page(stored) == text
    assert "| small, fp32 | 3.00 (1.00..5.00) | 3.00 | 0.33 | 0.33 | 40 / 10 | 25 / 100 |" in text
    assert "| dpo, small, fp32 | ours | floor | 30 | 60 | 0.50 |" in text
    assert "its steps: float32 80 to 90." in text


def test_the_recorded_page_is_made_from_the_recorded_runs():
    """Holds once results are recorded.
    Seen red by changing one number of bench/results.md by hand."""
    folder = ROOT / "bench"
    if not (folder / "results.json").is_file():
        pytest.skip("nothing is recorded yet")
    stored = json.loads((folder / "results.json").read_text("utf-8"))
    assert stored["comparisons"] == run.shortened(run.compare(stored["runs"]))
    assert (folder / "results.md").read_text("utf-8") == run.page(stored)


def test_a_stopped_run_goes_on_with_what_the_same_sources_measured(tmp_path):
    """Red: bench/run.py:read_lines: `d.pop("source") == stamp` -> `d.pop("source")`
    Red: bench/run.py:read_lines: `and "error" not in d` -> ``
    Red: bench/run.py:read_lines: `d["steps"] == steps` -> `steps`"""
    lines = [RUNS[0] | {"source": 7}, RUNS[1] | {"source": 8},
             RUNS[2] | {"source": 7, "error": "no memory"}, RUNS[4] | {"source": 7, "steps": 3}]
    (tmp_path / "lines").write_text("".join(json.dumps(d) + "\n" for d in lines), "utf-8")
    assert run.read_lines(tmp_path / "lines", 7, 8) == RUNS[:1]


def test_drivers_take_turns_and_every_comparison_has_both_of_its_sides():
    """Red: bench/run.py:drivers: `(c.left, c.right)` -> `(c.right,)`
    Red: bench/run.py:jobs: `for repeat in range(options.repeat)` -> `for repeat in range(1)`"""
    options = type("Options", (), {
        "repeat": 2, "models": run.MODELS, "tasks": run.TASKS, "dtype": run.DTYPES,
        "checkpointing": ("off", "on"), "steps": 8})
    todo = list(run.jobs(options))
    assert [j["driver"] for j in todo[:4]] == [
        "ours", "loop, full head", "loop, response head", "floor"]
    runs = [line(j["driver"], j["repeat"], 1.0) | j for j in todo]
    assert len({json.dumps(j) for j in todo}) == len(todo)
    rows = run.compare(runs)
    assert {r["pairs"] for r in rows} == {2}
    assert len(rows) == 4 * (len(run.COMPARISONS) + 5)  # of them on the wide vocabulary


def first_loss(folder, rows):
    """Mean of -log softmax(logits) over the response tokens of rows, all logits, one row a time."""
    tokenizer, net = Tokenizer.from_file(str(folder / "tokenizer.json")), model.load(
        folder, torch.float32)
    found = []
    for row in rows:
        prompt = tokenizer.encode(row["prompt"]).ids
        ids = torch.tensor([prompt + tokenizer.encode(row["completion"]).ids + [2]])
        logps = net.logits(net(ids))[0, :-1].log_softmax(-1)
        found.append(logps.gather(-1, ids[0, 1:, None])[len(prompt) - 1:, 0])
    return -torch.cat(found).mean().item()


def test_our_driver_prints_its_line_and_begins_with_the_loss_of_the_rows_in_order(tiny):
    """Red: bench/ours.py:main: `units[start:start + options.batch]` -> `units[-options.batch:]`
    Red: bench/ours.py:settings: `template="plain"` -> `template="alpaca"`
    Red: bench/clock.py:Clock.line: `self.batches[first:]` -> `self.batches`
    Red: bench/clock.py:Clock.line: `len(self.losses), "warmup"` -> `first, "warmup"`"""
    command = [sys.executable, "-m", "bench.ours", "--model", str(tiny), "--task", "sft",
               "--steps", "2", "--warmup", "1", "--batch", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in
            (tiny / "demonstrations.jsonl").read_text("utf-8").splitlines()[:4]]
    assert said.keys() == KEYS
    assert said["losses"][0] == pytest.approx(first_loss(tiny, rows[:2]), abs=1e-4)
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    counts = [[len(tokenizer.encode(r[k]).ids) for k in ("prompt", "completion")] for r in rows]
    assert said["tokens"] == sum(map(sum, counts[2:])) + 2
    assert said["response_tokens"] == counts[2][1] + counts[3][1] + 2
    assert (said["steps"], said["warmup"], len(said["losses"])) == (2, 1, 2)
    assert 0 < said["import_seconds"] < said["setup_seconds"]
    assert said["tokens_per_cpu_second"] == pytest.approx(said["tokens"] / said["cpu_seconds"])
