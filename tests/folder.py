"""A model folder and data files small enough for every command to run in a second.

The folder is what a user would download: config.json, model.safetensors, tokenizer.json,
tokenizer_config.json, generation_config.json; its vocabulary is a byte-level BPE trained here.
"""
import json
from pathlib import Path

import tiny
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import model

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def questions():
    """Forty prompts and answers that all differ."""
    return [(f"Say {a} and {b}.", f"{a} {b}") for i, a in enumerate(NUMBERS)
            for b in NUMBERS[i + 1:]][:40]


def rows():
    """The lines of each data file."""
    asked = questions()
    return {
        "demonstrations": [{"prompt": q, "response": a} for q, a in asked],
        "scores": [{"prompt": q, "response": a + "!" * (i % 3), "score": i % 5 / 4}
                   for i, (q, a) in enumerate(asked)],
        "pairs": [{"prompt": q, "chosen": a, "rejected": a[::-1]} for q, a in asked],
        "labels": [{"prompt": q, "completion": a, "label": i % 3 > 0}
                   for i, (q, a) in enumerate(asked)],
    }


def write_files(out: Path) -> Path:
    """out/demonstrations.jsonl, scores.jsonl, pairs.jsonl and labels.jsonl."""
    out.mkdir(parents=True)
    for name, lines in rows().items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (out / f"{name}.jsonl").write_text(text, "utf-8")
    return out


def tokenizer() -> Tokenizer:
    """Bytes and a few merges; <s>, </s>, <|im_start|>, <|im_end|> are ids 0 to 3."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, special=True) for t in CONTROL])
    made.train_from_iterator([f"{q} {a}" for q, a in questions()], trainer)
    return made


def write_model(out: Path, seed: int = 0, **changes) -> Path:
    """A random two-layer model in float32; `changes` go into config.json."""
    made = tokenizer()
    net = tiny.transformer(seed, torch.float32, vocab_size=made.get_vocab_size(), bos_token_id=0,
                           eos_token_id=1, **changes)
    model.save(net, out)
    made.save(str(out / "tokenizer.json"))
    for name, value in {
            "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>",
                                      "add_bos_token": True},
            "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1}}.items():
        (out / name).write_text(json.dumps(value), "utf-8")
    return out
