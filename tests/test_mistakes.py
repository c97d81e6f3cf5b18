"""The commonest mistakes of users, made on the real command lines.

Each ends with exit code 2 and one line on stderr (after usage lines, where argparse speaks): what
was found, where, and what to do. A case is (program, files changed, flags, words of the message);
None removes a file, a dict goes into its JSON, DIR in a flag is the folder of this test.
"""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import tiny
import torch

import config
import evaluate
import generate
import lora
import page
import train

ROOT = Path(__file__).resolve().parent.parent
MAIN = {"train": train.main, "generate": generate.main, "evaluate": evaluate.main,
        "lora": lora.main, "page": page.main}
FLAGS = {
    "train": "--model DIR/model --template plain --max_length 100 --held_out 4 --steps 2 "
             "--sample_tokens 0 --out DIR/run",
    "generate": "--model DIR/model --prompt hi --template plain --max_new_tokens 2",
    "evaluate": "--model DIR/model --template plain",
    "lora": "merge --model DIR/model --adapter DIR/other --out DIR/merged",
    "page": ""}
CONFIG, WEIGHTS, DATA = "model/config.json", "model/model.safetensors", "data.jsonl"
GOOD = '{"prompt": "a", "response": "b"}\n'
CASES = {
    # the fifteen of the ecosystem survey
    "no config.json": ("train", {CONFIG: None}, "",
                       "model folder; config.json is missing; Hugging Face; tokenizer.json"),
    "unknown architecture": ("train", {CONFIG: {"model_type": "gpt2"}}, "",
                             "config.json; model_type 'gpt2'; llama, mistral, qwen2, qwen3"),
    "only pickles": ("generate", {WEIGHTS: None, "model/pytorch_model.bin": "x"}, "",
                     "model.safetensors; pickles; save_pretrained"),
    "git lfs pointer": ("evaluate", {WEIGHTS: "version https://git-lfs.github.com/spec/v1\n"}, "",
                        "model.safetensors; git lfs pull"),
    "missing tensors": ("train", {CONFIG: {"num_hidden_layers": 3}}, "",
                        "9 tensors are missing; model.layers.2.input_layernorm.weight"),
    "no place for a tensor": ("evaluate", {CONFIG: {"tie_word_embeddings": True}}, "",
                              "lm_head.weight; tie_word_embeddings is True"),
    "no tokenizer.json": ("generate", {"model/tokenizer.json": None, "model/tokenizer.model": ""},
                          "", "no tokenizer.json; tokenizer.model; save_pretrained"),
    "unknown columns": ("train", {DATA: '{"x": 1}\n'}, "",
                        "data.jsonl:1; ['x']; prompt+response+score; chosen+rejected"),
    "broken line": ("train", {DATA: GOOD + '{"prompt": "a", "resp\n'}, "",
                    'data.jsonl:2; not valid JSON; {"prompt": "a", "resp'),
    "everything too long": ("train", {}, "--max_length 5",
                            "nothing is left; more than 5; --max_length; --truncate_prompt"),
    "no chat template": ("evaluate", {}, "--template checkpoint",
                         "no chat template; --template; mistral-inst | chatml | alpaca | plain"),
    "score out of range": ("train", {DATA: '{"prompt": "a", "response": "b", "score": 7}\n'}, "",
                           "data.jsonl:1; score is 7; outside [0, 1]; --score_range"),
    "numbers explode": ("train", {}, "--lr 1e30",
                        "step 2; nan; lora_A; data.jsonl:; --lr 1e+30; run/bad_batch.jsonl"),
    "adapter of another model": ("generate", {}, "--adapter DIR/other",
                                 "model.layers.0.mlp.down_proj; (16, 40); (16, 24); my/base"),
    "merging another's adapter": ("lora", {}, "",
                                  "other; down_proj.weight; (16, 40); DIR/model"),
    # and others
    "unknown loss": ("train", {}, "--loss rlhf", "--loss; 'rlhf'; una_pair"),
    "beta is no number": ("train", {}, "--beta big", "--beta; 'big'"),
    "beta is zero": ("train", {}, "--beta 0", "--beta; 0.0; above 0"),
    "score range turned": ("train", {}, "--score_range 5,1", "--score_range; 5.0, 1.0; LOW,HIGH"),
    "mistyped boolean": ("train", {}, "--resume yes", "--resume; 'yes'; true or false"),
    "beyond the context": ("train", {}, "--max_length 4096", "--max_length; 4096; 128"),
    "unknown template": ("train", {}, "--template llama", "--template; 'llama'; chatml"),
    "unknown template here": ("generate", {}, "--template llama", "--template llama; chatml"),
    "mistyped flag": ("train", {}, "--leraning_rate 1", "--leraning_rate"),
    "half a flag": ("train", {}, "--los sft", "unrecognized; --los sft; --los may be --loss"),
    "half a flag here": ("generate", {}, "--temp 1", "unrecognized; --temp 1; --temperature"),
    "half a flag there": ("evaluate", {}, "--bet 1", "unrecognized; --bet 1; --beta"),
    "an escape code as a flag": ("train", {}, "--x\x1b[2J", "--x\\x1b[2J"),
    "a beta without end": ("evaluate", {}, "--beta inf", "--beta; inf; above 0"),
    "a limit below one": ("evaluate", {}, "--limit -1", "--limit; -1; 1 or more"),
    "a temperature without end": ("generate", {}, "--temperature inf", "--temperature; inf"),
    "a batch without end": ("train", {}, "--batch_size 99999999999", "--batch_size; 1 to 65536"),
    "epochs without end": ("train", {}, "--epochs 1e308", "--epochs; 1e+308; up to 10^9"),
    "a learning rate of zero": ("train", {}, "--lr 0", "--lr; 0.0; above 0"),
    "a range without end": ("train", {}, "--score_range 0,inf", "--score_range; inf; LOW,HIGH"),
    "a range of words": ("evaluate", {}, "--score_range a,b", "--score_range; 'a,b'; LOW,HIGH"),
    "half a number": ("train", {}, "--steps 1.5", "--steps; '1.5'; whole number"),
    "a device of no weights": ("train", {}, "--device meta", "--device meta; cpu, cuda or mps"),
    "no such file": ("train", {DATA: None}, "", "No such file; DIR/data.jsonl"),
    "no such model": ("train", {}, "--model DIR/none", "DIR/none; config.json; no such folder"),
    "no such id": ("generate", {}, "--model no/such-model", "no/such-model; fetching it failed"),
    "no such adapter": ("evaluate", {}, "--adapter DIR/none", "DIR/none; adapter_config.json"),
    "no cuda": ("train", {}, "--device cuda:99", "--device cuda:99; cannot be used here"),
    "no cuda here": ("generate", {}, "--device cuda:99", "--device cuda:99; cannot be used here"),
    "no cuda there": ("evaluate", {}, "--device cuda:99", "--device cuda:99; cannot be used here"),
    "data of another kind": ("train", {}, "--loss dpo",
                             "nothing is left; --loss dpo; not one of a pair; 0 pairs"),
    "weight of no row": ("train", {}, "--data DIR/data.jsonl:0.01",
                         "nothing is left; 36 rows; FILE:WEIGHT"),
    "a target that is no layer": ("train", {}, "--lora_targets q_proj,qproj", "'qproj'; up_proj"),
    "out is a file": ("train", {"run": "x"}, "", "DIR/run is not a folder that can be written"),
    "nothing to resume": ("train", {}, "--resume true", "cannot resume; DIR/run; no run"),
    "empty file": ("evaluate", {DATA: ""}, "", "data.jsonl; no usable row"),
    "nothing fits": ("evaluate", {}, "--max_length 4", "data.jsonl; up to 4 tokens"),
    "no such column": ("evaluate", {"q.csv": "a,b\n1,2\n"}, "--data DIR/q.csv",
                       "q.csv:2; no column; prompt and pattern; TruthfulQA.csv"),
    "no such test": ("train", {}, "--test DIR/none.jsonl", "No such file; DIR/none.jsonl"),
    "a broken pattern": ("train", {"q.jsonl": '{"prompt": "a", "pattern": "("}\n'},
                         "--test DIR/q.jsonl", "q.jsonl:1; no regular expression"),
    "a test without room": ("train", {"q.jsonl": '{"prompt": "a", "pattern": "a"}\n'},
                            "--test DIR/q.jsonl", "--test; --sample_tokens 0; --sample_tokens 48"),
    "feedback as a test": ("train", {}, "--test DIR/data.jsonl",
                           "data.jsonl:1; no column 'mc1_targets'; prompt and pattern"),
    "a page of no run": ("page", {}, "DIR/model/none", "DIR/model/none; no config.json"),
    "a temperature below zero": ("generate", {}, "--temperature -1", "--temperature >= 0"),
    "an empty prompt": ("generate", {"model/tokenizer_config.json": {"add_bos_token": False}},
                        "--prompt=", "no tokens; BOS"),
    "merged folder is there": ("lora", {"merged/x": "x"}, "", "DIR/merged; not empty; --out"),
}
VALUES = {bool: True, int: 7, float: 0.25, str: "x", tuple[str, ...]: ("q_proj", "v_proj"),
          tuple[float, float]: (1.0, 5.0)}  # by type; none is a default


