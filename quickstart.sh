#!/usr/bin/env bash
# Real digits end to end, on the CPU: images -> latents -> train -> sample -> decode -> evaluate. `make quickstart` runs it.
set -euo pipefail

run() {
  printf '\n$ %s\n' "$*"
  "$@"
}

export ACCELERATE_USE_CPU=true
RUN=runs/quickstart
rm -rf "$RUN"

run gspn-dit ops
run gspn-dit encode --data digits --vae digits --image-size 32 --out data/digits-latents --num-workers 0
run gspn-dit train --config configs/digits.yaml --output-dir "$RUN"
run gspn-dit sample --model "$RUN" --num-images 500 --out "$RUN/samples-500/"
run gspn-dit evaluate --samples "$RUN/samples-500" --reference digits --features digits --out "$RUN/metrics.json"

cat <<END

sample grid   $(ls "$RUN"/samples/step-*.png | tail -n 1)
loss curve    $RUN/loss.png
metrics       $RUN/metrics.json
checkpoint    $(ls -d "$RUN"/checkpoints/step-* | tail -n 1)
END
