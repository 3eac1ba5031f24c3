#!/usr/bin/env bash
# The chain at the size of one GPU: the shipped autoencoder, ten to fifteen times the pictures and clips of the recipes for base and
# teacher; distillation has their steps, in batches eight times as large (docs/log.md: more steps did not help).
# ./runs/emoji_gpu.sh --dry-run prints every stage's config and costs. Not run yet: no figure in docs/ is from it.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { animatelcm train "$@" --resume "${EXTRA[@]}"; }
EXTRA=("$@")
run base_emoji --model emoji --steps 12000 --batch-size 512 --data.length 60000
run teacher_emoji --steps 9000 --batch-size 32 --data.length 8000
run style_lora_emoji --steps 1500 --batch-size 128
run image_lcm_emoji --batch-size 256 --data.length 60000
run video_lcm_emoji --batch-size 32 --data.length 8000
