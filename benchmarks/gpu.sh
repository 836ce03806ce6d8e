#!/usr/bin/env bash
# benchmarks/gpu.sh OUT [--seconds N] [--state FOLDER] [--max-autotune] [PART...]: everything that needs a GPU, on a
# machine with a CUDA torch and nvcc.
#
#   tests      the GPU tests of the kernels; of passes over a block's maps, and of CUDA graphs
#   operator   speed of the operator beside the byte floor, attention and slower peers
#   budget     where the time of one block goes, gspn-dit-xl-2 and dit-xl-2, forward and training; ways to its
#              depthwise convolution
#   models     time and memory of whole models by image size
#   classifier images a second of classifiers and of timm's, at 224, 1024, 384 and 512 px
#   t2i        SD-XL generates 16384 × 8192 px end to end; one call of the UNets of SD-XL and SD 1.5 by size, beside
#              attention and the bound
#   profile    which kernels take the time, of the operator and of whole models; what Nsight Compute counts in them
#   sanitizer  compute-sanitizer's memcheck and racecheck on small maps
#   train      three minutes of training dit, gspn-dit and gspn-dit with convolutions, more each time it is run
#
# Without a PART it runs them all, in this order. Each ends within N seconds, four minutes if not told otherwise, the
# building of the kernels included where that is yet to be done; --seconds 0 is no limit. What matters most comes first
# in each, and is written as soon as it is measured. The same command goes on where it stopped: what OUT holds of a
# clean commit is not measured again, so give another commit another OUT. OUT gets PART.log, tables and pictures. The
# last lines are what is reached of the targets and a table of what became of every step; the exit status is 1 if any
# failed, was not finished or was not run.
#
# With --max-autotune, budget has blocks compiled in that mode, in files of their own, and models tries it beside the
# other settings of each model. Compiling then takes minutes, most of them to time products; what they are is kept on
# the machine, so the same command goes on there.
#
# PYTHON names the interpreter (python3). It needs torch and what this package needs; what it lacks is said at once, and
# the parts that need it are left out. --state keeps the checkpoints of train elsewhere than in OUT/train/state, DATA
# names other data for it: photos, or a folder with Fashion-MNIST's files. In a copy without git,
# GSPN_DIT_REVISION=HASH says which commit this is.
# shellcheck disable=SC2329 # parts are called by their names
set -uo pipefail
all=(tests operator budget models classifier t2i profile sanitizer train)
wrong() { # wrong WORDS...: refuse the command line
  echo "benchmarks/gpu.sh: $*; usage: benchmarks/gpu.sh OUT [--seconds N] [--state FOLDER] [--max-autotune] [PART...], PART out of ${all[*]}" >&2
  exit 2
}
seconds=240 out='' state='' mode=default tuned='' parts=()
while [ $# -gt 0 ]; do
  case $1 in
    --seconds) seconds=${2:-none} && shift ;;
    --seconds=*) seconds=${1#*=} ;;
    --state)
      [ -n "${2:-}" ] || wrong "--state: wanted a folder"
      state=$2 && shift
      ;;
    --state=*) state=${1#*=} ;;
    --max-autotune) mode=max-autotune tuned=-tuned ;;
    -*) wrong "$1: no such option" ;;
    *) if [ -z "$out" ]; then out=$1; else parts+=("$1"); fi ;;
  esac
  shift
done
[ -n "$out" ] || wrong "OUT is missing"
[[ $seconds =~ ^[0-9]+$ ]] || wrong "--seconds $seconds: wanted a whole number"
[ "$seconds" -gt 0 ] || seconds=''
for part in "${parts[@]}"; do
  [[ " ${all[*]} " == *" $part "* ]] || wrong "$part: no such part"
done
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")
mkdir -p "$out" && out=$(realpath "$out") || exit 1
state=$(realpath -m "${state:-$out/train/state}")
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PATH="$PATH:/usr/local/cuda/bin"
revision=$("$python" -c 'from benchmarks.revision import revision; print(revision())') || exit 1
case $revision in *"with changes" | *"no git checkout") kept='' ;; *) kept=$revision ;; esac
unfinished="run the same command again to go on" # said by a benchmark that its --time-budget has stopped
table=() failed=0 built=0 child='' log='' begun=0

