#!/usr/bin/env bash
# The chain at the size of one GPU: the shipped autoencoder, ten to twenty times the pictures and clips of the two-core run for
# base and teacher, and a longer distillation (docs/log.md: on two cores more of it did not help).
# ./runs/emoji_gpu.sh --dry-run prints every stage's config and costs. Not run yet: no figure in docs/ is from it.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { animatelcm train "$@" --resume "${EXTRA[@]}"; }
EXTRA=("$@")
run base_emoji --model emoji --steps 12000 --batch-size 512 --data.length 60000
run teacher_emoji --steps 9000 --batch-size 32 --data.length 8000
run style_lora_emoji --steps 1500 --batch-size 128
run image_lcm_emoji --steps 600 --batch-size 256 --data.length 60000
run video_lcm_emoji --steps 600 --batch-size 32 --data.length 8000
