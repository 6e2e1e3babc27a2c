#!/usr/bin/env bash
# Everything that needs a GPU, the most important first.
#
#     bash benchmarks/on_a_gpu.sh [STEP …]        all steps where none is named
#
# A step that fails or runs out of its time stops no other; its output is in STEP.txt of $OUT. After each step
# $OUT/results.tgz holds benchmarks/results/gpu as it then is: `tar xzf results.tgz -C benchmarks/results` on the
# machine that keeps it. Exit status 1 where a step failed.
#
# Each step has a limit; together they are 74 minutes. Where a command may take no more than ten minutes, these are the
# first ones, best on a card of 140 GB, which baseline A needs; on the left with half an hour in all, on the right with
# a quarter:
#
#     bash benchmarks/on_a_gpu.sh smoke profile       MINUTES=5 bash benchmarks/on_a_gpu.sh smoke throughput
#     bash benchmarks/on_a_gpu.sh throughput          bash benchmarks/on_a_gpu.sh profile
#     bash benchmarks/on_a_gpu.sh changes kernels
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-runs/on_a_gpu} PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$OUT" benchmarks/results/gpu
python3 -c "import torch; assert torch.cuda.is_available()" || { echo "error: torch finds no CUDA GPU here" >&2; exit 2; }

failed=0
step() {
    local name=$1 seconds=$2
    shift 2
    [[ -z $chosen || " $chosen " == *" $name "* ]] || return 0
    echo "== $name, $seconds s at most: $*"
    local started=$SECONDS
    timeout --kill-after=10 "$seconds" "$@" > "$OUT/$name.txt" 2>&1
    local status=$?
    tail -n 15 "$OUT/$name.txt"
    echo "== $name: status $status after $((SECONDS - started)) s"
    ((status == 0)) || failed=1
    tar czf "$OUT/results.tgz" -C benchmarks/results gpu
}
chosen="$*" minutes=${MINUTES:-8}
throughput="python3 benchmarks/throughput.py"

step smoke 300 python3 -m pytest -x -n 0 -q --durations=5 -k "not sanitizer" \
    tests/kernels/test_kernels_cuda.py tests/engine/test_cuda.py
step profile 280 bash -c 'python3 -m dgpo_fast.profile sd35m-geneval --random-weights --rewards jpeg \
    --name gpu_profile --rollout.groups 2 --rollout.batch-size 16 --evaluation.images 2 &&
    cp runs/gpu_profile/report.html runs/gpu_profile/report.json benchmarks/results/gpu/'
step throughput $((60 * minutes + 60)) $throughput --only "LoRA, guided, G 16" --rounds 2 --minutes "$minutes"
step changes 300 $throughput --only "all settings" rollout_precision engine.compile cuda_graphs --minutes 4.5
step kernels 290 python3 benchmarks/kernels.py bench report
step cases 570 $throughput --only unguided "G 24" full --minutes 9
step savings 570 $throughput --only savings changes --minutes 9
step tests 450 python3 -m pytest -m cuda -n 0 -q --durations=10 -k "not sanitizer"
step float8 260 $throughput --only float8 --minutes 4
step tune 300 python3 benchmarks/kernels.py tune
step first_light 300 python3 benchmarks/first_light.py --seeds 0
step sanitizer 300 python3 -m pytest -m cuda -n 0 -q -k sanitizer
exit $failed
