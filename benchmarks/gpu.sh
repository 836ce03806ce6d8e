#!/usr/bin/env bash
# benchmarks/gpu.sh OUT [kernels|models]: on a CUDA machine, everything that needs one, in two parts of under ten minutes.
# kernels: builds them, tests them, checks them with compute-sanitizer where there is one, and measures them.
# models: speed by image size, then quality; run it again with the same OUT and both go on where they stopped.
# Results are written to OUT as they come.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT [kernels|models]}
part=${2:-kernels}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
failed=0

step() { # step NAME SECONDS COMMAND...: its output to OUT/NAME.txt and, the end of it, here
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1
  local status=$?
  tail -n 25 "$out/$name.txt"
  echo "== $name: exit status $status after $((SECONDS - start)) s"
  [ $status -eq 0 ] || failed=1
}

step build 240 "$python" -m gspn_dit.ops --require cuda
[ $failed -eq 0 ] || exit 1  # the reference operator would be measured
if [ "$part" = models ]; then
  step resolution 280 "$python" -m benchmarks.resolution --device cuda --time-budget 260 --out "$out/resolution-cuda"
  step quality 280 "$python" -m benchmarks.quality --preset gpu --time-budget 240 --out "$out/quality-cuda"
  exit $failed
fi
step tests 150 "$python" -m pytest -q -x tests/test_cuda.py -k "gpu or graph or elements or spills"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step $tool 60 compute-sanitizer --tool $tool --error-exitcode 1 "$python" -m benchmarks.small_shapes
  done
else
  echo "== no compute-sanitizer here: memcheck and racecheck are left out"
fi
step operator 200 "$python" -m benchmarks.operator --device cuda --out "$out"
exit $failed
