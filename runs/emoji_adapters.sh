#!/usr/bin/env bash
# Adapters of the miniature, without a teacher: an encoder of pictures; T2I-Adapters (edges, depth) and a ControlNet (keypoints), learned on images,
# those for edges and keypoints then made fit for few-step clips by LoRA. Each stage resumes where it stopped. Then what they do, before and after.
set -euo pipefail
cd "$(dirname "$0")/.."
CLIPS=${CLIPS:-64} REAL=${REAL:-512}
run() { animatelcm train "$@" --resume; }
judge() { animatelcm eval emoji --model "runs/out/$1/model" --steer "$2" --settings lcm@4 --clips "$CLIPS" --real "$REAL" --out "runs/out/eval_$1"; }
for recipe in i2v_images_emoji i2v_emoji t2i_adapter_emoji t2i_adapter_lora_emoji t2i_adapter_depth_emoji controlnet_emoji controlnet_lora_emoji; do
  run "$recipe"
done
# the same LoRA with a teacher, and by the paper's eq. 12 alone: twice the steps, each of half the operations
run t2i_adapter_lora_emoji --name t2i_adapter_taught --consistency.earlier teacher
run t2i_adapter_lora_emoji --name t2i_adapter_noise --consistency.earlier noise --steps 400
judge i2v_emoji i2v
for name in t2i_adapter_emoji t2i_adapter_lora_emoji t2i_adapter_taught t2i_adapter_noise; do judge "$name" edge; done
judge t2i_adapter_depth_emoji depth
for name in controlnet_emoji controlnet_lora_emoji; do judge "$name" pose; done
