"""Everything a run depends on: one frozen dataclass, whose fields are the flags of train.py."""
import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch

from command import Parser, check, low_high, number, stop, whole
from peft_config import TARGETS

BETA_ZERO = ("rloo", "grpo", "ppo", "uft_hint", "uniapl")  # their KL may be left out
REPEATED = ("data", "test")  # flags given once for every file
GROUPS = {  # of --help, by their first flag
    "model": "what is trained, on what, and asked", "loss": "the step", "lora_r": "adapters",
    "label_smoothing": "single losses", "reward": "rollouts, for losses that sample",
    "dtype": "the machine and the run"}


def flag(default: object, text: str) -> object:
    """A Config field with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. The flags of the command line are these fields."""

    model: str = flag("", "model folder or Hugging Face id")
    data: tuple[str, ...] = flag((), "FILE or FILE:WEIGHT, repeatable; WEIGHT is passes per epoch")
    test: tuple[str, ...] = flag((), "FILE of questions asked before and after, repeatable")
    template: str = flag("checkpoint", "how conversations are written: %(choices)s")
    max_length: int = flag(2048, "tokens of prompt and response; longer rows are dropped")
    truncate_prompt: bool = flag(False, "cut long prompts from the left instead")
    score_range: tuple[float, float] = flag((0.0, 1.0), "LOW,HIGH of a `score` column")
    held_out: int = flag(64, "rows kept aside, by prompt, to measure before and after")
    loss: str = flag("uft", "what to minimise: %(choices)s")
    beta: float = flag(0.01, "scale of the implicit reward, or weight of a KL (paper: 0.01)")
    lr: float = flag(3e-5, "peak learning rate (paper: 3e-5)")
    warmup: float = flag(0.1, "share of the steps spent warming up, before a cosine to zero")
    batch_size: int = flag(8, "loss terms a step: rows, pairs, or prompts")
    micro_batch_tokens: int = flag(8192, "tokens a forward pass; changes no gradient")
    epochs: float = flag(1.0, "passes over the data, if --steps is 0")
    steps: int = flag(0, "optimizer steps")
    weight_decay: float = flag(0.0, "AdamW's")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    lora_r: int = flag(16, "rank (paper: 16)")
    lora_alpha: float = flag(16.0, "scale times rank")
    lora_dropout: float = flag(0.0, "dropout before the adapters; ratios are then not 1 at first")
    lora_targets: tuple[str, ...] = flag(TARGETS, "layers to adapt, or all-linear")
    lora_l1: float = flag(0.0, "weight of the sum of |scale B A|: a sparse update, as in PAFT")
    label_smoothing: float = flag(0.0, "dpo: probability that a preference is wrong")
    desirable_weight: float = flag(1.0, "kto: weight of good rows")
    undesirable_weight: float = flag(1.0, "kto: weight of bad rows")
    orpo_weight: float = flag(0.1, "orpo: weight of the odds ratio")
    simpo_gamma: float = flag(0.5, "simpo: margin")
    center_rewards: float = flag(0.0, "reward_model: weight of (score chosen + rejected)^2")
    reward: str = flag("", "exact, a reward model's folder, or MODULE:FUNCTION")
    group: int = flag(8, "responses to each prompt")
    response_tokens: int = flag(64, "longest response")
    temperature: float = flag(1.0, "of the sampling, and of every log-prob in the loss")
    updates: int = flag(1, "optimizer updates a step, on the same responses")
    clip: float = flag(0.2, "how far a probability ratio may leave 1; ppo: and V its old value")
    anchor: str = flag("ref", "una_online: r_theta is measured from %(choices)s")
    una_target: str = flag("score", "una_online: %(choices)s: sigmoid(r_theta), or r_theta")
    grpo_scale: str = flag("group", "grpo and kin: std below the advantage, of %(choices)s")
    grpo_length: str = flag("row", "grpo and kin: below a row's sum over tokens, %(choices)s")
    ppo_gamma: float = flag(1.0, "ppo: discount per token")
    ppo_lam: float = flag(0.95, "ppo: lambda of GAE")
    ppo_value_weight: float = flag(0.1, "ppo: weight of the value loss")
    hint_low: float = flag(0.05, "uft_hint: share of a solution that is given, at the end")
    hint_high: float = flag(0.95, "uft_hint: the same at the start")
    hint_steps: int = flag(300, "uft_hint: steps until no hint is given any more")
    hint_parts: int = flag(5, "uft_hint: parts of a solution, a binomial number of them given")
    hint_weight: float = flag(0.001, "uft_hint: weight of the log-likelihood of a hint")
    discriminator_weight: float = flag(0.1, "uniapl: weight of the discriminator in the reward")
    sft_weight: float = flag(0.1, "uniapl: weight of a demonstration's log-likelihood")
    dtype: str = flag("float32", "of the frozen weights: %(choices)s")
    device: str = flag("cpu", "cpu, cuda or mps")
    gradient_checkpointing: bool = flag(False, "less memory, one more forward pass")
    sample_tokens: int = flag(48, "length of the three samples, and of answers to --test")
    save_every: int = flag(500, "steps between checkpoints; 0: only one, at the end")
    keep: int = flag(2, "newest checkpoints kept, 2 or more")
    timeout: float = flag(600.0, "seconds that one of several processes waits for another")
    resume: bool = flag(False, "go on from the newest checkpoint in --out")
    reference_cache: str = flag("", "DIR that keeps log-probs of the reference between runs")
    memory_estimate: bool = flag(False, "say what the run would hold, and end")
    seed: int = flag(0, "of adapters, order, dropout and what is held out")
    out: str = flag("", "run folder; default: the next free runs/NNNN")

    def __post_init__(self) -> None:
        """ValueError names the flag."""
        check(self, (
            ("something", bool, "model data"),
            ("0 to 1", lambda x: 0 <= x <= 1, "warmup ppo_gamma ppo_lam hint_low hint_high"),
            ("0 to below 1", lambda x: 0 <= x < 1, "lora_dropout"),
            ("0 to below 1/2", lambda x: 0 <= x < 0.5, "label_smoothing"),
            ("2 or more", lambda x: x > 1, "max_length keep"),
            ("1 to 65536", lambda x: 0 < x <= 2**16,
             "batch_size lora_r response_tokens updates hint_parts group"),
            ("a number above 0, up to 10^9", lambda x: 0 < x <= 1e9,
             "epochs micro_batch_tokens timeout"),
            ("a number above 0, up to 10^30", lambda x: 0 < x <= 1e30,
             "lora_alpha max_grad_norm lr temperature clip"
             + " beta" * (self.loss not in BETA_ZERO)),
            ("0 to 10^9", lambda x: 0 <= x <= 1e9,
             "steps held_out sample_tokens save_every seed hint_steps"),
            ("0 or more, up to 10^30", lambda x: 0 <= x <= 1e30,
             ("beta weight_decay lora_l1 desirable_weight undesirable_weight orpo_weight "
              "simpo_gamma center_rewards ppo_value_weight hint_weight discriminator_weight "
              "sft_weight")),
            ("two numbers LOW,HIGH with LOW < HIGH", is_range, "score_range")))


