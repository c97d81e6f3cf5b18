#!/usr/bin/env bash
# UNA-score as the authors' code runs it (arXiv 2408.15339): Mistral-7B-v0.1 on HelpSteer2 scores.
# Their values come from their scripts; what differs here is marked (and their AdamW is paged).
#     MODEL=mistralai/Mistral-7B-v0.1 HELPSTEER2=train.jsonl.gz bash runs/una_authors.sh
set -euo pipefail
flags=(
  --model "${MODEL:-mistralai/Mistral-7B-v0.1}"
  --data "${HELPSTEER2:?the HelpSteer2 training file}"
  --loss uft                       # (sigmoid(r_theta) - r)^2; theirs is summed over a batch of 1
  --beta 0.03
  --lr 3e-5
  --lora_r 32
  --lora_alpha 16
  --lora_dropout 0                 # they ask for 0.05; the trainer they use switches it off
  --lora_targets q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj
  --batch_size 8
  --epochs 2
  --warmup 0.1
  --weight_decay 0
  --max_grad_norm 1
  --max_length 2048                # they also drop prompts over 1024 tokens; here only this limit
  --template mistral-inst          # differs: one BOS and one EOS, where theirs has two of each
  --dtype bfloat16
  --gradient_checkpointing true
  --seed 42
  --held_out 64                    # ours: kept aside to measure before and after
  --device "${DEVICE:-cuda}"
  --out "${OUT:-runs/una_authors}"
)
exec "${PYTHON:-.venv/bin/python}" train.py "${flags[@]}" "$@"
