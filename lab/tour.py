"""One record from a line of JSON to a changed model, every number computed on the way.

    python -m lab.tour

Each stop shows what one file does. The bundled model is read anew for every step and no file is
written. Letters: S scored tokens, V vocabulary.
"""
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import data
import losses
import model
import tokens
from config import Config
from scoring import Scores, score
from train import adapted
from update import train_step

BASE, FILES = Path(__file__).parent / "base", Path(__file__).parent / "data"
CONFIG = Config(model=str(BASE), data=(str(FILES),), loss="uft", beta=0.1, lr=1e-3)
BETA, RATE = CONFIG.beta, CONFIG.lr
A, B = (f"model.layers.3.mlp.down_proj.lora_{half}" for half in "AB")


class Stop(NamedTuple):
    """A model before its training, its optimizer, one row, and what the model says of it."""

    net: model.Transformer
    optimizer: torch.optim.Optimizer
    row: tokens.Encoded
    batch: tokens.Batch
    scores: Scores


def visit(row: tokens.Encoded) -> Stop:
    """The bundled base with fresh adapters, the same ones for every row, and its scores."""
    (net, optimizer), batch = adapted(CONFIG, BASE), tokens.collate([row])
    return Stop(net, optimizer, row, batch, score(net, batch, reference=True))


