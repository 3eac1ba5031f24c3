#!/usr/bin/env bash
# The papers' figure 5 on the miniature: degraded videos and clean images, equal compute (stage 1 costs half as much a step).
# full: stage 1 (already run) and stage 2; direct: without the initialisation strategy; coupled: both learned on videos alone.
set -euo pipefail
cd "$(dirname "$0")/.."
STEPS=${STEPS:-600}
common=(--data.degrade --data.length 1000 --steps "$STEPS" --resume)
animatelcm train video_lcm_emoji --name ablation_full "${common[@]}"
animatelcm train video_lcm_emoji --name ablation_direct --consistency.init direct "${common[@]}"
animatelcm train video_lcm_coupled_emoji --name ablation_coupled "${common[@]}" --steps $((STEPS + STEPS / 2))
for name in full direct coupled; do
  animatelcm eval --model "runs/out/ablation_$name/model" --settings lcm@1 lcm@2 lcm@4 lcm@8 --out "runs/out/eval_ablation_$name"
done
