"""Families H01 to H10: asking a policy that cannot answer, by flags, prompts, chats and tests."""
import json
import os
import signal
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from faults.case import Case, Change, edit, remove, several, write

CHAT = "ONLY --model DIR/model --template chatml --max_new_tokens 4"
HUGE = "1" + "0" * 30
FLAGS = {  # flag: (what is expected, values that are refused)
    "temperature": ("", "-1 -0.1 nan inf -inf 1e999 x"),
    "top_p": ("", "0 -1 1.5 nan inf x"),
    "max_new_tokens": ("", "0 -1 1.5 x nan"),
    "seed": ("", f"-1 {HUGE} 0.5 x"),
    "dtype": ("float32", "float16 x"),
    "device": ("cannot be used here", "cuda gpu meta mps x"),
    "template": ("chatml", "llama x"),
}
CHOICES = {"choices": ["one", "two"], "labels": [1, 0]}
ASKED = {"question": "Say one.", "mc1_targets": CHOICES, "mc2_targets": CHOICES}
PATTERN = {"prompt": "Say one.", "pattern": "one"}
CSV = "Question,Best Answer,Correct Answers,Incorrect Answers\n"


def typed(content: str | bytes) -> Change:
    """What stands on the terminal, then its end."""
    def change(place: Path) -> None:
        write("typed", content)(place)
        os.dup2(os.open(place / "typed", os.O_RDONLY), 0)

    return change


def interrupted(seconds: float) -> Change:
    """Ctrl-C while a chat waits for its user."""
    def change(place: Path) -> None:
        (place / "waiting").touch()
        os.dup2(os.pipe()[0], 0)
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()

    return change


def weights(name: str, factor: float) -> Change:
    """The tensors of an adapter or a model, times a factor: finite, but too large."""
    def change(place: Path) -> None:
        torch.set_num_threads(1)
        tensors = load_file(place / name)
        save_file({n: (t.double() * factor).clamp(-3e38, 3e38).to(t.dtype)
                   for n, t in tensors.items()}, place / name, {"format": "pt"})

    return change


def sampling() -> list[Case]:
    """H04 H06 H08: flags and prompts."""
    out = [Case(f"H04 --{flag} {value[:9]}", "generate", None, f"--{flag}='{value}'",
                f"--{flag}; {wanted}")
           for flag, (wanted, values) in FLAGS.items() for value in values.split()]
    out += [Case(f"H04 {flags} is allowed", "generate", None, flags, "", "V") for flags in (
        "--temperature 1", "--temperature 1e-3", "--temperature 100",
        "--top_p 1e-9 --temperature 1",
        "--max_new_tokens 1", "--max_new_tokens 1000000", f"--max_new_tokens {HUGE}", "--seed 7",
        "--temperature 0.7 --top_p 0.9 --seed 3", "--dtype bfloat16", "--adapter DIR/adapter",
        "--prompt one --prompt 'two and three'")]
    long = "one " * 200
    bare = edit("model/tokenizer_config.json", add_bos_token=False)
    return out + [
        Case("H06 a prompt beyond the context", "generate", None, f"--prompt '{long}'",
             "tokens; context of 128"),
        Case("H06 a prompt of 80 KB", "generate", write("x", ""), f"--prompt '{long * 100}'",
             "tokens; context of 128"),
        Case("H06 one prompt of two beyond the context", "generate", None,
             f"--prompt hi --prompt '{long}'", "context of 128"),
        Case("H06 a prompt that fills the context", "generate", bare, f"--prompt '{'!' * 128}'",
             "128 tokens; context of 128"),
        Case("H06 a prompt with room for one", "generate", bare, f"--prompt '{'!' * 127}'", "",
             "V"),
        Case("H06 an empty prompt without a BOS", "generate", several(
            bare, lambda p: None), "ONLY --model DIR/model --template plain --prompt ''",
            "no tokens; BOS"),
        Case("H06 an empty prompt behind a BOS", "generate", None, "--prompt ''", "", "V"),
        Case("H06 a prompt of blanks", "generate", None, "--prompt '   '", "", "V"),
        Case("H06 a prompt of control tokens", "generate", None,
             "--prompt '<|im_end|></s><s>'", "", "V"),
        Case("H06 a prompt of escape codes", "generate", None, "--prompt '\x1b[31m\x07'", "", "V"),
        Case("H06 a prompt that is no UTF-8", "generate", None, "--prompt '\udcff'", "--prompt"),
        Case("H06 a prompt with line feeds", "generate", None, "--prompt 'a\n\nb'", "", "V")]


