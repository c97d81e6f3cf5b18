"""--reward: what a sampled response earns, any real number; UFT's own losses want it in [0, 1].

    exact             1 where the response ends as the record's answer does, else 0
    DIR               a reward model: a run of --loss reward_model, its adapter, or a Hugging Face
                      folder of ...ForSequenceClassification with one label
    MODULE:FUNCTION   FUNCTION(prompt, response, answer) -> number, of the last turn's text

A Reward is called with prompts (messages), responses and answers (texts), and gives their numbers.
"""
import importlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import data
import lora
import model
import scoring
import strict
import tokens
from config import Config

Reward = Callable[[Sequence[data.Messages], Sequence[str], Sequence[str]], list[float]]


def final(text: str) -> str:
    """What follows the last ####, as in GSM8K, else the whole text; blanks and commas in numbers
    do not count."""
    said = text.rpartition("####")[2].strip()
    return re.sub(r"(?<=\d),(?=\d{3})", "", said)


def each(function: Callable[[str, str, str], float], name: str) -> Reward:
    """A Reward that asks `function` about one response at a time.   ValueError for no number."""
    def reward(prompts: Sequence, responses: Sequence[str], answers: Sequence[str]) -> list[float]:
        """One number each; a response is shown where its number is none."""
        out = []
        for prompt, response, answer in zip(prompts, responses, answers, strict=True):
            earned = function(prompt[-1][1], response, answer)
            if not isinstance(earned, int | float) or not math.isfinite(earned):
                raise ValueError(f"--reward {name}: {strict.show(earned)} is what it gives the "
                                 f"response {strict.show(response)}, expected a finite number")
            out.append(float(earned))
        return out

    return reward


class RewardModel:
    """r_phi(x, y) of a folder, with its own tokenizer and template: text in, scores out."""

    def __init__(self, folder: Path, config: Config) -> None:
        base, adapter = sources(folder)
        self.chat = tokens.Chat(base, "checkpoint", adapter)
        self.net = model.load(base, getattr(torch, config.dtype), config.device, judge=True)
        if adapter:
            lora.load(self.net.eval(), adapter)  # its dropout is for training
        if not hasattr(self.net, "score"):
            raise ValueError(f"--reward {folder} has no score head: expected a run of --loss "
                             "reward_model, or a folder of ...ForSequenceClassification")
        self.budget = config.micro_batch_tokens
        self.longest = self.net.config.max_position_embeddings

    @torch.no_grad()
    def __call__(self, prompts: Sequence[data.Messages], responses: Sequence[str],
                 answers: Sequence[str]) -> list[float]:
        """A response too long for the model is judged behind the end of its prompt that fits."""
        texts = zip(prompts, responses, answers, strict=True)
        rows = [tokens.encode(data.Example(p, r, 1.0, "scored", "a response", a), self.chat,
                              self.longest, truncate_prompt=True) for p, r, a in texts]
        groups = tokens.micro_batches([(row,) for row in rows], self.budget)
        return [score for group in groups for score in scoring.judge(
            self.net, tokens.collate([e for e, in group])).tolist()]


def sources(folder: Path) -> tuple[Path, Path | None]:
    """(model folder, adapter folder or None) of a run, an adapter or a model."""
    inner = folder / "adapter" if (folder / "adapter").is_dir() else folder
    if not (inner / "adapter_config.json").is_file():
        return inner, None
    base = strict.read_json(inner / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{inner / 'adapter_config.json'} names no base_model_name_or_path")
    return model.resolve(base), inner


def load(config: Config) -> Reward:
    """The Reward that --reward names.   ValueError where there is none."""
    name, (module, colon, function) = config.reward, config.reward.rpartition(":")
    if name == "exact":
        return each(lambda _, response, answer: float(final(response) == final(answer)), name)
    if Path(name).is_dir():
        return RewardModel(Path(name), config)
    if not colon or not re.fullmatch(r"[\w.]+", module):
        raise ValueError(f"--reward: found {strict.show(name)}, expected exact, a folder, or "
                         "MODULE:FUNCTION")
    if "" not in sys.path:
        sys.path.append("")  # modules of the folder that the command is given in
    try:
        return each(getattr(importlib.import_module(module), function), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--reward {name} cannot be imported: {error}") from None
