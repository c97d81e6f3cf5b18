"""Peer: TRL's SFTTrainer, DPOTrainer and KTOTrainer with PEFT, as their documentation shows them.

    python -m bench.peer_trl --model runs/bench/small --task sft --padding_free

Their best fair settings: SDPA attention, TRL's own fused language-model head (the default), rows in
file order, no dropout, no clipping, nothing saved or reported, loss logged every step (that is
where a step is timed), bfloat16 by autocast (bf16) with float32 adapters, no pinned memory.
--padding_free flattens the batch into one row; --cached is precompute_ref_log_probs. The reference
is the model with its adapter off. KTO's mismatched rows are its own and are not counted.
"""
import argparse
import itertools
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from bench import clock

TRAINERS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig),
            "kto": (KTOTrainer, KTOConfig)}


def rows(inputs: dict) -> list[tuple[list[int], int]]:
    """What clock.Clock.count takes, from a collated batch: padded, or flattened with positions."""
    ids = inputs["input_ids"]
    scored = inputs["completion_mask"].bool() if "completion_mask" in inputs else (
        inputs["labels"] != -100)
    if "attention_mask" in inputs:
        real = inputs["attention_mask"].bool()
        return [(i[r].tolist(), int(s[r].sum()))
                for i, s, r in zip(ids, scored, real, strict=True)]
    starts = [*(inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist(), ids.shape[1]]
    return [(ids[0, a:b].tolist(), int(scored[0, a:b].sum()))
            for a, b in itertools.pairwise(starts)]


def timed(trainer: type, watch: clock.Clock) -> type:
    """The trainer, counted where a step begins and ticked where its loss is logged."""

    class Timed(trainer):
        """The same trainer with a clock."""

        def training_step(self, model, inputs, num_items_in_batch=None):
            watch.count(rows(inputs))
            return super().training_step(model, inputs, num_items_in_batch)

        def log(self, logs, start_time=None):
            if "loss" in logs:
                watch.tick(logs["loss"])
            super().log(logs, start_time)

    return Timed


def settings(options: argparse.Namespace, folder: str) -> object:
    """The trainer's config."""
    chosen = {"sft": {"padding_free": options.padding_free}}.get(
        options.task, {"beta": clock.BETA, "precompute_ref_log_probs": options.cached})
    # TRL flattens a batch only where nothing is to be cut, which nothing is
    longest = None if options.padding_free else clock.MAX_LENGTH
    return TRAINERS[options.task][1](
        output_dir=folder, per_device_train_batch_size=options.batch, max_steps=options.steps,
        gradient_accumulation_steps=1, learning_rate=clock.RATE, lr_scheduler_type="constant",
        warmup_steps=0, optim="adamw_torch", weight_decay=0.0, max_grad_norm=0.0,
        gradient_checkpointing=options.checkpointing, bf16=options.dtype == "bfloat16",
        train_sampling_strategy="sequential", logging_steps=1, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, max_length=longest, **chosen)


def main() -> None:
    parser = clock.parser(__doc__, tuple(TRAINERS))
    parser.add_argument("--padding_free", action="store_true", help="sft only")
    options = parser.parse_args()
    name = "TRL, padding free" if options.padding_free else "TRL"
    watch = clock.Clock(options, name + ", cached" * options.cached)
    net = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), attn_implementation="sdpa")
    lora = LoraConfig(r=clock.RANK, lora_alpha=clock.ALPHA, target_modules=clock.TARGETS,
                      task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        timed(TRAINERS[options.task][0], watch)(
            model=net, args=settings(options, folder), peft_config=lora,
            train_dataset=Dataset.from_list(clock.read(options)),
            processing_class=AutoTokenizer.from_pretrained(options.model)).train()
    watch.report()


if __name__ == "__main__":
    main()
