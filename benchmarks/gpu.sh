#!/usr/bin/env bash
# benchmarks/gpu.sh OUT [kernels|budget|models|resolution|quality] [STATE]: on a CUDA machine, everything that needs one,
# in parts that end within TOTAL seconds (default 570): what has no time left is reported as not run, and the exit status
# is 1.
#   kernels     build, test and measure the kernels, then compute-sanitizer where there is one
#   budget      where the time of one block goes, gspn-dit-xl-2 and dit-xl-2, forward and training, at 256 pixels;
#               and the ways to its depthwise convolution
#   resolution  speed and memory by image size
#   quality     a short comparison of dit, gspn-dit and its mixer of convolutions on photographs
#   models      the last two in turn
# A part leaves at most 8 files in OUT, each as it comes: PART.log, tables, pictures, and quality-cuda.tar.gz of finished
# trainings. resolution and quality go on from the resolution-cuda.json and quality-cuda.tar.gz of OUT, else from those of
# the folder STATE (an argument or a variable; a folder that git ignores, such as runs/gpu).
#
# Without network: what an image with torch lacks can lie as wheels in the folder .whl of the checkout. Beside torch,
# numpy, pyyaml, tqdm, safetensors, ninja and pytest, the part kernels needs jsonargparse, docstring-parser and
# typeshed-client; budget and resolution also diffusers (it asks for importlib-metadata, but does not import it),
# accelerate, huggingface-hub, requests, pillow and matplotlib; quality also torchvision, torch-fidelity, mlxtend, scipy
# and scikit-image; and what these require in turn. Wheels are installed without their requirements, into a temporary
# folder.
set -uo pipefail
usage="usage: benchmarks/gpu.sh OUT [kernels|budget|models|resolution|quality] [STATE]"
part=${2:-kernels}
case ${1:+$part} in kernels | budget | models | resolution | quality) ;; *) echo "$usage" >&2 && exit 2 ;; esac
out=$(realpath -m "$1")
state=$(realpath -m "${3:-${STATE:-$out}}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
total=${TOTAL:-570}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
log=$out/$part.log
: >"$log"
failed=0

seconds_left() { # seconds_left MOST: so many, or those until the deadline
  local left=$((total - SECONDS))
  echo $((left < $1 ? left : $1))
}

step() { # step NAME SECONDS COMMAND...: its output to the log and, the end of it, here
  local name=$1 limit start=$SECONDS from status
  limit=$(seconds_left "$2")
  shift 2
  if [ "$limit" -lt 10 ]; then
    echo "== $name: NOT RUN, no time left" | tee -a "$log"
    failed=1
    return
  fi
  echo "== $name ($limit s): $*" | tee -a "$log"
  from=$(($(wc -l <"$log") + 1))
  timeout -k 5 "$limit" "$@" >>"$log" 2>&1
  status=$?
  tail -n "+$from" "$log" | tail -n 30
  echo "== $name: exit status $status after $((SECONDS - start)) s" | tee -a "$log"
  [ $status -eq 0 ] || failed=1
}

kernels() {
  step tests 240 "$python" -m pytest -q --durations=5 --noconftest -p no:cacheprovider --maxfail=20 --tb=short \
    tests/ops/test_cuda.py -k "(gpu or graph or elements) and not spills"
  step operator 170 "$python" -m benchmarks.operator --device cuda --out "$out"
  PATH=$PATH:/usr/local/cuda/bin
  if ! timeout 60 compute-sanitizer --report-api-errors no "$python" -c "import torch; torch.ones(1).cuda()" \
    >>"$log" 2>&1; then
    echo "== compute-sanitizer is missing or does not run here: memcheck and racecheck are left out" | tee -a "$log"
    return
  fi
  # calls that torch makes and expects to fail are no errors; cached, what lies beyond a tensor may be allocated too
  step memcheck 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no \
    --error-exitcode 1 "$python" -m benchmarks.small_shapes
  step racecheck 150 compute-sanitizer --tool racecheck --error-exitcode 1 "$python" -m benchmarks.small_shapes
}

budget() { # budget SECONDS: in all
  local name kind
  for kind in forward training; do
    for name in gspn-dit-xl-2 dit-xl-2; do
      step "$name $kind" $(($1 / 4)) "$python" -m benchmarks.block_budget --device cuda --name "$name" --step "$kind" \
        --out "$out/block-$name-$kind.md"
    done
  done
  step depthwise "$1" "$python" -m benchmarks.depthwise --device cuda --out "$out/depthwise.md"
}

resolution() { # resolution SECONDS: a case takes half a minute and more, most of it to compile; four sizes come first
  local budget=$(($(seconds_left "$1") - 20)) # to start, and for the last table
  step resolution "$1" "$python" -m benchmarks.resolution --device cuda --time-budget $((budget > 1 ? budget : 1)) \
    --pixels '[256,1024,4096,16384,512,2048,8192]' --out "$out/resolution-cuda"
}

quality() { # quality SECONDS: trainings that are not finished begin anew, for their checkpoints are too large to carry
  local budget=$(($(seconds_left "$1") - 75)) # to start, and for the evaluation that is under way
  step quality "$1" "$python" -m benchmarks.quality --preset gpu --data '[photos]' --seeds 1 --steps 1000 --samples 1000 \
    --held-out 250 --models '[dit,gspn-dit,gspn-dit+mixer=conv]' --time-budget $((budget > 1 ? budget : 1)) \
    --out "$work/quality-cuda"
  [ -d "$work/quality-cuda" ] || return
  tar -C "$work" --exclude=checkpoint.pt -czf "$out/quality-cuda.tar.gz" quality-cuda
  local name
  for name in report.md losses.png samples-photos.png; do
    [ ! -e "$work/quality-cuda/$name" ] || cp "$work/quality-cuda/$name" "$out/quality-cuda-$name"
  done
}

if compgen -G ".whl/*.whl" >/dev/null; then
  step wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" .whl/*.whl
  export PYTHONPATH="$PYTHONPATH:$work/site" PATH="$PATH:$work/site/bin"
fi
for name in resolution-cuda.json quality-cuda.tar.gz; do
  [ -e "$out/$name" ] || [ ! -e "$state/$name" ] || cp "$state/$name" "$out"
done
[ ! -e "$out/quality-cuda.tar.gz" ] || tar -C "$work" -xzf "$out/quality-cuda.tar.gz" || failed=1
[ $failed -ne 0 ] || step build 240 "$python" -m gspn_dit.ops --require native-cuda
[ $failed -eq 0 ] || exit 1 # the reference operator would be measured
if [ "$part" != kernels ]; then
  step import 60 "$python" -c "import gspn_dit.models" # diffusers, and what of its friends is installed
  [ $failed -eq 0 ] || exit 1
fi
case $part in
  kernels) kernels ;;
  models)
    resolution 300
    quality "$total"
    ;;
  *) "$part" "$total" ;;
esac
exit $failed
