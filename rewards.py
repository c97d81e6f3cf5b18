"""--reward: what a sampled response earns, any real number; UFT's own losses want it in [0, 1].

    exact             1 where the response ends as the record's answer does, behind the last ####
                      if there is one, else 0
    DIR               a reward model: a run of --loss reward_model, its adapter, or a Hugging Face
                      folder of ...ForSequenceClassification with one label
    MODULE:FUNCTION   FUNCTION(prompt, response, answer) -> number, of the last turn's text

A Reward is called with prompts (messages), responses and answers (texts), and gives their numbers.
"""
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import data
import durable
import lora
import model
import scoring
import strict
import tokens
import verifiers
from config import Config

Reward = Callable[[Sequence[data.Messages], Sequence[str], Sequence[str]], list[float]]


class RewardModel:
    """r_phi(x, y) of a folder, with its own tokenizer and template: text in, scores out.

    sigmoid(r_phi) where una_online compares it with sigmoid(r_theta).   UNA 2.3.4
    """

    def __init__(self, folder: Path, config: Config) -> None:
        base, adapter = sources(folder)
        self.chat = tokens.Chat(base, "checkpoint", adapter)
        self.net = model.load(base, getattr(torch, config.dtype), config.device, judge=True)
        if adapter:
            lora.load(self.net.eval(), adapter)  # its dropout is for training
        if not hasattr(self.net, "score"):
            raise ValueError("it has no score head: expected a run of --loss reward_model, or a "
                             "folder of ...ForSequenceClassification")
        self.squashed = config.loss == "una_online" and config.una_target == "score"
        self.budget = config.micro_batch_tokens
        self.longest = self.net.config.max_position_embeddings

    @torch.no_grad()
    def __call__(self, prompts: Sequence[data.Messages], responses: Sequence[str],
                 answers: Sequence[str]) -> list[float]:
        """A response too long for the model is judged behind the end of its prompt that fits.

        ValueError where nothing of the prompt does. A response that was cut is given an end token.
        """
        asked = zip(prompts, responses, answers, strict=True)
        rows, lost = tokens.encode_all([data.Example(p, r, 1.0, "scored", strict.show(r), a)
                                        for p, r, a in asked], self.chat, self.longest, True)
        if lost:
            raise ValueError(f"the reward model cannot read the response {lost[0]['where']}: "
                             f"{lost[0]['reason']}: lower --response_tokens")
        groups = tokens.micro_batches([(row,) for row in rows], self.budget)
        scores = torch.cat([scoring.judge(self.net, tokens.collate([e for e, in group]))
                            for group in groups])
        return (scores.sigmoid() if self.squashed else scores).tolist()


def sources(folder: Path) -> tuple[Path, Path | None]:
    """(model folder, adapter folder or None) of a run, an adapter or a model."""
    inner = folder / "adapter" if (folder / "adapter").is_dir() else folder
    if inner == folder and (folder / "metrics.jsonl").is_file():
        raise ValueError("this run has not ended: it has no adapter yet")
    if not (inner / "adapter_config.json").is_file():
        return inner, None
    base = strict.read_json(inner / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{inner / 'adapter_config.json'} names no base_model_name_or_path")
    return model.resolve(base), inner


def load(config: Config) -> Reward:
    """The Reward that --reward names.   ValueError where there is none."""
    name = config.reward
    if name != "exact" and Path(name).is_dir():
        try:
            return RewardModel(Path(name), config)
        except ValueError as error:
            raise ValueError(f"--reward {name}: {error}") from None
    return verifiers.each(verifiers.found(name), name)


def inputs(name: str) -> dict[str, str]:
    """{what: SHA-256} of every file of a loaded --reward: a run that goes on needs the same."""
    if not name or name == "exact":
        return {}
    if not Path(name).is_dir():
        path = getattr(sys.modules[name.rpartition(":")[0]], "__file__", None)
        return {verifiers.RULE + name: durable.digests([Path(path)])[0]} if path else {}
    paths = [path for folder in sources(Path(name)) if folder for path in sorted(folder.iterdir())
             if path.suffix in (".json", ".jinja", ".safetensors")]
    return {f"reward file {path.parent.name}/{path.name}": digest
            for path, digest in zip(paths, durable.digests(paths), strict=True)}
