#!/usr/bin/env bash
# Every figure of docs/performance.md that needs a GPU, in one go (an H200 takes about 25 minutes). Kernels are tried first.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/out/bench}
mkdir -p "$OUT"
python -m pytest -q tests/test_nets_kernels.py tests/test_nets_graphs.py tests/test_nets_fused.py
animatelcm bench --model sd15-random --compiled --json > "$OUT/bars.json"
animatelcm bench --model sd15-random --compile full --json > "$OUT/bars-full.json"
python benchmarks/inference.py --model sd15-random --rounds 3 --out "$OUT/inference.jsonl"
python benchmarks/training.py --size sd15 --stages image video adapter --json > "$OUT/training.json"
python benchmarks/scaling.py --model sd15-random --out "$OUT/scaling.png" | tee "$OUT/scaling.txt"
