"""Tokens sampled per CPU-second, here and by transformers' `generate`, on one model and one batch.

    python -m bench.sampling

A made-up Qwen2 of 25 million weights in float32, prompts of unequal length, NEW tokens each and no
end token. transformers pads on the left and keeps its own cache; SDPA attention, its defaults else.
The two take turns, and each figure is the median of its turns.
"""
import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import transformers

import generate
import model
from bench import work

PROMPTS = {"8 prompts x 4": (8, 4), "16 prompts": (16, 1)}  # how many, and copies of each


def make_prompts(count: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random ids, of lengths as in the benchmark of training."""
    draw = random.Random(seed)
    return [[draw.randrange(4, vocabulary) for _ in range(work.length(draw, *work.PROMPT))]
            for _ in range(count)]


def ours(net: model.Transformer, prompts: list[list[int]], copies: int, new: int,
         temperature: float) -> list[list[int]]:
    return generate.sample(net, prompts, new, (), temperature, copies=copies)


def theirs(net: torch.nn.Module, prompts: list[list[int]], copies: int, new: int,
           temperature: float) -> list[list[int]]:
    """The same by transformers, which repeats prompts before it reads them."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    draws = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    settings = transformers.GenerationConfig(
        max_new_tokens=new, do_sample=temperature > 0, pad_token_id=0, **draws)
    ids, mask = (x.repeat_interleave(copies, 0) for x in (ids, mask))
    said = net.generate(ids, attention_mask=mask, generation_config=settings)
    return said[:, longest:].tolist()


def turn(sampler: Callable, given: tuple) -> tuple[float, list[list[int]]]:
    """(tokens per CPU-second of one call, what it said)."""
    began = time.process_time()
    said = sampler(*given)
    return sum(map(len, said)) / (time.process_time() - began), said


def compare(net: model.Transformer, peer: torch.nn.Module, given: tuple,
            turns: int) -> tuple[float, float, int]:
    """(our rate, theirs, how many responses of the first turn are alike)."""
    taken = [(turn(ours, (net, *given)), turn(theirs, (peer, *given))) for _ in range(turns)]
    here, there = (median(pair[i][0] for pair in taken) for i in range(2))
    return here, there, sum(map(list.__eq__, taken[0][0][1], taken[0][1][1]))


def load(folder: Path) -> tuple[model.Transformer, torch.nn.Module]:
    """The model here and there, in float32; neither ends early."""
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    peer.generation_config.eos_token_id = None
    return model.load(folder, torch.float32), peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=work.SHAPES, default="small")
    parser.add_argument("--new", type=int, default=64, help="tokens of a response")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="more spin in wait")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    net, peer = load(work.make(options.model, work.FOLDER))
    for name, (count, copies) in PROMPTS.items():
        prompts = make_prompts(count, net.config.vocab_size)
        print(f"{name}, of {min(map(len, prompts))} to {max(map(len, prompts))} tokens")
        for temperature in (0.0, 1.0):
            given = (prompts, copies, options.new, temperature)
            here, there, alike = compare(net, peer, given, options.turns)
            print(f"  temperature {temperature:g}: {here:.0f} tokens per CPU-second, transformers "
                  f"{there:.0f}, ratio {here / there:.2f}; {alike} responses alike", flush=True)


if __name__ == "__main__":
    main()
