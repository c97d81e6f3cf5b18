#!/usr/bin/env bash
# Mixed UFT as the paper runs it (arXiv 2410.21438): Mistral-7B-v0.1, 20k UltraChat demonstrations
# and 20k HelpSteer2 scores in one stage. Values the paper does not state are marked and are ours.
#     MODEL=mistralai/Mistral-7B-v0.1 ULTRACHAT=ultrachat_20k.jsonl HELPSTEER2=train.jsonl.gz bash runs/uft_paper.sh
set -euo pipefail
flags=(
  --model "${MODEL:-mistralai/Mistral-7B-v0.1}"
  --data "${ULTRACHAT:?a file of 20k UltraChat conversations}"
  --data "${HELPSTEER2:?the HelpSteer2 training file}"
  --loss uft                       # Eq. 7
  --beta 0.01                      # stated for UFT on UltraChat alone, not for the mixed run
  --lr 3e-5                        # stated for UFT on UltraChat alone, not for the mixed run
  --lora_r 16                      # stated
  --lora_alpha 16                  # not stated
  --lora_dropout 0                 # not stated
  --lora_targets q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj   # not stated
  --batch_size 8                   # not stated
  --epochs 1                       # not stated
  --warmup 0.1                     # not stated
  --weight_decay 0                 # not stated
  --max_grad_norm 1                # not stated
  --max_length 2048                # not stated
  --template mistral-inst          # not stated; the form of the authors' UNA code
  --dtype bfloat16                 # not stated
  --seed 0                         # not stated
  --gradient_checkpointing true    # changes no number
  --held_out 64                    # ours: kept aside to measure before and after
  --device "${DEVICE:-cuda}"
  --out "${OUT:-runs/uft_paper}"
)
exec "${PYTHON:-.venv/bin/python}" train.py "${flags[@]}" "$@"
