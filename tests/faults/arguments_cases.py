"""Families A01 to A19: command lines that are misspelt, absurd or contradictory; where they run.

Every number that a flag takes is tried with 0, -1, text, nan, inf and what no machine can hold.
"""
import os
import resource
from pathlib import Path

from faults.case import Case, Change, edit, several, write

HUGE, LONG = "1" + "0" * 30, "9" * 5000
TRAIN = {  # flag: (family, what is expected, values that are refused)
    "beta": ("A02", "above 0", "0 -1 nan inf -inf 1e999 x 1,5"),
    "lr": ("A03", "above 0", "0 -1 nan inf 1e-4x x"),
    "warmup": ("A03", "0 to 1", "-0.1 1.1 nan inf 100 x"),
    "lora_r": ("A04", "1 to 65536", f"0 -1 {HUGE} 3.5 nan inf x"),
    "lora_alpha": ("A04", "above 0", "0 -1 nan inf x"),
    "lora_dropout": ("A05", "0 to below 1", "1 -0.1 nan inf 1.5 x"),
    "batch_size": ("A07", "1 to 65536", f"0 -1 {HUGE} 1.5 nan inf x"),
    "micro_batch_tokens": ("A07", "above 0", f"0 -1 {HUGE} 1e3 x"),
    "steps": ("A07", "0 to 10^9", f"-1 {HUGE} 1e3 nan x"),
    "epochs": ("A07", "above 0", "0 -1 nan inf 1e308 x"),
    "save_every": ("A07", "0 to 10^9", f"-1 {HUGE} x"),
    "held_out": ("A07", "0 to 10^9", f"-1 {HUGE} 0.5 x"),
    "sample_tokens": ("A07", "0 to 10^9", f"-1 {HUGE} x"),
    "max_length": ("A08", "--max_length", f"0 -1 1 129 {HUGE} x 1.5"),
    "weight_decay": ("A03", "0 or more", "-1 nan inf x"),
    "max_grad_norm": ("A03", "above 0", "0 -1 nan inf x"),
    "label_smoothing": ("A02", "0 to below 1/2", "0.5 -0.1 nan 1 x"),
    "desirable_weight": ("A02", "0 or more", "-1 nan inf x"),
    "undesirable_weight": ("A02", "0 or more", "-1 nan inf x"),
    "orpo_weight": ("A02", "0 or more", "-1 nan inf x"),
    "simpo_gamma": ("A02", "0 or more", "-1 nan inf x"),
    "seed": ("A14", "0 to 10^9", f"-1 {HUGE} 1.5 nan x"),
    "score_range": ("A16", "LOW,HIGH", "1 5,1 1,1 nan,1 0,inf -inf,inf 1,2,3 a,b 1; x"),
    "resume": ("A16", "true or false", "yes True 1 x"),
    "truncate_prompt": ("A16", "true or false", "yes 0"),
    "gradient_checkpointing": ("A16", "true or false", "on"),
    "dtype": ("A09", "float32", "float16 float64 fp16 int8 x"),
    "loss": ("A10", "una_pair", "rlhf UFT pp0 uft,sft x"),
    "template": ("A10", "chatml", "llama Chatml x"),
    "device": ("A15", "cannot be used here", "cuda cuda:99 gpu mps meta xla privateuseone x"),
    "lora_targets": ("A06", "matches no linear layer; up_proj", "qproj q_proj,qproj x .* , 1"),
}
EVALUATE = {
    "beta": ("A02", "above 0", "0 -1 nan inf x"),
    "max_length": ("A08", "--max_length", f"0 -1 1 129 {HUGE} x"),
    "micro_batch_tokens": ("A07", "1 or more", "0 -1 x 1.5"),
    "limit": ("A07", "1 or more", "0 -1 x"),
    "max_new_tokens": ("A07", "1 or more", "0 -1 x"),
    "score_range": ("A16", "LOW,HIGH", "1 5,1 nan,1 0,inf a,b"),
    "dtype": ("A09", "float32", "float16 x"),
    "template": ("A10", "chatml", "llama x"),
    "device": ("A15", "cannot be used here", "cuda gpu meta x"),
}
MISSPELT = {"--leraning_rate": "", "--bata": "--beta", "--batch-size": "--batch_size",
            "--Loss": "--loss", "--lora_rank": "--lora_r", "--max-length": "--max_length",
            "--epoch": "--epochs", "--step": "--steps", "--seeds": "--seed", "-lr": "--lr",
            "--datas": "--data", "--betta=1": "--beta", "--lora_target": "--lora_targets"}


