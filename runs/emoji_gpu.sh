#!/usr/bin/env bash
# The chain at the size of one GPU: the shipped autoencoder, nine to fifteen times the pictures and clips of the recipes for base and
# teacher; distillation has their steps, in batches eight times as large (docs/log.md: more steps did not help).
#   runs/emoji_gpu.sh [STAGE...] [--flag value...]     stages: base_emoji teacher_emoji style_lora_emoji image_lcm_emoji video_lcm_emoji
# Without a stage all of them, in this order; flags go to each. --dry-run prints a stage's config and costs. Not run yet: no figure in docs/
# is from it.
# Each stage resumes where it stopped: run the same line again. Where a GPU is there for minutes only, name one stage, and end it with a
# checkpoint: timeout -s INT 540 runs/emoji_gpu.sh base_emoji (or --stop-after STEP). To go on elsewhere copy $OUT/STAGE/checkpoints (the newest
# step-* is enough) and the model/ of the stage before to the same places there, and run the same line; after a stage's end its model/ is all
# that the next one needs. $OUT (runs/out) has to be the same words again: a run remembers what it began from. $OUT/cache is made anew.
set -euo pipefail
cd "$(dirname "$0")/.."
STAGES=(base_emoji teacher_emoji style_lora_emoji image_lcm_emoji video_lcm_emoji)
PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/out}
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

chosen=()
while [[ $# -gt 0 && $1 != -* ]]; do
  if [[ " ${STAGES[*]} " != *" $1 "* ]]; then
    echo "no stage $1; the stages are ${STAGES[*]}" >&2
    exit 2
  fi
  chosen+=("$1")
  shift
done
[[ ${#chosen[@]} -gt 0 ]] || chosen=("${STAGES[@]}")

for stage in "${chosen[@]}"; do
  case $stage in
    base_emoji) how=(--model emoji --steps 12000 --batch-size 512 --data.length 60000) ;;
    teacher_emoji) how=(--model "$OUT/base_emoji/model" --steps 9000 --batch-size 32 --data.length 8000) ;;
    style_lora_emoji) how=(--model "$OUT/teacher_emoji/model" --steps 1500 --batch-size 128) ;;
    image_lcm_emoji) how=(--model "$OUT/style_lora_emoji/model" --batch-size 256 --data.length 60000) ;;
    video_lcm_emoji) how=(--model "$OUT/image_lcm_emoji/model" --batch-size 32 --data.length 8000) ;;
  esac
  "$PYTHON" -m animatelcm train "$stage" --out "$OUT" --mixed-precision bf16 "${how[@]}" --resume "$@"
done