def is_range(x: tuple) -> bool:
    return len(x) == 2 and -math.inf < x[0] < x[1] < math.inf


def check_device(name: str) -> None:
    """ValueError where torch, as it is installed here, cannot use the device."""
    try:
        if torch.empty(0, device=name).device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("expected cpu, cuda or mps")
    except (RuntimeError, AssertionError, ImportError) as error:
        what = str(error).split("\n")[0]
        raise ValueError(f"--device {name} cannot be used here: {what}; try --device cpu") from None


def boolean(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")
    return text == "true"


def parse_flags(argv: Sequence[str] | None, choices: dict[str, Sequence[str]]) -> Config:
    """The Config that a command line spells: REPEATED flags repeat, other tuples have commas.

    choices limits flags to the names given. Exits with code 2 and a sentence on a wrong flag.
    """
    parser = group = Parser(
        "train.py", "train.py --model DIR --data FILE [--FLAG VALUE ...]", allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=100))
    read = {bool: (boolean, "BOOL"), int: (whole, "N"), float: (number, "X"), str: (str, "NAME"),
            tuple[str, ...]: (lambda text: tuple(text.split(",")), "A,B"),
            tuple[float, float]: (low_high, "LOW,HIGH")}
    for f in fields(Config):
        (kind, shape), default = read[f.type], f.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        if f.name in REPEATED:
            kind, shape, default = str, "FILE", []
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        group.add_argument(
            f"--{f.name}", default=default, type=kind, metavar=shape, choices=choices.get(f.name),
            action="append" if f.name in REPEATED else "store",
            help=f.metadata["help"] + f" [{str(shown).lower()}]" * (shown != ""))
    given = vars(parser.parse_args(argv))
    try:
        return Config(**given | {name: tuple(given[name]) for name in REPEATED})
    except ValueError as error:
        stop(parser.prog, error)
