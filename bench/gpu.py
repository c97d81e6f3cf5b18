"""A UFT training step on one GPU: speed, share of its peak rate and memory, beside a plain loop.

    python -m bench.gpu                                     both large shapes; needs a GPU
    python -m bench.gpu --shape small --device cpu          only to see that it runs

A process a driver, so that memory is the process's own: ours (gpu_step.py), then the loop on
transformers and PEFT (gpu_peer.py) on the same weights and rows where both are installed. A driver
that runs out of memory says so in its row. Writes a JSON file and prints its table.
"""
import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench import gpu_step, run

PROGRAMS = {"ours": ("gpu_step",), "loop, full head": ("gpu_peer", "--head", "full"),
            "loop, response head": ("gpu_peer", "--head", "response")}
PASSED = ("rows", "length", "steps", "warmup", "micro_batch_tokens", "dtype", "device")
PEAK = {  # dense bf16 TFLOP/s by the maker's data sheets; the first name that occurs counts
    "H200 NVL": 835, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
    "B200": 2250, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}
COUNTED = """\
Tokens are those of the rows, without padding. FLOPs are those that the step needs, as
bench/floor.py counts them, the same for every driver: the reference's forward pass, the policy's,
the policy's again for checkpointing, the gradient of the activations (2 a weight and token each;
frozen weights have no gradient), the adapters' gradient, attention, and the head on scored
positions alone in all but the second forward. `MFU` is their rate over the peak rate of the device;
`MFU, once` leaves the second forward out. Figures are medians of the steps that count. Memory is
the most that torch had allocated; without a GPU, the most that the process took.
"""


def peak_tflops(device: str) -> float | None:
    """The dense bfloat16 rate of a device by its name, None where it is not in PEAK."""
    return next((rate for name, rate in PEAK.items() if name in device), None)


def measure(driver: str, shape: str, options: argparse.Namespace) -> dict:
    """The line of one process with its shares of the peak rate, or with its `error`."""
    module, *own = PROGRAMS[driver]
    flags = [f"--{name}={getattr(options, name)}" for name in PASSED]
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, "-m", f"bench.{module}", *own, "--shape", shape, *flags],
            cwd=run.ROOT, env=run.environment(home), capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"driver": driver, "model": shape, "error": said}
    return with_mfu(json.loads(done.stdout.strip().splitlines()[-1]), options.peak_tflops)


def with_mfu(line: dict, peak: float | None) -> dict:
    """The line, `mfu` and `mfu_once` added: None where the device's peak rate is not known."""
    if "error" in line:
        return line
    peak = peak or peak_tflops(line["device"])
    shares = {name: peak and line[rate] / peak
              for name, rate in (("mfu", "tflops"), ("mfu_once", "tflops_once"))}
    return run.shortened(line | {"peak_tflops": peak} | shares)


def drivers(peers: bool) -> list[str]:
    """Names of PROGRAMS, ours first; the loops only if asked for and where they can run."""
    found = all(importlib.util.find_spec(name) for name in ("transformers", "peft"))
    return [name for name in PROGRAMS if name == "ours" or peers and found]


def versions() -> dict[str, str]:
    """Of what is installed of the packages a driver stands on."""
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    names = ("torch", "transformers", "peft")
    return {name: importlib.metadata.version(name) for name in names if name in installed}


def cells(line: dict) -> list[str]:
    """A line as a row of the table; an error stands in the place of the speed."""
    if "error" in line:
        return [line["model"], line["driver"], line["error"], *["-"] * 6]
    shares = (line[name] for name in ("mfu", "mfu_once"))
    return [line["model"], line["driver"], f"{line['tokens_per_second']:.0f}",
            f"{line['seconds_per_step']:.3g}",
            *("-" if share is None else f"{share:.1%}" for share in shares),
            f"{line['peak_gib']:.1f}", f"{line['losses'][0]:.6f}", f"{line['first_logps']:.2f}"]


def page(record: dict) -> str:
    """What is printed, a function of the JSON alone. A line whose work differs is named."""
    lines = record["lines"]
    first = next((d for d in lines if "device" in d), {"device": "no driver ran"})
    told = "".join(f", {name} {number}" for name, number in record["versions"].items())
    work = "{rows} rows a step of {length} tokens at most, {dtype}".format(**record["options"])
    heads = ["shape", "driver", "tokens/s", "s/step", "MFU", "MFU, once", "peak GiB",
             "first loss", "first log-prob"]
    parts = [f"{first['device']}{told}\n{work}\n", run.table(heads, [cells(d) for d in lines])]
    for line in (d for d in lines if "error" not in d):
        ours = next(d for d in lines if d["model"] == line["model"] and "error" not in d)
        if why := why_void(ours, line):
            parts.append(f"Void: {line['model']}, {line['driver']}: {why}.\n")
    return "\n".join([*parts, COUNTED])


def why_void(left: dict, right: dict) -> str:
    """"" where both did the same work, which UFT's first loss alone, fixed by the scores, cannot
    tell: also the first log-probs agree to bfloat16's rounding."""
    a, b = left["first_logps"], right["first_logps"]
    return run.why_void(left, right) or (
        f"first log-probs {a:g} and {b:g}" if abs(a - b) > 2e-3 * abs(a) else "")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Exits with code 2 and a sentence where there is no GPU to measure."""
    parser = gpu_step.parser(__doc__)
    parser.add_argument("--shape", nargs="+", choices=gpu_step.SHAPES,
                        default=["mistral-7b", "qwen2.5-32b"])
    parser.add_argument("--peak_tflops", type=float, help="dense bf16; default: by device name")
    parser.add_argument("--no_peers", action="store_true", help="ours alone")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gpu.json"), metavar="FILE")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"bench.gpu: torch {torch.__version__} finds no CUDA device here: run it "
                       "where there is one, or give --device cpu to try it out\n")
    return options


def main(argv: list[str] | None = None) -> None:
    options, lines = parse(argv), []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": "python -m bench.gpu", "counted": COUNTED, "versions": versions(),
              "options": {name: getattr(options, name) for name in PASSED}, "lines": lines}
    for shape in options.shape:
        for driver in drivers(not options.no_peers):
            lines.append(measure(driver, shape, options))
            said = lines[-1].get("error") or f"{lines[-1]['tokens_per_second']:.0f} tokens/s"
            print(f"{shape}, {driver}: {said}", file=sys.stderr, flush=True)
            options.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")  # may be stopped
    print(page(record), end="")


if __name__ == "__main__":
    main()
