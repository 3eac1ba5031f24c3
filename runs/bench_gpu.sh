#!/usr/bin/env bash
# Every figure of docs/performance.md that needs a GPU, in parts that are planned to take less than ten minutes each (on a data-centre GPU; not run yet):
#   runs/bench_gpu.sh [bars|full|sweep|compiled|train|scale|steer|tests]...      without a name all of them, in this order
# What lies in $OUT is not made again: a part that was stopped goes on with what it lacks. sweep and compiled begin no case after $MINUTES (6;
# all parts together: no limit), so call them until they say that none is left. A part that fails does not keep the others from running.
# It needs `pip install .[train,bench]`, tests pytest; where nothing can be installed, $PYTHON (python3) and folders with the rest in PYTHONPATH.
set -euo pipefail
cd "$(dirname "$0")/.."
PARTS=(bars full sweep compiled train scale steer tests)
PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/out/bench}

if [[ $# != 1 ]]; then
  failed=()
  [[ $# == 0 ]] && set -- "${PARTS[@]}" && export MINUTES=${MINUTES:-600}
  for part in "$@"; do PYTHON=$PYTHON OUT=$OUT bash runs/bench_gpu.sh "$part" || failed+=("$part"); done
  [[ ${#failed[@]} == 0 ]] || { echo "failed: ${failed[*]}" >&2; exit 1; }
  exit
fi
if [[ " ${PARTS[*]} " != *" $1 "* ]]; then
  echo "no part $1; the parts are ${PARTS[*]}" >&2
  exit 2
fi
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$OUT"

lacking() { # modules that this python does not have
  "$PYTHON" -c 'import sys, importlib.util as i; print(*(n for n in sys.argv[1:] if i.find_spec(n) is None))' "$@"
}
once() { # FILE COMMAND: what it says, in FILE when it has ended well
  local file=$OUT/$1
  shift
  if [[ -s $file ]]; then echo "$file is there"; return; fi
  "$@" | tee "$file.partial"
  mv "$file.partial" "$file"
}
bench() { "$PYTHON" -m animatelcm bench --model sd15-random --device cuda "$@" --json; }
sweep() { # FILE FLAGS
  local file=$OUT/$1
  shift
  "$PYTHON" benchmarks/inference.py --model sd15-random --device cuda --rounds 3 --minutes "${MINUTES:-6}" --out "$file" "$@"
}

needs=(torch numpy safetensors tokenizers av PIL tyro diffusers transformers)
case $1 in
  train) needs+=(accelerate rich) ;;
  scale) needs+=(matplotlib) ;;
  tests) needs+=(pytest) ;;
esac
missing=$(lacking "${needs[@]}")
[[ -z $missing ]] || { echo "$1: $PYTHON lacks $missing" >&2; exit 2; }

case $1 in
  bars) once bars.json bench --compiled ;;
  full) once bars-full.json bench --compile full ;;
  sweep) sweep inference.jsonl ;;
  compiled) sweep inference-compiled.jsonl --compiled ;;
  train)
    for stage in image video adapter; do
      once "training-$stage.json" "$PYTHON" benchmarks/training.py --size sd15 --stages "$stage" --json
    done ;;
  scale) once scaling.txt "$PYTHON" benchmarks/scaling.py --model sd15-random --device cuda --out "$OUT/scaling.png" ;;
  steer) once steer.json bench --steer i2v --steer edge --steer pose ;;
  tests) once tests.txt "$PYTHON" -m pytest -q tests/test_{nets_kernels,nets_graphs,nets_fused,gpu}.py ;;
esac
