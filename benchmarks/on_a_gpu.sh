#!/usr/bin/env bash
# Everything that needs a GPU, the most important first: tests, kernels, throughput, profile, a whole run.
#
#     bash benchmarks/on_a_gpu.sh [STEP …]        all of it takes about half an hour
#
# A step that fails or runs out of its time stops no other; its output is in logs/STEP.txt of $OUT, which also gets a
# copy of benchmarks/results/gpu after each step. Exit status 1 where a step failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/on_a_gpu}
mkdir -p "$OUT/logs" benchmarks/results/gpu
python -c "import torch; assert torch.cuda.is_available()" 2> /dev/null || { echo "error: torch finds no CUDA GPU here" >&2; exit 2; }

failed=0
step() {
    local name=$1 seconds=$2
    shift 2
    [[ -z $chosen || " $chosen " == *" $name "* ]] || return 0
    echo "== $name, $seconds s at most: $*"
    local started=$SECONDS
    timeout --kill-after=10 "$seconds" "$@" > "$OUT/logs/$name.txt" 2>&1
    local status=$?
    tail -n 15 "$OUT/logs/$name.txt"
    echo "== $name: status $status after $((SECONDS - started)) s"
    ((status == 0)) || failed=1
    cp -r benchmarks/results/gpu "$OUT/"
}
chosen="$*"

step tests 300 python -m pytest -m cuda -n 0 -q --durations=10
step kernels 420 python benchmarks/kernels.py test tune bench report
step throughput 570 python benchmarks/throughput.py --minutes 9
step profile 240 python -m dgpo_fast.profile sd35m-geneval --random-weights --rewards jpeg --name profile --runs-dir "$OUT"
step first_light 300 python benchmarks/first_light.py --seeds 0
step micro_batch 120 python -m dgpo_fast.train sd35m-geneval --random-weights --rewards jpeg --policy.micro-batch auto \
    --iterations 1 --evaluation.images 8 --name micro_batch --runs-dir "$OUT"
exit $failed