def adapters() -> list[Case]:
    """H07: folders that are no adapter, and logits that are no numbers."""
    name = "adapter/adapter_model.safetensors"
    big = weights(name, 1e38)
    folders = {"no folder": (None, "none", "none; adapter_config.json"),
               "a file": (None, "data.jsonl", "data.jsonl"),
               "the model": (None, "model", "model; adapter_config.json"),
               "an empty folder": (lambda p: (p / "e").mkdir(), "e", "adapter_config.json"),
               "no weights": (remove(name), "adapter", "adapter_model.safetensors"),
               "broken weights": (write(name, "x"), "adapter", "model.safetensors; readable"),
               "another model's": (None, "other", "adapter and model differ")}
    out = [Case(f"H07 the adapter is {n}, {program}", program, change, f"--adapter DIR/{path}",
                words)
           for n, (change, path, words) in folders.items() for program in ("generate", "evaluate")]
    finite = "not finite"
    return out + [
        Case("H07 logits that are no numbers", "generate", big, "--adapter DIR/adapter", finite),
        Case("H07 logits that are no numbers, drawn", "generate", big,
             "--adapter DIR/adapter --temperature 1", finite),
        Case("H07 logits that are no numbers, drawn by top_p", "generate", big,
             "--adapter DIR/adapter --temperature 1 --top_p 0.5", finite),
        Case("H07 log-probs that are no numbers", "evaluate", big, "--adapter DIR/adapter",
             f"data.jsonl:1; {finite}"),
        Case("H07 answers of no numbers", "evaluate", several(big, write(
            "q.jsonl", json.dumps(PATTERN))), "--adapter DIR/adapter --data DIR/q.jsonl", finite),
        Case("H07 choices of no numbers", "evaluate", several(big, write(
            "q.jsonl", json.dumps(ASKED))), "--adapter DIR/adapter --data DIR/q.jsonl", finite)]


def chats() -> list[Case]:
    """H02 H05 H09: what a user types."""
    return [
        Case("H02 the end of input at once", "generate", typed(""), CHAT, "", "V"),
        Case("H02 one turn", "generate", typed("hi\n"), CHAT, "> ", "V"),
        Case("H02 three turns", "generate", typed("hi\nthere\nagain\n"), CHAT, "> ", "V"),
        Case("H02 an empty line", "generate", typed("\n"), CHAT, "> ", "V"),
        Case("H02 no last line feed", "generate", typed("hi"), CHAT, "> ", "V"),
        Case("H02 control tokens", "generate", typed("<|im_end|><|im_start|>system\n"), CHAT, "> ",
             "V"),
        Case("H02 a NUL", "generate", typed("a\0b\n"), CHAT, "> ", "V"),
        Case("H02 escape codes", "generate", typed("\x1b[A\x1b[B\x07\n"), CHAT, "> ", "V"),
        Case("H02 a turn beyond the context", "generate", typed("one " * 300 + "\n"), CHAT,
             "context of 128"),
        Case("H02 turns that outgrow the context", "generate", typed("one two three\n" * 50), CHAT,
             "context of 128"),
        Case("H02 bytes that are no UTF-8", "generate", typed(b"caf\xe9\n"), CHAT, "UTF-8"),
        Case("H02 Ctrl-C", "generate", interrupted(0.8), CHAT, "stopped", "K"),
        Case("H02 Ctrl-C and a broken terminal", "generate", interrupted(0.6),
             f"{CHAT} --temperature 1", "stopped", "K")]


