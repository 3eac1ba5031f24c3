#!/usr/bin/env bash
# From data to the shipped bundle, every stage in order. Each resumes where it stopped: run the same line again.
set -euo pipefail
cd "$(dirname "$0")/.."
for recipe in vae_emoji vae_emoji_small vae_decoder_emoji base_emoji teacher_emoji style_lora_emoji image_lcm_emoji video_lcm_emoji; do
  animatelcm train "$recipe" --resume "$@"
done
echo "the bundle is in runs/out/video_lcm_emoji/model"
