#!/usr/bin/env bash
# The paper's comparison of encoders of a picture (section 4.3) on the miniature, at equal steps: residual blocks on the latent, the same at the
# first frame alone, on pixels, and the latent's cells as words for the cross-attention.
set -euo pipefail
cd "$(dirname "$0")/.."
IMAGES=${IMAGES:-150} STEPS=${STEPS:-60} CLIPS=${CLIPS:-32} FIRST=${FIRST:-1} # FIRST: what a first frame counts for
compare() {
  local name=$1; shift
  animatelcm train i2v_images_emoji --name "encoder_${name}_images" --steps "$IMAGES" "$@" --resume
  animatelcm train i2v_emoji --name "encoder_$name" --model "runs/out/encoder_${name}_images/model" --steps "$STEPS" --consistency.first-frame "$FIRST" "$@" --resume
  animatelcm eval emoji --model "runs/out/encoder_$name/model" --steer i2v --settings lcm@4 --clips "$CLIPS" --real 512 --out "runs/out/eval_encoder_$name"
}
compare latent
compare first --adapter.spread first
compare pixels --adapter.sees pixels
compare tokens --adapter.kind image_tokens