def numbers(program: str, table: dict) -> list[Case]:
    """A case for every flag and every value that it must refuse."""
    out = []
    for flag, (family, wanted, values) in table.items():
        for value in values.split():
            # argparse refuses what is no whole number before the rule of the flag can
            told = "" if family in ("A02", "A03", "A04", "A05", "A07", "A14") and not (
                value.lstrip("-").isdigit()) else wanted
            told = "--score_range" if flag == "score_range" and value == "x" else told
            out.append(Case(f"{family} --{flag} {value[:9]}, {program}", program, None,
                            f"--{flag}='{value}'", told if flag == "lora_targets" else
                            f"--{flag}; {told}"))
    return out


def words() -> list[Case]:
    """A01: flags that are not there, nearly there, or cut short."""
    out = [Case(f"A01 {wrong} for {right or 'nothing'}", "train", None,
                wrong if "=" in wrong else f"{wrong} 1", f"{wrong.split('=')[0]}; {right}")
           for wrong, right in MISSPELT.items()]
    out += [Case(f"A01 {wrong} cut short, {program}", program, None, f"{wrong} {value}",
                 f"unrecognized; {wrong}") for program, wrong, value in (
        ("train", "--los", "sft"), ("train", "--lo", "sft"), ("train", "--bet", "1"),
        ("train", "--res", "true"), ("evaluate", "--bet", "1"), ("evaluate", "--lim", "3"),
        ("evaluate", "--normal", ""), ("evaluate", "--max_n", "3"), ("generate", "--temp", "1"),
        ("generate", "--top", "0.5"), ("generate", "--max_new", "3"), ("generate", "--see", "3"))]
    out += [Case(f"A01 {name}", program, None, flags, words) for name, program, flags, words in (
        ("a word alone", "train", "sft", "unrecognized; sft"),
        ("a flag without its value", "train", "--beta", "--beta; expected one argument"),
        ("a flag with an escape code", "train", "--x\x1b[31m 1", "--x\\x1b[31m"),
        ("a word with a line feed", "train", "'a\nb'", "a\\nb"),
        ("a value with an escape code", "train", "--beta 'a\x1b[2J'", "--beta; \\x1b"),
        ("a loss with a line feed", "train", "--loss 'a\nb'", "--loss; a\\nb"),
        ("an integer of 5000 digits", "train", f"--steps {LONG}", "--steps; whole number"),
        ("a float of 5000 digits", "train", f"--beta {LONG}", "--beta; inf"),
        ("no data", "evaluate", "ONLY --model DIR/model", "--data; required"),
        ("no model", "evaluate", "ONLY --data DIR/data.jsonl", "--model; required"),
        ("no model to sample from", "generate", "ONLY --prompt hi", "--model; required"),
        ("no data to train on", "train", "ONLY --model DIR/model", "--data; something"),
        ("no model to train", "train", "ONLY --data DIR/data.jsonl", "--model; something"),
        ("an empty model", "train", "--model ''", "--model; something"),
        ("an empty name of data", "train", "--data ''", "regular file"),
        ("an empty name of data, to evaluate", "evaluate", "--data ''", "regular file"),
        ("an empty beta", "train", "--beta ''", "--beta; ''; a number"),
        ("an empty loss", "train", "--loss ''", "--loss; ''"),
        ("an empty template", "evaluate", "--template ''", "--template"),
        ("an empty target", "train", "--lora_targets ''", "''; matches no linear layer"),
        ("an empty device", "train", "--device ''", "--device"),
        ("no subcommand", "lora", "ONLY ", "lora.py"),
        ("a page of nothing", "page", "ONLY ", "page.py"))]
    out += [Case("A01 --ada cut short, merge", "lora", None, "ONLY merge --model DIR/model --ada "
                 "DIR/adapter --out DIR/merged", "--ada")]
    return out + [
        Case("A01 the flags are listed", "train", None, "--help", "--lora_targets", "V"),
        Case("A01 the last of two values counts", "train", None, "--beta 0.5 --beta 0.25",
             "beta=0.25", "V"),
        Case("A01 a value with an underscore", "train", None, "--batch_size 1_0", "steps of 10",
             "V")]


