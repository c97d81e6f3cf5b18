"""Sampling from the policy: the next token, batches of responses, and a small chat command.

Prompts are read without padding, those of one length at a time; then each row takes a token a step
until it ends and leaves the batch.   Letters: B rows, T tokens, D width, V vocabulary.

    python generate.py --model DIR [--adapter DIR] --prompt "Once upon a time" --template plain
"""
import argparse
import math
import sys
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import config
import lora
import model
import tokens
from command import Parser, check, number, stop, whole
from strict import show

CROWDED = 0.75  # the share of a batch that must go on, else the rows that ended leave it


def next_token(logits_BV: Tensor, temperature: float, top_p: float,
               generator: torch.Generator | None) -> Tensor:
    """One token id per row, (B,): greedy at temperature 0, else a draw from softmax(logits / T).

    top_p < 1 draws from the smallest set of tokens whose probability reaches top_p. A row takes
    one uniform number. ValueError for logits that are not finite: no token is the likeliest.
    """
    if not logits_BV.sum(-1).isfinite().all():
        raise ValueError("the model's logits are not finite: its weights or adapter are damaged")
    if temperature == 0:
        return logits_BV.argmax(-1)
    probs, ids = (logits_BV / temperature).softmax(-1), None
    if top_p < 1:
        probs, ids = probs.sort(-1, descending=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    # a GPU's float32 sums can fall by a rounding: a token of no probability could be drawn
    sums = probs.cumsum(-1, dtype=torch.float64 if probs.is_cuda else probs.dtype)
    place = generator.device if generator else "cpu"
    u = torch.rand(len(sums), 1, generator=generator, dtype=sums.dtype, device=place)
    drawn = torch.searchsorted(sums, u.to(sums.device) * sums[:, -1:], right=True)
    return (drawn if ids is None else ids.gather(-1, drawn))[:, 0]


def read(net: model.Transformer, prompts: Sequence[Sequence[int]],
         copies: int) -> tuple[Tensor, model.Cache]:
    """(last hidden states (B, D), cache) of the prompts, the copies of each side by side, each read
    once, together with those of its length. In the cache all end at one place."""
    longest, device, found = max(map(len, prompts)), next(net.parameters()).device, {}
    for length in {len(p) for p in prompts}:
        rows = [i for i, p in enumerate(prompts) if len(p) == length]
        ids_BT = torch.tensor([prompts[i] for i in rows], device=device)
        hidden_BTD, cache = net.extend(ids_BT, None)
        for n, i in enumerate(rows):
            found[i] = hidden_BTD[n, -1], [
                F.pad(past.kept[n], (0, 0, longest - length, 0)) for past in cache]
    order = [i for i in range(len(prompts)) for _ in range(copies)]
    first_B1 = torch.tensor([[longest - len(prompts[i])] for i in order], device=device)
    hidden, caches = zip(*map(found.get, order), strict=True)
    return torch.stack(hidden), [
        model.Past(torch.stack(layer), first_B1) for layer in zip(*caches, strict=True)]


@torch.no_grad()
def sample(net: model.Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int,
           stop_ids: Collection[int], temperature: float = 0.0, top_p: float = 1.0,
           generator: torch.Generator | None = None, copies: int = 1) -> list[list[int]]:
    """`copies` answers to each prompt, side by side: up to max_new_tokens ids, a stop id ends one.

    Draws are made on the generator's device. At temperature 0 a response does not depend on its
    batch, but for rounding (bfloat16 can turn a close choice). Adapters, if any, are on; dropout
    is off while sampling. A response ends where the model's context does. ValueError for a prompt
    that is empty, or fills the context.
    """
    if not prompts:
        return []
    if not all(prompts):
        raise ValueError("a prompt has no tokens: give it text, or a template with a BOS token")
    longest, context = max(map(len, prompts)), net.config.max_position_embeddings
    if longest >= context:
        raise ValueError(f"a prompt has {longest} tokens, and the model's context of {context} "
                         "(max_position_embeddings) leaves no room for an answer: shorten it")
    room = [min(max_new_tokens, context - len(p)) for p in prompts for _ in range(copies)]
    training = net.training
    net.eval()
    responses: list[list[int]] = [[] for _ in room]
    rows = going = range(len(room) if max_new_tokens else 0)
    hidden_BD, cache = read(net, prompts, copies)
    while going:
        drawn_B = next_token(net.logits(hidden_BD), temperature, top_p, generator)
        for i, token in zip(rows, drawn_B.tolist(), strict=True):
            if i in going:
                responses[i].append(token)
        going = {i for i in going
                 if len(responses[i]) < room[i] and responses[i][-1] not in stop_ids}
        if len(going) <= CROWDED * len(rows):
            stay = [n for n, i in enumerate(rows) if i in going]
            rows, drawn_B = [rows[n] for n in stay], drawn_B[stay]
            cache = [model.Past(past.kept[stay], past.first_B1[stay]) for past in cache]
        if going:
            hidden_BTD, cache = net.extend(drawn_B[:, None], cache)
            hidden_BD = hidden_BTD[:, -1]
    net.train(training)
    return responses


def complete(net: model.Transformer, chat: tokens.Chat, prompts: Sequence[tuple],
             max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
             generator: torch.Generator | None = None) -> list[str]:
    """The text answered to each conversation, without its end token."""
    asked = [chat.prompt_ids(p) for p in prompts]
    answers = sample(net, asked, max_new_tokens, chat.stop_ids, temperature, top_p, generator)
    return [chat.answer(prompt, ids) for prompt, ids in zip(asked, answers, strict=True)]


def turn(text: str) -> tuple[str, str]:
    """The user's turn.   ValueError for bytes that are no UTF-8, which Python hides in the text."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"--prompt, or what was typed, is no UTF-8: {show(text)}")
    return "user", text


def converse(net: model.Transformer, chat: tokens.Chat, args: argparse.Namespace) -> None:
    """A chat on the terminal, remembering its turns, until end of input."""
    said, generator = [], torch.Generator().manual_seed(args.seed)
    while True:
        try:
            said.append(turn(input("> ")))
        except EOFError:
            return
        answer, = complete(net, chat, [tuple(said)], args.max_new_tokens, args.temperature,
                           args.top_p, generator)
        print(answer)
        said.append(("assistant", answer))


def main(argv: list[str] | None = None) -> None:
    parser = Parser("generate.py", description="Answer prompts, or chat.", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="model folder or Hugging Face id")
    parser.add_argument("--adapter", help="PEFT adapter folder")
    parser.add_argument("--prompt", action="append", help="repeatable; without it: a chat")
    parser.add_argument("--template", default="checkpoint",
                        help=f"checkpoint (the model's own), {', '.join(tokens.TEMPLATES)}")
    parser.add_argument("--max_new_tokens", type=whole, default=256, help="at most")
    parser.add_argument("--temperature", type=number, default=0.0, help="0 is greedy")
    parser.add_argument("--top_p", type=number, default=1.0)
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    args = parser.parse_args(argv)
    try:
        check(args, (
            ("--temperature >= 0", lambda x: 0 <= x < math.inf, "temperature"),
            ("0 < --top_p <= 1", lambda x: 0 < x <= 1, "top_p"),
            ("--max_new_tokens >= 1", lambda x: x >= 1, "max_new_tokens"),
            ("0 to 10^9", lambda x: 0 <= x <= 1e9, "seed")))
        config.check_device(args.device)
        folder = model.resolve(args.model)
        chat = tokens.Chat(folder, args.template, args.adapter)
        net = model.load(folder, getattr(torch, args.dtype), args.device)
        if args.adapter:
            lora.load(net, args.adapter)
        if hasattr(net, "score"):
            raise ValueError(f"--adapter {args.adapter} is a reward model, which answers nothing: "
                             "give it to train.py as --reward")
        if not args.prompt:
            return converse(net, chat, args)
        answers = complete(net, chat, [(turn(p),) for p in args.prompt], args.max_new_tokens,
                           args.temperature, args.top_p, torch.Generator().manual_seed(args.seed))
        print("\n\n".join(answers), flush=True)
    except (ValueError, OSError) as error:
        stop(parser.prog, error)
    except KeyboardInterrupt:
        print("generate.py: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