def eq7(stop: Stop, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """(u of Eq. 5, Eq. 7's loss, dL/dlogps by hand: 2 beta (s - r) s (1 - s)), shape (1,) each."""
    given, r = (scores.logps, scores.ref_logps), stop.batch.rewards
    u = losses.implicit_reward(*given, BETA)
    s = u.detach().sigmoid()
    return u, losses.uft(*given, r, BETA), 2 * BETA * (s - r) * s * (1 - s)


def slopes(stop: Stop, of: Tensor, name: str = "") -> Tensor:
    """d of / dtheta by autograd over the adapter tensors with `name` in theirs, in one row."""
    parts = [p for n, p in stop.net.named_parameters() if p.requires_grad and name in n]
    return torch.cat([g.flatten() for g in torch.autograd.grad(of, parts, retain_graph=True)])


def step(stop: Stop) -> Scores:
    """One optimizer step on this row alone, by update.train_step; the scores after it."""
    train_step(stop.net, stop.optimizer, [(stop.row,)], CONFIG, RATE)
    with torch.no_grad():
        return score(stop.net, stop.batch, reference=True)


def digits(number: Tensor, then: Tensor | None = None) -> str:
    return f"{number.item():.6f}" + (f" -> {digits(then)}" if then is not None else "")


def compared(what: str, hand: Tensor, auto: Tensor) -> str:
    """One number (of many numbers the norm) by hand and by autograd, and how far they differ."""
    one, two = (digits(x if x.numel() == 1 else x.norm()) for x in (hand, auto))
    most = (hand - auto).abs().max().item()
    return f"   {what:17}by hand {one}   by autograd {two}   they differ by at most {most:.1e}"


def show_record(chat: tokens.Chat, path: Path) -> tokens.Encoded:
    """Stops 1 to 3: the first line of the file, the Example, and its ids."""
    line, example = path.read_text("utf-8").split("\n")[0], data.read(path)[0][0]
    row = tokens.encode(example, chat, 96)
    print(f"""
1. A LINE OF A FILE ({path.name}), somebody's demonstration of what to answer:
{textwrap.fill(line, 97, initial_indent="   ", subsequent_indent="   ")}

2. AN EXAMPLE (data.py): every format becomes a prompt, a response and a reward in [0, 1].
   prompt    {example.prompt}
   response  {example.response!r}
   reward    {example.reward:g}, for a demonstration is feedback with score 1: the idea of UFT

3. IDS (tokens.py): the chat template wraps the prompt, the tokenizer makes numbers of it.
   prompt    {row.ids[:row.prompt_len]}
   response  {row.ids[row.prompt_len:]}
   The last id is the end token: that an answer ends is part of the answer.""")
    return row


def show_logps(chat: tokens.Chat, stop: Stop) -> None:
    """Stops 4 and 5: the table of tokens, its sum under policy and reference, and the loss."""
    u, loss, _ = eq7(stop, stop.scores)
    print("""
4. LOG-PROBABILITIES (scoring.py): the model reads the row once and says, at every place, how
   likely the next token is. Only the response is scored: the prompt is given, not learned.

   place  token          id  scored?    log pi(token | all before it)""")
    for place, number in enumerate(stop.row.ids):
        said = digits(stop.scores.token_logps[0, place]) * stop.scores.mask[0, place].item()
        print(f"   {place:5}  {chat.decode([number])!r:12} {number:4}  "
              f"{'yes' if said else 'no':8}{said:>14}".rstrip())
    print(f"""
   logps      {digits(stop.scores.logps)}, the sum of the column: log pi(response | prompt)
   ref_logps  {digits(stop.scores.ref_logps)}, the same with the adapters off: the reference
   They are equal: a fresh adapter adds B A with B = 0, so policy and reference are one model.

5. LOSS (losses.py), with beta = {BETA:g}:
   Eq. 5   implicit reward  u = beta (logps - ref_logps) = {digits(u)}
           s = sigmoid(u) = {digits(u.sigmoid())}, the same between 0 and 1
   Eq. 7   loss = (s - r)^2 = {digits(loss)}, s is pulled towards r = {stop.row.reward:g}""")


def show_gradient(chat: tokens.Chat, stop: Stop) -> None:
    """Stop 6: from the loss to logps, to the logits, to one adapter tensor."""
    _, loss, slope = eq7(stop, stop.scores)
    auto, = torch.autograd.grad(loss, stop.scores.logps, retain_graph=True)
    first, ids_S = stop.row.prompt_len, stop.batch.ids[0, stop.row.prompt_len:]
    logits_SV = stop.net.logits(stop.net(stop.batch.ids))[0, first - 1 : -1].detach()
    one_SV = torch.nn.functional.one_hot(ids_S, logits_SV.shape[1])
    hand_SV, leaf_SV = slope * (one_SV - logits_SV.softmax(-1)), logits_SV.requires_grad_()
    logps = leaf_SV.log_softmax(-1).gather(1, ids_S[:, None]).sum()[None]
    auto_SV, = torch.autograd.grad(eq7(stop, stop.scores._replace(logps=logps))[1], leaf_SV)
    place = stop.scores.token_logps[stop.scores.mask].argmin()
    said, rival = ids_S[place], hand_SV[place].argmax()
    print(f"""
6. GRADIENT: which way is down? Three links of the chain rule, each worked out twice.
   dL/dlogps = 2 beta (s - r) s (1 - s). Below 0: the loss falls as the response gets likelier.
{compared("dL/dlogps", slope, auto)}
   dL/dlogits = dL/dlogps * (1 at the token that was said - softmax), {one_SV.numel()} numbers.
{compared("dL/dlogits, norm", hand_SV, auto_SV)}
   Least likely was {chat.decode([said])!r}: {digits(hand_SV[place, said])}, to rise; its rival \
{chat.decode([rival])!r}: {digits(hand_SV[place, rival])}, to fall.
   dL/dB = dL/dlogps * dlogps/dB, for {B}.
{compared("dL/dB, norm", slope * slopes(stop, stop.scores.logps, B), slopes(stop, loss, B))}
   dL/dA has norm {digits(slopes(stop, loss, A).norm())}: while B is 0, A makes no difference.""")


def show_step(stop: Stop, after: Scores) -> None:
    """Stop 7: the same numbers before and after one step."""
    before, now = eq7(stop, stop.scores), eq7(stop, after)
    print(f"""
7. ONE STEP (update.py): AdamW moves the weights of every B by about {RATE:g} each, downhill.
   logps            {digits(stop.scores.logps, after.logps)}, the response is likelier now
   ref_logps        {digits(stop.scores.ref_logps, after.ref_logps)}, the reference never moves
   implicit reward  {digits(before[0], now[0])}, what was gained, times beta
   loss             {digits(before[1], now[1])}""")


def show_feedback(chat: tokens.Chat, path: Path) -> None:
    """Stop 8: a poor and a good answer, each for a step of its own from the same start."""
    print(f"\n8. FEEDBACK ({path.name}): same loss, step and start, on answers with other scores.")
    for low, high in ((0, 0.5), (0.5, 1)):
        example = next(e for e in data.read(path)[0] if low < e.reward < high)
        stop = visit(tokens.encode(example, chat, 96))
        (_, loss, slope), after = eq7(stop, stop.scores), step(stop)
        print(f"""   {example.prompt[-1][1]!r} is answered {example.response!r}
      r = {example.reward:.6f}   dL/dlogps = {digits(slope)}, \
{"above 0: the answer is pushed down" if slope > 0 else "below 0: the answer is pulled up"}
      logps {digits(stop.scores.logps, after.logps)}   \
loss {digits(loss, eq7(stop, after)[1])}""")
    print("   Every step aims at s = r: a score says how far, a demonstration says all the way.")


def show_sft(row: tokens.Encoded, after: Scores) -> None:
    """Stop 9: the demonstration under SFT, whose dL/dlogps is -1 for ever."""
    stop = visit(row)
    each = eq7(stop, stop.scores)[1], losses.sft(stop.scores.logps)
    ours, theirs = (slopes(stop, loss) for loss in each)
    print(f"""
9. SFT on the demonstration: its loss is -logps and dL/dlogps = -1, for ever.
   norm of the gradient over all {len(ours)} adapter weights: UFT {digits(ours.norm())}, \
SFT {digits(theirs.norm())}
   ratio {digits(ours.norm() / theirs.norm())}, beta / 4 = {BETA / 4:.6f}; \
weight by weight they differ by at most {(ours - BETA / 4 * theirs).abs().max().item():.1e}
   On a fresh demonstration UFT is SFT with a smaller weight. After the step above that weight
   is {digits(eq7(stop, after)[2].abs())}: it fades as s nears r, and SFT's never does.""")


def main() -> None:
    torch.set_num_threads(1)
    chat = tokens.Chat(BASE)
    stop = visit(show_record(chat, FILES / "demonstrations.jsonl"))
    show_logps(chat, stop)
    show_gradient(chat, stop)
    after = step(stop)
    show_step(stop, after)
    show_feedback(chat, FILES / "feedback.jsonl")
    show_sft(stop.row, after)


if __name__ == "__main__":
    main()