def good() -> list[Case]:
    """Values at the edge of what is allowed."""
    edges = ("warmup 0", "warmup 1", "lora_dropout 0.99", "max_length 128", "batch_size 1",
             "batch_size 100", "micro_batch_tokens 1", "micro_batch_tokens 1000000000", "lora_r 1",
             "lora_alpha 0.001", "held_out 0", "seed 1000000000", "label_smoothing 0.49",
             "weight_decay 0.5", "beta 1e-30", "beta 50", "save_every 1", "save_every 0",
             "lora_targets all-linear", "lora_targets q_proj", "lora_targets q_proj,q_proj",
             "gradient_checkpointing true", "dtype bfloat16", "sample_tokens 1000000000",
             "steps 1", "max_grad_norm 1e-9", "epochs 1e-9", "truncate_prompt true")
    out = [Case(f"A07 --{edge} is allowed", "train", None, f"--{edge}", "adapter", "V")
           for edge in edges]
    return out + [Case(f"A07 --{edge} is allowed to evaluate", "evaluate", None, f"--{edge}",
                       "uft_loss", "V")
                  for edge in ("limit 1", "limit 1000", "max_length 128", "beta 1e-30",
                               "micro_batch_tokens 1", "dtype bfloat16", "score_range 0,2")]


def run_before(*more: str) -> Change:
    """A finished run lies in the output folder."""
    def change(place: Path) -> None:
        import train
        if not os.fork():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 1
            try:
                train.main([w.replace("DIR", str(place)) for w in (
                    "--model DIR/model --template plain --max_length 100 --held_out 4 --steps 2 "
                    "--sample_tokens 0 --out DIR/run --data DIR/data.jsonl").split()] + [*more])
                code = 0
            finally:
                os._exit(code)
        if os.wait()[1]:
            raise ValueError("the run before failed")

    return change


def read_only(place: Path) -> None:
    """A folder that nobody can write into: on /proc, not even root can."""
    (place / "locked").symlink_to("/proc/self/fdinfo")


def small_disk(place: Path) -> None:
    """No file may grow beyond 4 KiB, as on a disk that is full."""
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def folders() -> list[Case]:
    """A11 to A14: where a run goes, and going on with one."""
    out = [
        Case("A11 out is a file", "train", write("run", "x"), "", "DIR/run"),
        Case("A11 out is the data", "train", None, "--out DIR/data.jsonl", "data.jsonl"),
        Case("A11 out is the model", "train", None, "--out DIR/model", "DIR/model; --out"),
        Case("A11 out is in the model", "train", None, "--out DIR/model/run", "DIR/model; --out"),
        Case("A11 out holds data", "train", None, "--out DIR", "--out"),
        Case("A11 out holds another run", "train", run_before(), "",
             "DIR/run; holds a run already; --resume true"),
        Case("A11 out is an adapter", "train", None, "--out DIR/adapter", "DIR/adapter; --out"),
        Case("A11 the cache is a file", "train", None, "--reference_cache DIR/data.jsonl",
             "data.jsonl"),
        Case("A12 out is under a file", "train", None, "--out DIR/data.jsonl/run", "data.jsonl"),
        Case("A12 out cannot be written", "train", read_only, "--out DIR/locked/run", "locked"),
        Case("A12 the cache cannot be written", "train", read_only,
             "--reference_cache DIR/locked/c", "locked"),
        Case("A12 a name too long", "train", None, f"--out DIR/{'x' * 300}", "name too long"),
        Case("A12 the disk is full", "train", small_disk, "", "File too large", "K"),
        Case("A04 a rank beyond the layers", "train", None, "--lora_r 17", "--lora_r 17; 16"),
        Case("A13 nothing to resume", "train", None, "--resume true", "cannot resume; DIR/run"),
        Case("A13 resume without a folder", "train", None, "ONLY --model DIR/model --data "
             "DIR/data.jsonl --template plain --max_length 100 --resume true", "--resume; --out"),
        Case("A13 resume a file", "train", write("run", "x"), "--resume true", "DIR/run"),
        Case("A13 resume an empty folder", "train", lambda p: (p / "run").mkdir(),
             "--resume true", "cannot resume; DIR/run"),
        Case("A13 resume a model", "train", None, "--out DIR/model --resume true",
             "--out; model folder"),
        Case("A13 resume what is finished", "train", run_before(), "--resume true", "after step 2",
             "V"),
        Case("A14 resume with a row more", "train", several(run_before(), lambda p: write(
            "data.jsonl", (p / "data.jsonl").read_text() + '{"prompt": "a", "response": "b"}')(p)),
            "--resume true", "data.jsonl; changed"),
        Case("A14 resume with data in another order", "train", several(
            run_before(), lambda p: write("data.jsonl", "".join(sorted(
                (p / "data.jsonl").open())))(p)), "--resume true", "data.jsonl; changed"),
        Case("A14 resume with another model", "train", several(run_before(), edit(
            "model/config.json", rms_norm_eps=1e-6)), "--resume true", "model; changed"),
    ]
    changed = ("lr 0.5", "beta 0.5", "seed 1", "lora_r 4", "lora_alpha 1", "loss uft_bce",
               "batch_size 4", "max_length 90", "held_out 8", "data DIR/scores.jsonl", "warmup 0.5",
               "lora_targets q_proj", "dtype bfloat16", "weight_decay 0.1", "template chatml",
               "lora_dropout 0.5", "max_grad_norm 2", "epochs 2", "truncate_prompt true")
    return out + [Case(f"A14 resume with --{flag.replace('DIR/', '')}", "train", run_before(),
                       f"--resume true --{flag}", f"cannot resume; {flag.split()[0]}; --out")
                  for flag in changed]


