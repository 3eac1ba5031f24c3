#!/usr/bin/env bash
# The papers' table 1 on the miniature: baselines with the guidance and the spacing that suit each best, ours, ours in a style.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-emoji} CLIPS=${CLIPS:-256} OUT=${OUT:-runs/out/table}
grid=()
for sampler in ddim dpm++; do for steps in 1 2 4 8; do for guidance in 1 2 4; do for spacing in leading trailing; do
  grid+=("$sampler@$steps:$guidance/$spacing")
done; done; done; done
common=(--model "$MODEL" --clips "$CLIPS")
animatelcm eval emoji "${common[@]}" --teacher --settings "${grid[@]}" ddim@25:4 ddim@50:4 --out "$OUT/teacher"
animatelcm eval emoji "${common[@]}" --settings lcm@1 lcm@2 lcm@4 lcm@8 --out "$OUT/ours"
animatelcm eval emoji "${common[@]}" --settings lcm@4 --style-truth twemoji --out "$OUT/unstyled"
animatelcm eval emoji "${common[@]}" --settings lcm@4 --style-truth twemoji --style twemoji --out "$OUT/styled"
