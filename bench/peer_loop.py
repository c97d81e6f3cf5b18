"""Peer: the UFT loss in a plain loop on transformers and PEFT, as a careful user writes it.

    python -m bench.peer_loop --model runs/bench/small --task uft --head response

Its best fair settings: SDPA attention, right padding to the longest row of the step, logsumexp and
a gather instead of a log-softmax, no cache, non-reentrant checkpointing, no clipping, bfloat16 by
autocast with float32 adapters. --head full takes the model's logits of all positions, --head
response runs the head on the scored positions only.
"""
import argparse

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import clock


def load(options: argparse.Namespace) -> PeftModel:
    """The checkpoint with fresh float32 adapters, ready to train."""
    base = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), attn_implementation="sdpa")
    base.config.use_cache = False
    if options.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    return get_peft_model(base, LoraConfig(
        r=clock.RANK, lora_alpha=clock.ALPHA, target_modules=clock.TARGETS,
        task_type="CAUSAL_LM")).train()


def encode(options: argparse.Namespace) -> list[tuple[list[int], int, float]]:
    """(ids, length of the prompt, score) of every row."""
    tokenizer, out = AutoTokenizer.from_pretrained(options.model), []
    for row in clock.read(options):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = prompt + tokenizer(row["response"])["input_ids"] + [tokenizer.eos_token_id]
        out.append((ids[:clock.MAX_LENGTH], len(prompt), row["score"]))
    return out


def collate(rows: list[tuple[list[int], int, float]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, attention mask, response mask, all (B, T), and scores (B,)."""
    width = max(len(ids) for ids, _, _ in rows)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _, _ in rows])
    position = torch.arange(width)
    ends = torch.tensor([[len(ids)] for ids, _, _ in rows])
    starts = torch.tensor([[prompt] for _, prompt, _ in rows])
    attention = (position < ends).long()
    return ids, attention, (position >= starts) & (position < ends), torch.tensor(
        [score for _, _, score in rows])


def logps(net: PeftModel, ids: Tensor, attention: Tensor, response: Tensor, head: str) -> Tensor:
    """log pi(y|x) of each row, (B,)."""
    targets, mask = ids[:, 1:], response[:, 1:]
    if head == "response":
        base = net.get_base_model()
        hidden = base.model(input_ids=ids, attention_mask=attention).last_hidden_state[:, :-1]
        logits, targets = base.lm_head(hidden[mask]).float(), targets[mask]
    else:
        logits = net(input_ids=ids, attention_mask=attention).logits[:, :-1].float()
    token_logps = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
    if head == "full":
        return (token_logps * mask).sum(-1)
    return torch.zeros(len(ids)).index_add(0, mask.nonzero()[:, 0], token_logps)


def main() -> None:
    parser = clock.parser(__doc__, ("uft",))
    parser.add_argument("--head", choices=("full", "response"), default="full")
    options = parser.parse_args()
    watch = clock.Clock(options, f"loop, {options.head} head")
    torch.manual_seed(0)
    net, rows = load(options), encode(options)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad],
                                  lr=clock.RATE, weight_decay=0.0)
    for start in range(0, len(rows), options.batch):
        batch = rows[start:start + options.batch]
        watch.count([(ids, len(ids) - prompt) for ids, prompt, _ in batch])
        ids, attention, response, scores = collate(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            with torch.no_grad(), net.disable_adapter():
                reference = logps(net, ids, attention, response, options.head)
            policy = logps(net, ids, attention, response, options.head)
        loss = (torch.sigmoid(clock.BETA * (policy - reference)) - scores).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.tick(loss.item())
    watch.report()


if __name__ == "__main__":
    main()