def losses() -> list[Case]:
    """A10: a loss needs its columns, and every loss runs on those."""
    needs = {"uft": "data scores pairs labels", "uft_bce": "scores", "una_binary": "labels scores",
             "una_pair": "pairs", "sft": "data pairs", "sft_token_mean": "data", "dpo": "pairs",
             "ipo": "pairs", "bco_pair": "pairs", "kto": "labels pairs", "orpo": "pairs",
             "simpo": "pairs", "dro": "scores data", "reward_model": "pairs"}
    return [Case(f"A10 {loss} on {name}", "train", None, f"--loss {loss} --data DIR/{name}.jsonl",
                 f"loss={loss}", "V") for loss, names in needs.items() for name in names.split()]


def rollouts() -> list[Case]:
    """A20: losses that sample need a reward, one that gives numbers; the others need none."""
    rules = write("rule.py", "def f(prompt, response, answer): return VALUE\nVALUE = 'x'\n")
    online = "--group 2 --response_tokens 4 --batch_size 2"

    def gives(value: str) -> Change:
        return write("rule.py", f"def f(prompt, response, answer):\n    return {value}\n")

    out = [Case(f"A20 {loss} without a reward", "train", None, f"--loss {loss}",
                f"--loss {loss}; --reward") for loss in (
        "una_online", "rloo", "grpo", "ppo", "uft_hint", "uniapl")]
    out += [Case(f"A20 a reward for {loss}", "train", None, f"--loss {loss} --reward exact",
                 f"--loss {loss}; --reward; remove") for loss in ("uft", "dpo", "reward_model")]
    out += [Case(f"A20 {loss} with one response", "train", None,
                 f"--loss {loss} --reward exact --group 1", f"--loss {loss}; --group 1; 2 or more")
            for loss in ("rloo", "grpo", "uft_hint", "uniapl")]
    out += [Case(f"A20 --{flag} {value}", "train", None, f"--{flag}={value}", f"--{flag}; {told}")
            for flag, told, values in (
        ("temperature", "above 0", "0 -1"), ("clip", "above 0", "0 -1"),
        ("group", "1 to 65536", "0 -1"), ("response_tokens", "1 to 65536", "0"),
        ("updates", "1 to 65536", "0"), ("hint_parts", "1 to 65536", "0"),
        ("hint_low", "0 to 1", "2"), ("hint_high", "0 to 1", "-1"), ("ppo_lam", "0 to 1", "2"),
        ("ppo_gamma", "0 to 1", "2"), ("ppo_value_weight", "0 or more", "-1"),
        ("hint_weight", "0 or more", "-1"), ("sft_weight", "0 or more", "-1"),
        ("discriminator_weight", "0 or more", "-1"), ("center_rewards", "0 or more", "-1"),
        ("anchor", "ref", "base"), ("una_target", "reward", "x"), ("grpo_scale", "batch", "x"),
        ("grpo_length", "constant", "x")) for value in values.split()]
    named = {"exacct": "exacct; MODULE:FUNCTION", "DIR/none": "MODULE:FUNCTION",
             "no_such:f": "no_such:f; imported", "rule:g": "rule:g; imported",
             "rule:VALUE": "rule:VALUE; no function", "DIR/data.jsonl": "MODULE:FUNCTION",
             "DIR/adapter": "my/base"}
    out += [Case(f"A20 a reward named {name}", "train", rules,
                 f"--loss grpo {online} --reward {name}", words) for name, words in named.items()]
    return out + [
        Case("A20 a cache of what is sampled", "train", None,
             "--loss grpo --reward exact --reference_cache DIR/c", "--reference_cache; grpo"),
        Case("A20 a flag of rollouts without them", "train", None, "--updates 2",
             "--updates; uft does not read it; remove"),
        Case("A20 a model without a head", "train", several(rules, lambda p: write(
            "model/chat_template.jinja", "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
            )(p)), f"--loss grpo {online} --reward DIR/model", "DIR/model; no score head"),
        *(Case(f"A20 a reward of {value}", "train", gives(value),
               f"--loss grpo {online} --reward rule:f", f"rule:f; {told}", "K")
          for value, told in (("float('nan')", "nan"), ("None", "None"), ("'0.5'", "0.5"),
                              ("1 / 0", "ZeroDivisionError; rule.py:2"), ("[1]", "[1]"))),
        Case("A20 a reward beyond 1", "train", gives("2"), f"--loss una_online {online} "
             "--reward rule:f", "rule:f; 2 to 2; --una_target reward", "K"),
        Case("A20 prompts without answers", "train", write(
            "data.jsonl", "".join(f'{{"prompt": "Say {i}."}}\n' for i in range(9))),
            f"--loss grpo {online} --reward exact", "exact; no answer", "K"),
        Case("A20 prompts alone are for losses that sample", "train", write(
            "data.jsonl", "".join(f'{{"prompt": "Say {i}."}}\n' for i in range(9))), "--loss sft",
            "nothing is left; a prompt without a response"),
        Case("A20 prompts alone are sampled from", "train", several(gives("len(response)"), write(
            "data.jsonl", "".join(f'{{"prompt": "Say {i}."}}\n' for i in range(9)))),
            f"--loss rloo {online} --reward rule:f", "reward", "V")]


