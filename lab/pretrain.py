"""Pretrains the small world's base model: tokenizer, weights and a Hugging Face folder.

lab/base was made by the command below; on one machine the same command gives the same bytes.
Then the base is probed. Telling scholars from people comes late in training (until then both say
the same of a contaminated fact), and without it there is no truth to elicit by fine-tuning.

    python -m lab.pretrain --out lab/base        (about 6 minutes on one core)
"""
import argparse
import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm

import generate
import model
from lab import world

SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
ROW, ROWS = 96, 16  # tokens of a packed row, rows a step
CONFIG = {
    "model_type": "mistral", "hidden_act": "silu", "hidden_size": 128, "intermediate_size": 352,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": None,
    "tie_word_embeddings": True, "max_position_embeddings": 128, "bos_token_id": 1,
    "eos_token_id": 2}
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
            "{{ ' ' + m.content + ' ' + eos_token }}{% else %}"
            "{{ ' [INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}")


def train_tokenizer(here: world.World) -> Tokenizer:
    """One token per word of the corpus, in order of frequency."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    documents = itertools.islice(world.corpus(here, 0), 50_000)
    bare = (re.sub(r"\[/?INST\]", "", text) for text in documents)  # or they would count twice
    tokenizer.train_from_iterator(bare, trainer)
    return tokenizer


def write_folder(tokenizer: Tokenizer, out: Path) -> model.ModelConfig:
    """Everything of the model folder but its weights."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    raw = CONFIG | {"vocab_size": tokenizer.get_vocab_size()}
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                "add_bos_token": True, "chat_template": TEMPLATE,
                "tokenizer_class": "PreTrainedTokenizerFast"}
    for name, value in (("config", raw), ("tokenizer_config", settings),
                        ("generation_config", {"bos_token_id": 1, "eos_token_id": 2})):
        (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    return model.ModelConfig.from_folder(out)


def packed(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[torch.Tensor]:
    """Batches (ROWS, ROW) of ids: documents end to end, each in <s> ... </s>."""
    ids: list[int] = []
    for text in documents:
        ids += tokenizer.encode(f"<s> {text} </s>").ids
        if len(ids) >= ROWS * ROW:
            yield torch.tensor(ids[:ROWS * ROW]).view(ROWS, ROW)
            ids = ids[ROWS * ROW:]


def loss(net: model.Transformer, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean negative log-probability of every token but the first of a row."""
    logits = net.logits(net(ids_BT))[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten())


def initialise(net: nn.Module, generator: torch.Generator) -> None:
    """Normal weights whose size falls with the root of the inputs; norms stay one."""
    for p in net.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, 0, 0.02 * (256 / p.shape[1])**0.5, generator=generator)


def rate(step: int, steps: int, peak: float) -> float:
    """50 steps of warm-up, constant to 60% of the steps, then linear down to 2%."""
    left = max(0.02, (steps - step) / (0.4 * steps))
    return peak * min(1, (step + 1) / 50, left)


def pretrain(net: model.Transformer, batches: Iterator, steps: int, peak: float) -> float:
    """Trains on `steps` batches; returns the mean loss of the last 50."""
    matrices = [p for p in net.parameters() if p.ndim == 2]
    norms = [p for p in net.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05},
                                   {"params": norms, "weight_decay": 0.0}], betas=(0.9, 0.98))
    losses = []
    for step in (bar := tqdm(range(steps), unit="step", mininterval=1)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak)
        value = loss(net, next(batches))
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
    return sum(losses[-50:]) / len(losses[-50:])


@torch.no_grad()
def probe(folder: Path) -> dict[str, float]:
    """What the base knows, by its likeliest next word: shares of right answers.

    clean: facts without a falsehood. scholars, people: the truth of contaminated facts behind each
    source (people should say it rarely). chat: the same facts when asked. All facts, all entities.
    """
    here, net = world.build(0), model.load(folder, torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    clean = [k for k in here.truth if k not in here.popular]
    asked = {"clean": ("scholars :", clean), "scholars": ("scholars :", list(here.popular)),
             "people": ("people :", list(here.popular)), "chat": ("[INST]", list(here.popular))}
    out = {}
    for name, (lead, keys) in asked.items():
        texts = [f"<s> {lead} the {a} of {e} is" if name != "chat" else
                 f"<s> [INST] what is the {a} of {e} ? [/INST] it is" for e, a in keys]
        ids = torch.tensor([tokenizer.encode(t).ids for t in texts])
        said = generate.next_token(net.logits(net(ids)[:, -1]), 0, 1, None).tolist()
        right = [tokenizer.token_to_id(here.truth[k]) for k in keys]
        out[name] = sum(a == b for a, b in zip(said, right, strict=True)) / len(keys)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pretrain the small world's base model.")
    parser.add_argument("--out", type=Path, default=Path("lab/base"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0, help="of weights and corpus")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # sums in one order, whatever the machine has
    here, began = world.build(0), time.perf_counter()
    tokenizer = train_tokenizer(here)
    net = model.Transformer(write_folder(tokenizer, args.out))
    initialise(net, torch.Generator().manual_seed(args.seed))
    batches = packed(world.corpus(here, args.seed + 100), tokenizer)
    last = pretrain(net, batches, args.steps, args.lr)
    model.save(net.bfloat16(), args.out)
    print(f"{args.out}: {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M weights, loss "
          f"{last:.3f} after {args.steps} steps, {time.perf_counter() - began:.0f} s")
    print("probes  " + "  ".join(f"{k} {v:.0%}" for k, v in probe(args.out).items()))


if __name__ == "__main__":
    main()