@pytest.fixture
def place(base, files, tmp_path):
    """A folder with model/, data.jsonl (demonstrations) and other/, another model's adapter."""
    shutil.copytree(base, tmp_path / "model")
    shutil.copy(files / "demonstrations.jsonl", tmp_path / DATA)
    net = tiny.transformer(intermediate_size=40)
    lora.inject(net, 2, 4.0)
    lora.save(net, tmp_path / "other", "my/base")
    return tmp_path


def command(place, program, flags=""):
    """The words of a command line: the usual flags, these, and data.jsonl if they name no data."""
    if program in ("train", "evaluate") and "--data" not in flags:
        flags += " --data DIR/data.jsonl"
    return [w.replace("DIR", str(place)) for w in f"{FLAGS[program]} {flags}".split()]


def prepare(place, case):
    """Makes the mistake; returns the program, its command line and the words to expect."""
    program, changes, flags, words = CASES[case]
    for name, content in changes.items():
        path = place / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, dict):
            content = json.dumps(json.loads(path.read_text("utf-8")) | content)
        path.unlink() if content is None else path.write_text(content, "utf-8")
    return program, command(place, program, flags), words.replace("DIR", str(place)).split("; ")


def check(stderr, words, usage):
    """One line, not counting usage, and every word in it."""
    *before, line = stderr.rstrip("\n").split("\n")
    assert "Traceback" not in stderr
    assert all(usage and (b.startswith(("usage:", " "))) for b in before), stderr
    assert [w for w in words if w not in line] == [], line


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_ends_with_one_sentence_and_exit_code_2(case, place, capsys):
    """Red: train.py:main: `(ValueError, OSError, RuntimeError, MemoryError)` -> `ZeroDivisionError`
    Red: stops.py:fail: `sys.exit)(code)` -> `sys.exit)(1)`
    Red: evaluate.py:main: `(ValueError, OSError)` -> `ZeroDivisionError`
    Red: page.py:main: `(ValueError, OSError)` -> `ZeroDivisionError`
    Red: generate.py:main: `(ValueError, OSError)` -> `ZeroDivisionError`
    Red: lora.py:main: `(ValueError, OSError)` -> `ZeroDivisionError`
    Red: config.py:check_device: `(RuntimeError, AssertionError, ImportError)` -> `KeyError`
    Red: config.py:parse_flags: `allow_abbrev=False` -> `allow_abbrev=True`
    Red: generate.py:main: `allow_abbrev=False` -> `allow_abbrev=True`
    Red: evaluate.py:main: `allow_abbrev=False` -> `allow_abbrev=True`
    Red: command.py:Parser.error: `if near else ""` -> `if 0 else ""`
    Red: command.py:stop: `clean(f"{program}: {error}")` -> `f"{program}: {error}"`
    Red: command.py:stop: `sys.exit(2)` -> `sys.exit(1)`
    Red: command.py:check: `if not good(` -> `if 0 and not good(`
    Red: config.py:is_range: `x[1] < math.inf` -> `x[1]`
    Red: config.py:check_device: `not in ("cpu", "cuda", "mps")` -> `in ()`
    Red: config.py:Config.__post_init__: `x <= 2**16` -> `x`
    Red: config.py:Config.__post_init__: `norm lr temperature clip"` -> `norm temperature clip"`
    Red: mixture.py:load_data: `raise FILE:WEIGHT` -> `raise it`
    Red: exam.py:read_tests: `if not config.sample_tokens and` -> `if 0 and`
    Red: evaluate.py:main: `if not rows:` -> `if 0:`"""
    program, argv, words = prepare(place, case)
    with pytest.raises(SystemExit) as stop:
        MAIN[program](argv)
    stderr = capsys.readouterr().err
    check(stderr, words, usage=": error: " in stderr)
    assert stop.value.code == 2


