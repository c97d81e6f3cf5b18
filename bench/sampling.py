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
    """The same by transformers."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    draws = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    settings = transformers.GenerationConfig(
        max_new_tokens=new, do_sample=temperature > 0, pad_token_id=0, **draws)
    ids, mask = (x.repeat_interleave(copies, 0) for x in (ids, mask))
    said = net.generate(ids, attention_mask=mask, generation_config=settings)
    return said[:, longest:].tolist()


def rate(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Tokens per CPU-second of one call, and what it said."""
    began = time.process_time()
    said = run()
    return sum(map(len, said)) / (time.process_time() - began), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--new", type=int, default=64, help="tokens of a response")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = work.make("small", work.FOLDER)
    net = model.load(folder, torch.float32)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    peer.generation_config.eos_token_id = None
    for name, (count, copies) in PROMPTS.items():
        prompts = make_prompts(count, net.config.vocab_size)
        lengths = f"{min(map(len, prompts))} to {max(map(len, prompts))} tokens"
        for temperature in (0.0, 1.0):
            turns = [[rate(lambda f=f, n=n: f(n, prompts, copies, options.new, temperature))  # noqa: B023
                      for f, n in ((ours, net), (theirs, peer))] for _ in range(options.turns)]
            here, there = (median(turn[i][0] for turn in turns) for i in range(2))
            same = sum(a == b for a, b in zip(turns[0][0][1], turns[0][1][1], strict=True))
            print(f"{name} of {lengths}, temperature {temperature:g}: {here:.0f} tokens per "
                  f"CPU-second, transformers {there:.0f}, ratio {here / there:.2f}"
                  + f"; {same} of {count * copies} responses alike" * (not temperature), flush=True)


if __name__ == "__main__":
    main()