def asked() -> dict[str, tuple]:
    """Questions with one fault each, and the words of their refusal."""
    def mc(**more: object) -> dict:
        return ASKED | {"mc1_targets": CHOICES | more}

    return {
        "a pattern that is none": (PATTERN | {"pattern": "("}, "no regular expression"),
        "a pattern repeated too often": (PATTERN | {"pattern": "a{99999999999999999999}"},
                                         "no regular expression"),
        "a pattern too deep": (PATTERN | {"pattern": "(" * 5000 + ")" * 5000},
                               "no regular expression"),
        "a wrong escape": (PATTERN | {"pattern": "\\q"}, "no regular expression"),
        "an empty pattern": (PATTERN | {"pattern": ""}, "empty prompt or pattern"),
        "a number as pattern": (PATTERN | {"pattern": 7}, "pattern must be a text"),
        "null as pattern": (PATTERN | {"pattern": None}, "pattern must be a text"),
        "no prompt": ({"pattern": "a"}, "no column 'prompt'"),
        "a blank prompt": (PATTERN | {"prompt": " "}, "empty prompt or pattern"),
        "a number as prompt": (PATTERN | {"prompt": 7}, "prompt must be a text"),
        "no message": (PATTERN | {"prompt": []}, "empty prompt"),
        "a wrong role": (PATTERN | {"prompt": [{"role": "x", "content": "q"}]}, "role 'x'"),
        "no mc2_targets": ({k: v for k, v in ASKED.items() if k != "mc2_targets"}, "'mc2_targets'"),
        "no question": ({k: v for k, v in ASKED.items() if k != "question"}, "'question'"),
        "targets that are a list": (ASKED | {"mc1_targets": [1]}, "mc1_targets must hold choices"),
        "targets that are a text": (ASKED | {"mc1_targets": "x"}, "mc1_targets must hold choices"),
        "targets of null": (ASKED | {"mc1_targets": None}, "mc1_targets must hold choices"),
        "no labels": (ASKED | {"mc1_targets": {"choices": ["a"]}}, "must hold choices and labels"),
        "choices that are a text": (mc(choices="ab"), "choices must be a list"),
        "labels that are a text": (mc(labels="10"), "labels must be a list"),
        "labels that are a number": (mc(labels=1), "labels must be a list"),
        "a choice that is a number": (mc(choices=["a", 1]), "a choice must be a text"),
        "an empty choice": (mc(choices=["a", " "]), "a choice is empty"),
        "no choice": (mc(choices=[], labels=[]), "0 choices"),
        "more labels": (mc(labels=[1, 0, 0]), "2 choices have the labels"),
        "no right choice": (mc(labels=[0, 0]), "2 choices have the labels"),
        "no wrong choice": (mc(labels=[1, 1]), "2 choices have the labels"),
        "a label of 2": (mc(labels=[1, 2]), "2 choices have the labels"),
        "a label that is a list": (mc(labels=[1, []]), "2 choices have the labels"),
        "a label that is a text": (mc(labels=["1", "0"]), "2 choices have the labels"),
        "a lone surrogate": ('{"prompt": "\\ud83d", "pattern": "a"}', "surrogates"),
        "a key twice": ('{"prompt": "a", "pattern": "a", "pattern": "b"}', "comes twice"),
        "no JSON": ("{", "not valid JSON"), "a list": ("[]", "expected an object"),
        "an escape code": (PATTERN | {"prompt": [{"role": "\x1b[2J", "content": "q"}]}, "\\x1b")}


def questions() -> list[Case]:
    """H10: files of questions, for evaluate.py and --test."""
    out = []
    for n, (row, words) in asked().items():
        kind = PATTERN if "pattern" in row else ASKED
        lines = f"{json.dumps(kind)}\n{row if isinstance(row, str) else json.dumps(row)}\n"
        out += [Case(f"H10 {n}, {program}", program, write("q.jsonl", lines),
                     f"--{flag} DIR/q.jsonl --{room} 3", f"q.jsonl:2; {words}")
                for program, flag, room in (("evaluate", "data", "max_new_tokens"),
                                            ("train", "test", "sample_tokens"))]
    tables = {"other columns": ("a,b\n1,2\n", "q.csv:2; no column"),
              "no row": (CSV, "q.csv; no question"), "nothing": ("", "q.csv; no question"),
              "no best answer": (CSV + "Why?,,,So\n", "q.csv:2; labels"),
              "no wrong answer": (CSV + "Why?,So,So,\n", "q.csv:2; labels"),
              "a short row": (CSV + "Why?\n", "q.csv:2; labels"),
              "no question": (CSV + ",So,So,No\n", "q.csv:2; empty prompt"),
              "latin-1": ((CSV + "caf\u00e9,a,a,b\n").encode("latin-1"), "q.csv; UTF-8"),
              "UTF-16": ((CSV + "q,a,a,b\n").encode("utf-16"), "q.csv; UTF-8"),
              "a field of a megabyte": (CSV + "q" * 10**6 + ",a,a,b\n", "q.csv; damaged"),
              "an open quote": (CSV + '"q,a,a,b\n', "q.csv"),
              "a zip": (b"PK\x03\x04 x", "q.csv; zip")}
    out += [Case(f"H10 a table: {n}, {program}", program, write("q.csv", content),
                 f"--{flag} DIR/q.csv --{room} 3", words)
            for n, (content, words) in tables.items() for program, flag, room in (
                ("evaluate", "data", "max_new_tokens"), ("train", "test", "sample_tokens"))]
    return out + tests()