@pytest.mark.parametrize("case", [
    "unknown columns", "adapter of another model", "no place for a tensor",
    "merging another's adapter", "unknown loss"])
def test_a_mistake_on_a_real_command_line_shows_no_traceback(case, place):
    """Red: train.py: `if __name__ == "__main__":` -> `if 0:`
    Red: command.py:stop: `sys.exit(2)` -> `sys.exit(1)`"""
    program, argv, words = prepare(place, case)
    run = subprocess.run([sys.executable, ROOT / f"{program}.py", *argv], capture_output=True,
                         text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    check(run.stderr, words, usage=case == "unknown loss")
    assert run.returncode == 2


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_out_of_memory_names_the_step_and_what_to_try(error, place, capsys, monkeypatch):
    """Red: stops.py:no_memory: `isinstance(error, torch.OutOfMemoryError | MemoryError) or` -> ``
    Red: stops.py:no_memory: `"allocate memory", ` -> ``"""
    def train_step(*_):
        raise error

    monkeypatch.setattr(train, "train_step", train_step)
    with pytest.raises(SystemExit) as stop:
        train.main(command(place, "train"))
    check(capsys.readouterr().err, [
        "out of memory at step 1", "--micro_batch_tokens 4096", "--gradient_checkpointing true",
        "--dtype bfloat16", "--max_length 50"], usage=False)
    assert stop.value.code == 2


def test_an_error_of_ours_keeps_its_traceback(place, monkeypatch):
    """Red: stops.py:explain: `return told(error, ` -> `return ValueError(`
    Red: train.py:main: `isinstance(known, RuntimeError)` -> `False`"""
    def train_step(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(train, "train_step", train_step)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train.main(command(place, "train"))


@pytest.mark.parametrize("flags, words", [
    ("", "DIR/run; holds a run already; --resume true"),
    ("--resume true --lr 0.5", "cannot resume; DIR/run; lr was 3e-05 and is now 0.5; --out"),
    ("--resume true --loss uft_bce", "cannot resume; loss was 'uft' and is now 'uft_bce'")])
def test_a_run_is_neither_overwritten_nor_continued_otherwise(flags, words, place, capsys):
    """And what it wrote stays as it was.
    Red: checkpoint.py:compare: `and old["config"].get(key) != value` -> `and False`
    Red: train.py:run_folder: `if not config.resume and "config.json" in held` -> `if False`"""
    train.main(command(place, "train"))
    before = {p: p.read_bytes() for p in (place / "run").rglob("*.*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(command(place, "train", flags))
    check(capsys.readouterr().err, words.replace("DIR", str(place)).split("; "), usage=False)
    assert stop.value.code == 2
    assert before == {p: p.read_bytes() for p in (place / "run").rglob("*.*")}


def test_the_batch_that_broke_a_run_is_saved_with_its_rows(place):
    """Red: stops.py:explain: `for e in u]` -> `for e in u[1:]]`"""
    with pytest.raises(SystemExit):
        train.main(command(place, "train", "--lr 1e30"))
    rows = (place / "run/bad_batch.jsonl").read_text("utf-8").splitlines()
    assert len(rows) == 8 and all(json.loads(r)["where"].count("data.jsonl:") for r in rows)


@pytest.mark.parametrize("field", fields(config.Config), ids=lambda f: f.name)
def test_every_field_is_a_flag_that_reaches_the_config(field, monkeypatch):
    """Red: config.py:parse_flags: `**given | ` -> `model=given["model"], loss=given["loss"], **`"""
    value = {"loss": "dpo", "template": "chatml", "dtype": "bfloat16", "data": ("x",),
             "test": ("x",), "anchor": "old", "una_target": "reward", "grpo_scale": "batch",
             "grpo_length": "constant"}.get(
        field.name, VALUES[field.type])
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
    got = []
    monkeypatch.setattr(train, "train", got.append)
    monkeypatch.setattr(train.memory, "told", lambda config, _: got.append(config))
    flags = {"--model": "m", "--data": "d"} | {f"--{field.name}": text}
    train.main([word for flag in flags.items() for word in flag])
    assert getattr(got[0], field.name) == value != field.default


@pytest.mark.parametrize("word", ["-1,3", "-.5,1", "-1e-3,0"])
def test_a_range_below_zero_needs_no_equals_sign(word):
    """A word of a minus and a digit is the value of the flag before it; no flag begins so.
    Red: command.py:Parser.parse_args: `?=-[` -> `?=+[`
    Red: command.py:Parser.parse_args: `d.])` -> `d])`"""
    flags = ["--model", "m", "--data", "-9", "--score_range", word, "--steps", "3"]
    found = config.parse_flags(flags, {})
    assert found.score_range == tuple(map(float, word.split(",")))
    assert (found.model, found.data, found.steps) == ("m", ("-9",), 3)


def test_help_lists_every_flag_and_exits_with_zero(capsys):
    """Red: config.py:parse_flags: `in fields(Config)` -> `in fields(Config)[1:]`"""
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    told = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"  --{f.name} " in told for f in fields(config.Config))


def test_only_losses_with_a_reward_of_their_own_may_do_without_a_kl():
    """Red: config.py: `(self.loss not in BETA_ZERO)` -> `True`
    Red: config.py: `(self.loss not in BETA_ZERO)` -> `False`"""
    for loss in train.LOSSES:
        if loss in config.BETA_ZERO:
            config.Config(model="m", data=("d",), loss=loss, beta=0.0)
        else:
            with pytest.raises(ValueError, match="--beta: found 0.0, expected a number above 0"):
                config.Config(model="m", data=("d",), loss=loss, beta=0.0)


def test_help_is_one_screen_with_every_group_and_the_papers_values(capsys):
    """Red: config.py:parse_flags: `width=100` -> `width=40`
    Red: config.py:parse_flags: `if f.name in GROUPS:` -> `if False:`"""
    with pytest.raises(SystemExit):
        train.main(["--help"])
    told = capsys.readouterr().out
    assert len(told.splitlines()) <= 85 and max(map(len, told.splitlines())) <= 100
    assert all(f"\n{title}:\n  --{name} " in told for name, title in config.GROUPS.items())
    assert told.count("(paper: ") == 3