left() { # left: the seconds that this part still has; 0 is no limit
  if [ -z "$seconds" ]; then echo 0; else echo $((seconds - (SECONDS - begun))); fi
}

note() { # note STEP RESULT SECONDS: a line of the table
  table+=("$(printf '%-11s %-30s %7s  %s' "$part" "$1" "$3" "$2")")
  echo "== $1: $2" | tee -a "$log"
  case $2 in ok | "done before" | "left out"*) ;; *) failed=1 ;; esac
}

step() { # step NAME COMMAND...: its output to the log and, the end of it, here
  local name=$1 start=$SECONDS limit from status
  shift
  if [ -n "$kept" ] && [ "$(cat "$out/.done-$name" 2>/dev/null)" = "$kept" ]; then
    note "$name" "done before" 0
    return
  fi
  limit=$(left)
  if [ -n "$seconds" ] && [ "$limit" -lt 1 ]; then
    note "$name" "NOT RUN: no time left" 0
    return 1
  fi
  echo "== $name: $*" | tee -a "$log"
  from=$(($(wc -l <"$log") + 1))
  timeout -k 5 "$limit" "$@" >>"$log" 2>&1 &
  child=$!
  wait $child
  status=$?
  child=''
  tail -n "+$from" "$log" | tail -n 30
  if [ $status -eq 124 ] || [ $status -eq 137 ]; then
    note "$name" "UNFINISHED: no time left" $((SECONDS - start))
  elif [ $status -ne 0 ]; then
    note "$name" "FAILED: exit status $status" $((SECONDS - start))
  elif tail -n "+$from" "$log" | grep -q "$unfinished"; then
    note "$name" "UNFINISHED: run it again" $((SECONDS - start))
  else
    note "$name" ok $((SECONDS - start))
    case $name in build | curves) ;; *) echo "$kept" >"$out/.done-$name" ;; esac
    return 0
  fi
  return 1
}

stop() { # at Ctrl-C or SIGTERM: what runs is told to end, and the table printed
  trap - INT TERM
  if [ -n "$child" ]; then kill -TERM "$child" && wait "$child"; fi
  failed=1
  report
}

report() { # what is reached, the table, and the end
  echo
  "$python" -m benchmarks.targets --results "$out" --out "$out/targets.md"
  printf '\n%-11s %-30s %7s  %s\n' part step seconds result
  printf '%s\n' "${table[@]}"
  exit $failed
}

within() { # within SECONDS: a --time-budget that ends so long before the part, or a week
  local budget=$(($(left) - $1))
  if [ -z "$seconds" ]; then echo 604800; else echo $((budget > 1 ? budget : 1)); fi
}

tests() {
  step tests "$python" -m pytest -q -m gpu --durations=5 --noconftest -p no:cacheprovider --maxfail=20 --tb=short \
    tests/ops/test_cuda.py tests/test_cuda_graphs.py
  if [ -n "${lacking[tests-models]:-}" ]; then
    note tests-models "NOT RUN: it lacks ${lacking[tests-models]}" 0
    return
  fi
  step tests-models "$python" -m pytest -q -m "gpu and not slow" --durations=5 -p no:cacheprovider --maxfail=20 \
    --tb=short tests/ops/test_passes.py tests/inference/test_graphed_model.py tests/training/test_training_speed.py
}

operator() {
  step operator "$python" -m benchmarks.operator --device cuda --out "$out"
}

budget() {
  local name kind
  for kind in forward training; do
    for name in gspn-dit-xl-2 dit-xl-2; do
      step "block-$name-$kind$tuned" "$python" -m benchmarks.block_budget --device cuda --name "$name" --step "$kind" \
        --compile-mode "$mode" --out "$out/block-$name-$kind$tuned.md"
    done
  done
  step depthwise "$python" -m benchmarks.depthwise --device cuda --out "$out/depthwise.md"
}

models() { # a case takes half a minute and more, most of it to compile
  step "models$tuned" "$python" -m benchmarks.resolution --device cuda --time-budget "$(within 15)" \
    ${tuned:+--max-autotune true} --out "$out/resolution-cuda"
}

