#!/usr/bin/env bash
# The papers' figure 5 on the miniature: degraded videos, clean images, equal compute.
# full: stage 1 (runs/emoji_all_stages.sh has run it) and stage 2; direct: without the initialisation strategy; coupled: LoRA and temporal
# layers learned on videos alone, for as many operations as both stages have.
set -euo pipefail
cd "$(dirname "$0")/.."
STEPS=${STEPS:-240}
COUPLED=$(STEPS=$STEPS python - <<'PY'
import os
from dataclasses import replace
from animatelcm import recipes
from animatelcm.planning import plan
first, second = recipes.image_lcm_emoji(), replace(recipes.video_lcm_emoji(), steps=int(os.environ["STEPS"]))
both = sum(stage.steps * plan(stage).flops for stage in (first, second))
print(round(both / plan(recipes.video_lcm_coupled_emoji()).flops))
PY
)
common=(--data.degrade --data.length 1000 --resume)
animatelcm train video_lcm_emoji --name ablation_full "${common[@]}" --steps "$STEPS"
animatelcm train video_lcm_emoji --name ablation_direct --consistency.init direct "${common[@]}" --steps "$STEPS"
animatelcm train video_lcm_coupled_emoji --name ablation_coupled "${common[@]}" --steps "$COUPLED"
for name in full direct coupled; do
  animatelcm eval emoji --model "runs/out/ablation_$name/model" --settings lcm@1 lcm@2 lcm@4 lcm@8 --out "runs/out/eval_ablation_$name"
done
