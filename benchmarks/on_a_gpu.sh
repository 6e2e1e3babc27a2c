#!/usr/bin/env bash
# Everything that needs a GPU, the cheapest and most important first.
#
#     bash benchmarks/on_a_gpu.sh [STEP …]        all steps if none is named
#
# A step that fails or runs out of its time stops no other. The failed ones are named at the end, and the exit status is
# then 1. $OUT (default: runs/on_a_gpu) gets two files: output.txt, what the steps say while they say it, and
# results.tgz, benchmarks/results/gpu as it is after each step. On the machine that keeps the results:
# `tar xzf results.tgz -C benchmarks/results`. Compiled code, encoded prompts and measured choices stay in $CACHES
# (default: runs/gpu_caches), for later steps and later calls.
#
# Each step has a limit; together they are 84 minutes. If a command may take no more than ten minutes, these are the
# first three, half an hour in all, best on a card of 140 GB, which baseline A needs:
#
#     bash benchmarks/on_a_gpu.sh noise rates attention blocks group_kernel
#     bash benchmarks/on_a_gpu.sh throughput
#     bash benchmarks/on_a_gpu.sh kernels smoke
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-runs/on_a_gpu} CACHES=${CACHES:-$PWD/runs/gpu_caches}
export TORCHINDUCTOR_CACHE_DIR="$CACHES/inductor" TRITON_CACHE_DIR="$CACHES/triton" DGPO_FAST_CACHE="$CACHES/dgpo_fast"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
minutes=${MINUTES:-8} chosen=("$@") names=() failed=() collecting=1

steps() {
    local test="python3 -m pytest -n 0 -q" ask="python3 -m benchmarks.gpu_questions"
    local throughput="python3 benchmarks/throughput.py"
    step noise 90 $test -x tests/kernels/test_kernels_cuda.py -k noise_is_the_cpus
    step rates 120 $ask rates
    step attention 200 $ask attention
    step blocks 120 $ask blocks
    step group_kernel 50 $ask group_kernel
    step throughput $((60 * minutes + 60)) $throughput --only "LoRA, guided, G 16" --rounds 2 --minutes "$minutes"
    step kernels 290 python3 benchmarks/kernels.py bench report
    step smoke 300 $test -x --durations=5 -k "not sanitizer" tests/kernels/test_kernels_cuda.py tests/engine/test_cuda.py
    step profile 280 bash -c 'rm -rf runs/gpu_profile && python3 -m dgpo_fast.profile sd35m-geneval --random-weights \
        --rewards jpeg --name gpu_profile --rollout.groups 4 --policy.micro-batch 32 --evaluation.images 2 &&
        cp runs/gpu_profile/report.html runs/gpu_profile/report.json benchmarks/results/gpu/'
    step changes 300 $throughput --only "all settings" rollout_precision engine.compile cuda_graphs --minutes 4.5
    step cases 570 $throughput --only unguided "G 24" full --minutes 9
    step savings 570 $throughput --only savings changes --minutes 9
    step tests 450 $test -m cuda --durations=10 -k "not sanitizer"
    step float8 260 $throughput --only float8 --minutes 4
    step tune 300 python3 benchmarks/kernels.py tune
    step first_light 300 python3 benchmarks/first_light.py --seeds 0
    step sanitizer 300 $test -m cuda -k sanitizer
}

step() {
    local name=$1 seconds=$2 started=$SECONDS status before
    shift 2
    if ((collecting)); then
        names+=("$name")
        return
    fi
    ((${#chosen[@]} == 0)) || [[ " ${chosen[*]} " == *" $name "* ]] || return 0
    echo "== $name, $seconds s at most: $*" | tee -a "$OUT/output.txt"
    before=$(wc -l < "$OUT/output.txt")
    timeout --kill-after=10 "$seconds" "$@" >> "$OUT/output.txt" 2>&1
    status=$?
    tail -n +$((before + 1)) "$OUT/output.txt" | tail -n 15
    echo "== $name: status $status after $((SECONDS - started)) s" | tee -a "$OUT/output.txt"
    ((status == 0)) || failed+=("$name")
    pack
}

# In one move: whoever ends this does not leave half a file.
pack() {
    tar czf "$OUT/results.tgz.new" -C benchmarks/results gpu && mv "$OUT/results.tgz.new" "$OUT/results.tgz"
}

steps
for name in "${chosen[@]}"; do
    [[ " ${names[*]} " == *" $name "* ]] || { echo "error: no step '$name'; there are ${names[*]}" >&2; exit 2; }
done
python3 -c "import torch; assert torch.cuda.is_available()" || { echo "error: torch finds no CUDA GPU here" >&2; exit 2; }
mkdir -p "$OUT" "$CACHES" benchmarks/results/gpu
python3 -c "from importlib.util import find_spec as found
print('not installed:', *(name for name in ('torchao', 'xformers', 'flash_attn', 'bitsandbytes') if not found(name)))"
trap 'pack; exit 143' TERM INT
collecting=0
steps
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}" | tee -a "$OUT/output.txt"; exit 1; }
