"""No file, flag or setting a user can supply gives a traceback, a hang or a silent acceptance.

tests/faults/ holds the table; `make test-faults` runs all of it, three ways.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bounds
import peft_config
import strict
import weights

ROOT = Path(__file__).resolve().parent.parent

GRAVEST = (  # what was accepted, hung, or gave a traceback before
    "^M01 config.json is 100,000 deep|^M01 a key twice|^M02 config.json in UTF-16$",
    "^M14 nan in lm_head|^M18 (overlap|trailing)|^M23 a tensor in another|^M31 layers 9999",
    "^M26 (config|tokenizer_config).json is (a pipe|/dev/zero)|^M22 a shard at '/etc",
    "^T03 (two pieces|an added token far|random)|^T04|^T12 pre_tokenizer ..x|^T13 a raw byte",
    "^T17 a template that (loops for ever|doubles|writes mega|multiplies|drops|nests 100)",
    "^E06 rank_pattern is .*a.a|^E07 (lora_dropout is 1.5|use_rslora|zork is 1)|^E05 NaN in B",
    "^E04 a layer missing|^E14|^S08 a tensor with an escape|^S0[12] .*(index|auto_map)")


def faults(*flags: str) -> subprocess.CompletedProcess:
    """The fault table's runner with these flags, in a process of its own."""
    return subprocess.run([sys.executable, "-m", "tests.faults.run", *flags], cwd=ROOT, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                          check=False)


def test_a_spread_of_the_fault_table_passes():
    """Every fifteenth case; the others are run by `make test-faults`.
    Red: tests/faults/run.py:judge: `"R": code == 2` -> `"R": code == 3`"""
    run = faults("--every", "15")
    assert run.returncode == 0, run.stdout + run.stderr


def test_what_is_broken_is_refused_on_the_command_line():
    """The gravest of each family, named in one sentence.
    Red: strict.py:parse: `except RecursionError:` -> `except KeyError:`
    Red: strict.py:parse: `len(found) < len(pairs)` -> `False`
    Red: strict.py:exists: `if kind != stat.S_IFREG:` -> `if False:`
    Red: weights.py:header: `if begin != end:` -> `if False:`
    Red: weights.py:headers: `if odd := found.keys() ^ listed:` -> `if odd := set():`
    Red: model.py:load: `if config.num_hidden_layers > ` -> `if 10**9 < `
    Red: vocabulary.py:numbers: `owner.setdefault(number, token) != token` -> `False`
    Red: vocabulary.py:check: `raw["model"].get("dropout")` -> `False`
    Red: vocabulary.py:open_tokenizer: `tokenizer.id_to_token(i) is None` -> `False`
    Red: vocabulary.py:encode: `except (TypeError, UnicodeError):` -> `except KeyError:`
    Red: templates.py:fill: `with bounds.deadline(SECONDS):` -> `with bounds.deadline(60):`
    Red: templates.py:compile_template: `except Exception as` -> `except TemplateError as`
    Red: tokens.py:Chat.frame: `not answer or` -> ``
    Red: peft_config.py:read: `not 0 <= drop < 1` -> `False`
    Red: peft_config.py:read: `bounds.boolean(config, "use_rslora")` -> `pass`
    Red: peft_folder.py:merge: `if part.exists():` -> `if False:`"""
    run = faults("--only", "|".join(GRAVEST))
    assert run.returncode == 0, run.stdout + run.stderr


PATTERNS = {  # whether it may be used
    r"(x+x+)+y": False, r"(x|xx)+": False, r"((a)+)*": False, r"(a*){2,}": False,
    r"(.*){1,99}": False, ".*" * 6: False, r"(?:a|b)*": False, r"[(]+[+*]*": True,
    r".*\.(q|k|v)_proj": True, r"\(+\)+": True, r"(a{1,3}b)+": True, r"a|b+": True,
    r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj": True, r"[]+]+x": True, r"(?:ab)?c+": True}


@pytest.mark.parametrize("text, good", PATTERNS.items(), ids=PATTERNS.keys())
def test_a_pattern_that_could_run_for_ever_is_refused(text, good):
    """Nothing that repeats or chooses is repeated without bound; five repeats at most.
    Red: bounds.py:tame: `if endless and closed:` -> `if False:`
    Red: bounds.py:tame: `count <= repeats` -> `True`
    Red: bounds.py:tame: `or part == "|"` -> ``
    Red: bounds.py: `(?:\\d\\d+)?` -> ``"""
    if good:
        assert bounds.pattern(text, "here") == re.compile(text)
    else:
        with pytest.raises(ValueError, match="^here: .*could run for ever"):
            bounds.pattern(text, "here")


def test_a_message_stays_on_one_line_and_sends_no_control_character():
    """Escape codes, line ends, bidirectional marks and lone surrogates are spelled out.
    Red: strict.py:clean: `if c.isprintable()` -> `if c != "\\n"`"""
    told = strict.clean("a \x1b[2J\n\r\x9b\u202e\ud800 b\u00e9")
    assert told == "a \\x1b[2J\\n\\r\\x9b\\u202e\\ud800 b\u00e9"


@pytest.mark.parametrize("shape", [(3, 4), (), (5,)])
def test_the_first_odd_number_of_a_tensor_is_named_with_its_place(shape):
    """And a finite or empty tensor passes.
    Red: weights.py:check_finite: `nonzero()[0]` -> `nonzero()[-1]`
    Red: weights.py:check_finite: `tensor.numel() and ` -> ``"""
    tensor = torch.ones(shape)
    for fine in (tensor, torch.ones(0, 3)):
        weights.check_finite(Path("f"), "w", fine)
    tensor.view(-1)[tensor.numel() // 2:] = float("inf")
    place = (~tensor.isfinite()).nonzero().tolist()[0]
    with pytest.raises(ValueError, match=re.escape(f"f: w holds inf at {place}")):
        weights.check_finite(Path("f"), "w", tensor)


def test_what_time_a_template_takes_is_limited_and_the_limit_is_lifted_again():
    """The clock counts computing only, and an inner wait costs nothing.
    Red: bounds.py:deadline: `signal.setitimer(signal.ITIMER_VIRTUAL, 0)` -> `pass`"""
    with pytest.raises(TimeoutError, match="longer than 0.05"), bounds.deadline(0.05):
        while True:
            pass
    with bounds.deadline(0.05):
        pass
    assert sum(range(10**7)) > 0


def test_memory_is_limited_only_inside():
    """Half a GiB more is refused under a limit of a quarter, and granted behind it.
    Red: bounds.py:memory: `now + size` -> `now + 9 * size`"""
    with pytest.raises(MemoryError), bounds.memory(1 << 28):
        bytearray(1 << 29)
    assert len(bytearray(1 << 29)) == 1 << 29


def test_layers_are_selected_by_name_as_peft_does():
    """Last parts of names, full names, or an expression for the full name.
    Red: peft_config.py:select: `re.escape(t)` -> `t`"""
    names = ["a.q_proj", "b.q_proj", "b.qxproj", "lm_head"]
    assert peft_config.select(names, ["q_proj"]) == names[:2]
    assert peft_config.select(names, "all-linear") == names[:3]
    assert peft_config.select([*names, "a.q.proj"], ["q.proj"]) == ["a.q.proj"]
