"""What the benchmark runs on: seeded checkpoints, a made-up language and its tokenizer, and rows.

Weights are random, so no number here says anything about quality; sizes and lengths are what
counts. A folder written here opens in this repository and in transformers alike.

    python -m bench.work small wide     makes runs/bench/small and runs/bench/wide
"""
import itertools
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import model

CONTROL = ("<unk>", "<s>", "</s>", "<pad>")
LONGEST_VOCABULARY = 8192  # of the tokenizer; a wider head has rows that no text reaches
CONSONANTS = "b c d f g h j k l m n p r s t v w z ch sh th st tr pr".split()
VOWELS = "a e i o u ai ea ou".split()
FOLDER, ROWS = Path("runs/bench"), 256  # where models go, and rows of every file
PROMPT, RESPONSE = (20, 90, 400), (20, 170, 600)  # least, median and most tokens
FILES = {"uft": "scores", "sft": "demonstrations", "dpo": "pairs", "kto": "labels"}


class Shape(NamedTuple):
    """A Qwen2 with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    groups: int
    intermediate: int
    vocabulary: int


SHAPES = {
    "tiny": Shape(32, 2, 4, 2, 48, 512),  # for tests
    "small": Shape(512, 8, 8, 4, 1152, 8192),
    "wide": Shape(320, 6, 5, 1, 1728, 151936),  # the proportions of Qwen2.5-0.5B
}


def config(shape: Shape) -> dict:
    """The config.json of a shape."""
    return {
        "model_type": "qwen2", "vocab_size": shape.vocabulary, "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.groups,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": True,
        "max_position_embeddings": 4096, "use_sliding_window": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


def weights(shape: Shape, seed: int) -> model.Transformer:
    """Random bfloat16 weights: matrices N(0, 1 / inputs), embeddings N(0, .01), norms near 1.

    Spread enough that every earlier token moves the loss: a leak or a shift changes it.
    """
    net = model.Transformer(model.ModelConfig.from_dict(config(shape)))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in net.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            noise = 1 + 0.1 * noise
        elif "embed" in name or "bias" in name:
            noise = 0.1 * noise
        else:
            noise = noise / math.sqrt(weight.shape[1])
        weight.data = noise.to(torch.bfloat16)
    return net


def vocabulary(count: int = 30000, seed: int = 1234) -> list[str]:
    """`count` made-up words, short ones first; word i is said with probability ~ 1 / (i + 3)."""
    draw, seen = random.Random(seed), {}
    while len(seen) < count:
        longer = draw.random() < min(0.9, 0.2 + len(seen) / 4000)
        syllables = 1 + longer + (draw.random() < 0.4) + (draw.random() < 0.15)
        seen["".join(draw.choice(CONSONANTS) + draw.choice(VOWELS)
                     + (draw.choice("nrslt") if draw.random() < 0.3 else "")
                     for _ in range(syllables))] = True
    return list(seen)


def speaker(draw: random.Random) -> Iterator[str]:
    """Words of the made-up language for ever, Zipf-distributed."""
    said = vocabulary()
    frequency = list(itertools.accumulate(1 / (i + 3) for i in range(len(said))))
    while True:
        yield from draw.choices(said, cum_weights=frequency, k=1000)


def make_tokenizer(size: int, seed: int) -> Tokenizer:
    """A byte-level BPE of at most `size` entries, trained on `size` lines of 60 words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, special=True) for t in CONTROL])
    words = speaker(random.Random(seed))
    made.train_from_iterator(
        [" ".join(itertools.islice(words, 60)) + "." for _ in range(size)], trainer)
    return made


def write_model(out: Path, shape: Shape, seed: int = 0) -> None:
    """A folder as downloaded from Hugging Face: config, bfloat16 weights, tokenizer."""
    model.save(weights(shape, seed), out)
    made = make_tokenizer(min(shape.vocabulary, LONGEST_VOCABULARY), seed)
    made.save(str(out / "tokenizer.json"))
    for name, value in {
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>",
                "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
                "model_max_length": 4096, "clean_up_tokenization_spaces": False},
            "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    }.items():
        (out / name).write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def length(draw: random.Random, least: int, median: int, most: int) -> int:
    """exp(N(log median, .7)), drawn again until it lies in least .. most."""
    while True:
        tokens = round(math.exp(draw.gauss(math.log(median), 0.7)))
        if least <= tokens <= most:
            return tokens


def text(words: Iterator[str], cost: dict[str, int], lead: str, tokens: int) -> str:
    """`lead`, words and a full stop of exactly `tokens` tokens; a word that is too long waits.

    cost is the tokens of a word behind a space. A word, a colon and the stop never merge.
    """
    said, left = lead, tokens - len(lead) - 1  # each character of a lead is a token
    while left > 0:
        word = next(words)
        if cost[word] <= left:
            said, left = f"{said} {word}", left - cost[word]
    return said + "."


def make_rows(tokenizer: Tokenizer, count: int, seed: int = 0) -> dict[str, list[dict]]:
    """{file: rows}, all about the same prompts; lengths as PROMPT and RESPONSE say.

    A response counts the end token that training appends to it.
    """
    draw, said = random.Random(seed), vocabulary()
    words = speaker(random.Random(seed + 1))
    encoded = tokenizer.encode_batch([" " + w for w in said], add_special_tokens=False)
    cost = {w: len(e.ids) for w, e in zip(said, encoded, strict=True)}
    rows = {name: [] for name in FILES.values()}
    for _ in range(count):
        prompt = text(words, cost, "Q:", length(draw, *PROMPT))
        good, bad = (text(words, cost, "", length(draw, *RESPONSE) - 1) for _ in range(2))
        label, score = draw.random() < 0.5, round(draw.random(), 3)
        rows["scores"].append({"prompt": prompt, "response": good, "score": score})
        rows["demonstrations"].append({"prompt": prompt, "completion": good})
        rows["pairs"].append({"prompt": prompt, "chosen": good, "rejected": bad})
        rows["labels"].append({"prompt": prompt, "completion": good if label else bad,
                               "label": label})
    return rows


def make(name: str, folder: Path, rows: int = ROWS) -> Path:
    """folder/NAME with the checkpoint and its data files, written where missing; returns it."""
    out = folder / name
    if not (out / "done").exists():
        out.mkdir(parents=True, exist_ok=True)
        write_model(out, SHAPES[name])
        made = make_rows(Tokenizer.from_file(str(out / "tokenizer.json")), rows)
        for file, lines in made.items():
            (out / f"{file}.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        (out / "done").touch()
    return out


def main() -> None:
    for name in sys.argv[1:]:
        make(name, FOLDER)


if __name__ == "__main__":
    main()
