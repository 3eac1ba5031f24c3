#!/usr/bin/env bash
# The papers' figure 5 on the miniature: degraded videos, clean images, equal compute.
# full: stage 1 (runs/emoji_all_stages.sh has run it) and stage 2; direct: without the initialisation strategy; coupled: LoRA and temporal
# layers learned on videos alone, for as many steps more as stage 1's operations are worth.
set -euo pipefail
cd "$(dirname "$0")/.."
STEPS=${STEPS:-240}
EXTRA=$(python - <<'PY'
from animatelcm import recipes
from animatelcm.planning import plan
first, coupled = recipes.image_lcm_emoji(), recipes.video_lcm_coupled_emoji()
print(round(first.steps * plan(first).flops / plan(coupled).flops))
PY
)
common=(--data.degrade --data.length 1000 --resume)
animatelcm train video_lcm_emoji --name ablation_full "${common[@]}" --steps "$STEPS"
animatelcm train video_lcm_emoji --name ablation_direct --consistency.init direct "${common[@]}" --steps "$STEPS"
animatelcm train video_lcm_coupled_emoji --name ablation_coupled "${common[@]}" --steps $((STEPS + EXTRA))
for name in full direct coupled; do
  animatelcm eval emoji --model "runs/out/ablation_$name/model" --settings lcm@1 lcm@2 lcm@4 lcm@8 --out "runs/out/eval_ablation_$name"
done