classifier() { # the sizes with a target first; a call has the pixels of 128 images of 224 px; what is compiled comes last
  local tiny=gspn-t,gspn-grouped-t,swin_tiny_patch4_window7_224,convnext_tiny,mambaout_tiny
  local larger=gspn-s,gspn-grouped-s,swin_small_patch4_window7_224,convnext_small,mambaout_small
  larger+=,gspn-b,gspn-grouped-b,swin_base_patch4_window7_224,convnext_base,mambaout_base
  local program=("$python" -m benchmarks.classifier_throughput --device cuda) size
  for size in 224:128 1024:6 384:44 512:24; do
    step "classifiers-${size%:*}" "${program[@]}" --image-sizes "${size%:*}" --batch-size "${size#*:}" \
      --names "$tiny,$larger" --seconds "$(within 20)" --out "$out/classifiers-${size%:*}.md"
  done
  for size in 224:128 1024:6; do
    step "classifiers-compiled-${size%:*}" "${program[@]}" --compile true --image-sizes "${size%:*}" \
      --batch-size "${size#*:}" --names "$tiny" --seconds "$(within 20)" --out "$out/classifiers-compiled-${size%:*}.md"
  done
}

t2i() { # the whole image first; the table of calls goes on each time
  local program=("$python" -m benchmarks.text_to_image --device cuda)
  step t2i-generate "${program[@]}" --end-to-end true --out "$out/text-to-image-whole-cuda"
  step t2i-calls "${program[@]}" --time-budget "$(within 35)" --out "$out/text-to-image-cuda"
}

profile() { # the operator first: whole models take as long to compile as two cases of it take to count
  local program=("$python" -m benchmarks.kernel_profile --out "$out")
  step kernels-operator "${program[@]}" --what operator
  if command -v ncu >/dev/null; then
    step counters "${program[@]}" --what counters --time-budget "$(within 110)"
  else
    note counters "left out: no ncu, of Nsight Compute, on the PATH" 0
  fi
  step kernels-models "${program[@]}" --what models
}

train() { # 40 s to start, and for the step, the look and the checkpoints that are under way when the time is up
  local share
  share=$(within 40)
  step curves "$python" -m benchmarks.quality_curves --preset gpu --data "${DATA:-photos}" --state "$state" \
    --seconds "$([ -n "$seconds" ] && echo "$share" || echo 180)" --out "$out/train"
}

sanitizer() {
  if ! compute-sanitizer --report-api-errors no "$python" -c "import torch; torch.ones(1).cuda()" >>"$log" 2>&1; then
    note sanitizer "NOT RUN: compute-sanitizer is missing or does not run here" 0
    return
  fi
  # calls that torch makes and expects to fail are no errors; cached, what lies beyond a tensor may be allocated too
  step memcheck env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no \
    --error-exitcode 1 "$python" -m benchmarks.small_shapes
  step racecheck compute-sanitizer --tool racecheck --error-exitcode 1 "$python" -m benchmarks.small_shapes
}

trap stop INT TERM
echo "benchmarks/gpu.sh: ${parts[*]} of $revision"
declare -A lacking
wanted=("${parts[@]}")
[[ " ${parts[*]} " != *" tests "* ]] || wanted+=(tests-models)
while read -r part packages; do
  lacking[$part]=$packages
  echo "benchmarks/gpu.sh: $part lacks $packages"
done < <("$python" -m benchmarks.needed "${wanted[@]}")
for part in "${parts[@]}"; do
  begun=$SECONDS log=$out/$part.log
  echo "== $part of $revision, $(date -u +%FT%TZ)" >>"$log"
  if [ -n "${lacking[$part]:-}" ]; then
    note "$part" "NOT RUN: it lacks ${lacking[$part]}" 0
    continue
  fi
  if [ $built -eq 0 ]; then
    if step build "$python" -m gspn_dit.ops --require native-cuda; then
      built=1
    else
      note "$part" "NOT RUN: without the kernels the reference would be measured" 0
      continue
    fi
  fi
  "$part"
done
report