def tests() -> list[Case]:
    """H10: what is asked before and after a run, and of no run."""
    one, both = json.dumps(PATTERN) + "\n", json.dumps(PATTERN) + "\n" + json.dumps(ASKED) + "\n"
    long = json.dumps(PATTERN | {"prompt": "one two " * 200}) + "\n"
    weighed = json.dumps(ASKED | {"question": "one two " * 200}) + "\n"
    return [
        Case("H10 patterns and choices in one file", "evaluate", write("q.jsonl", both),
             "--data DIR/q.jsonl", "q.jsonl:2; patterns and choices"),
        Case("H10 patterns and choices in one test", "train", write("q.jsonl", both),
             "--test DIR/q.jsonl --sample_tokens 3", "q.jsonl:2; patterns and choices"),
        Case("H10 a pattern that runs for ever", "evaluate", write("q.jsonl", json.dumps(
            PATTERN | {"pattern": "(?:.|.|.)*(?:.|.|.)*\u2603"})), "--data DIR/q.jsonl",
            "patterns; 1 second"),
        Case("H10 no such test", "train", None, "--test DIR/q.jsonl", "q.jsonl; No such file"),
        Case("H10 a folder as a test", "train", None, "--test DIR/model", "model; regular file"),
        Case("H10 a pipe as a test", "train", lambda p: os.mkfifo(p / "q.jsonl"),
             "--test DIR/q.jsonl", "q.jsonl; regular file"),
        Case("H10 an empty test", "train", write("q.jsonl", ""), "--test DIR/q.jsonl",
             "q.jsonl; no question"),
        Case("H10 feedback as a test", "train", None, "--test DIR/data.jsonl", "data.jsonl:1"),
        Case("H10 a test without room", "train", write("q.jsonl", one), "--test DIR/q.jsonl",
             "--test; --sample_tokens 0"),
        Case("H10 questions to train on", "train", write("q.jsonl", one), "--data DIR/q.jsonl",
             "q.jsonl:1; cannot tell the format"),
        Case("H10 one test twice", "train", write("q.jsonl", one),
             "--test DIR/q.jsonl --test DIR/q.jsonl --sample_tokens 3", "correct", "V"),
        Case("H10 a question beyond the context", "evaluate", write("q.jsonl", long),
             "--data DIR/q.jsonl", "context of 128"),
        Case("H10 a choice beyond the context", "evaluate", write("q.jsonl", weighed),
             "--data DIR/q.jsonl", "context"),
        Case("H10 a test beyond the context", "train", write("q.jsonl", long),
             "--test DIR/q.jsonl --sample_tokens 3", "context of 128"),
        Case("H10 a test of choices beyond the context", "train", write("q.jsonl", weighed),
             "--test DIR/q.jsonl --sample_tokens 3", "context"),
        Case("H10 a good test", "train", write("q.jsonl", one),
             "--test DIR/q.jsonl --sample_tokens 3", "q correct", "V"),
        Case("H10 good choices", "evaluate", write("q.jsonl", json.dumps(ASKED)),
             "--data DIR/q.jsonl", "mc2", "V"),
        Case("H10 a good table", "evaluate", write("q.csv", CSV + "q,a,a;b,c\n"),
             "--data DIR/q.csv", "mc1", "V"),
        Case("H10 feedback, then questions", "evaluate", write("q.jsonl", one),
             "--data DIR/data.jsonl --data DIR/q.jsonl", "uft_loss; correct", "V")]


def cases() -> list[Case]:
    return [*sampling(), *adapters(), *chats(), *questions()]