def broken_pipe(place: Path) -> None:
    """Who read the output has gone, as `head -1` does."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def surroundings() -> list[Case]:
    """A16 to A19: where and how a command is started."""
    def elsewhere(place: Path) -> None:
        (place / "else").mkdir()
        os.chdir(place / "else")

    def no_home(place: Path) -> None:
        for name in ("HOME", "TERM", "PATH", "LANG"):
            os.environ.pop(name, None)

    def zone(place: Path) -> None:
        os.environ["TZ"] = "Pacific/Kiritimati"

    out, accents = [], "d\u00e9j\u00e0 vu.jsonl".encode()
    for program, said in (("train", "adapter"), ("evaluate", "uft_loss"), ("generate", "")):
        out += [Case(f"A18 another folder, {program}", program, elsewhere, "", said, "V"),
                Case(f"A18 no home and no terminal, {program}", program, no_home, "", said, "V"),
                Case(f"A18 another time zone, {program}", program, zone, "", said, "V")]
    return [*out,
            Case("A19 nobody reads what evaluate says", "evaluate", broken_pipe, "", "", "K"),
            Case("A19 nobody reads what generate says", "generate", broken_pipe, "", "", "K"),
            Case("A19 nobody reads what train says", "train", broken_pipe, "", "", "K"),
            Case("A18 names relative to the folder", "evaluate", None,
                 "ONLY --model model --data data.jsonl --template plain", "40 rows", "V"),
            Case("A18 a name with blanks and accents", "evaluate", lambda p: os.link(
                os.fsencode(p / "data.jsonl"), os.fsencode(p) + b"/" + accents),
                f"--data 'DIR/{os.fsdecode(accents)}'", "40 rows", "V"),
            Case("A18 a name that is no UTF-8", "evaluate", lambda p: os.link(
                os.fsencode(p / "data.jsonl"), os.fsencode(p) + b"/\xff.jsonl"),
                "--data 'DIR/\udcff.jsonl'", "40 rows", "W")]


def cases() -> list[Case]:
    return [*numbers("train", TRAIN), *numbers("evaluate", EVALUATE), *words(), *good(),
            *folders(), *losses(), *rollouts(), *surroundings()]
