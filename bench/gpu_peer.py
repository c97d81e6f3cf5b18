"""Peer on a GPU: the UFT loss in a plain loop on transformers and PEFT, written with care.

    python -m bench.gpu_peer --shape mistral-7b --head response

The work of gpu_step.py: its weights, rows and micro-batches. The loop's best fair settings: SDPA
attention and no attention mask, which right padding under causal attention does not need, so that
the fused kernel is taken; logsumexp and a gather instead of a log-softmax, no cache, non-reentrant
checkpointing, no clipping, bfloat16 by autocast with float32 adapters, positions worked out on the
host so that nothing waits for the GPU. --head full takes the model's logits of all positions,
--head response runs the head on the positions before scored tokens only.
"""
import argparse
import json

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import tokens
from bench import clock, gpu_step
from config import check_device


def load(options: argparse.Namespace) -> PeftModel:
    """The random model, made on the device, with fresh float32 adapters, ready to train."""
    with torch.device(options.device):
        base = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**gpu_step.shape(options.shape)),
            dtype=getattr(torch, options.dtype), attn_implementation="sdpa")
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    net = get_peft_model(base, LoraConfig(
        r=clock.RANK, lora_alpha=clock.ALPHA, target_modules=clock.TARGETS,
        task_type="CAUSAL_LM")).train()
    gpu_step.draw(net.named_parameters())
    return net


def collate(rows: list[tokens.Encoded], device: str) -> list[Tensor]:
    """ids (B, T), padded on the right; of each scored token its row, place and id; scores (B,)."""
    width = max(len(e.ids) for e in rows)
    places = [(i, t, e.ids[t]) for i, e in enumerate(rows)
              for t in range(e.prompt_len, len(e.ids))]
    made = [torch.tensor([e.ids + [0] * (width - len(e.ids)) for e in rows]),
            *(torch.tensor(x) for x in zip(*places, strict=True)),
            torch.tensor([e.reward for e in rows])]
    return [(x.pin_memory() if device == "cuda" else x).to(device, non_blocking=True) for x in made]


def logps(net: PeftModel, batch: list[Tensor], head: str) -> Tensor:
    """log pi(y|x) of each row, (B,)."""
    ids, row, place, target, scores = batch
    if head == "response":
        base = net.get_base_model()
        hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = base.lm_head(hidden[row, place - 1]).float()
        picked = logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(-1)
    else:
        logits = net(input_ids=ids, use_cache=False).logits[:, :-1].float()
        said = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        picked = said[row, place - 1]
    return torch.zeros_like(scores).index_add(0, row, picked)


def update(net: PeftModel, optimizer: torch.optim.Optimizer, units: list[gpu_step.Unit],
           options: argparse.Namespace) -> tuple[float, float]:
    """One update of the adapters: reference and policy of each micro-batch, then AdamW."""
    total = said = 0.0
    for group in tokens.micro_batches(units, options.micro_batch_tokens):
        batch = collate([e for unit in group for e in unit], options.device)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            with torch.no_grad(), net.disable_adapter():
                reference = logps(net, batch, options.head)
            policy = logps(net, batch, options.head)
        share = torch.sigmoid(clock.BETA * (policy - reference)) - batch[-1]
        loss = share.square().sum() / len(units)
        loss.backward()
        total, said = total + loss.detach(), said + policy.detach().sum() / len(units)
    optimizer.step()
    optimizer.zero_grad()
    return total.item(), said.item()


def build(options: argparse.Namespace) -> gpu_step.Step:
    net = load(options)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad],
                                  lr=clock.RATE, weight_decay=0.0)
    return lambda units: update(net, optimizer, units, options)


def main() -> None:
    made = gpu_step.parser(__doc__)
    made.add_argument("--shape", choices=gpu_step.SHAPES, required=True)
    made.add_argument("--head", choices=("full", "response"), default="full")
    options = made.parse_args()
    check_device(options.device)
    print(json.dumps(gpu_step.line(options, f"loop, {options.head} head", build)), flush=True)


if __name__ == "__main__":
    main()
