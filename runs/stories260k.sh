#!/usr/bin/env bash
# Half a minute on two idle cores: UFT on a real checkpoint of 260K parameters (TinyStories, Llama shape),
# with demonstrations and pairs from the book "Build a Large Language Model (From Scratch)".
#     MODEL=stories260k DATA=raschka bash runs/stories260k.sh [more flags of train.py]
set -euo pipefail
flags=(
  --model "${MODEL:?the folder of the stories260K checkpoint}"
  --data "${DATA:?the folder of the two files}/instruction-data.json"
  --data "$DATA/instruction-data-with-preference.json"
  --loss uft --beta 0.1 --lr 1e-3 --steps 300
  --template mistral-inst --max_length 512 --held_out 300
  --micro_batch_tokens 1024        # small groups of rows: less memory, the same numbers
)
exec "${PYTHON:-.venv/bin/python}" train.py "${flags[@]}" "$@"
