#!/usr/bin/env bash
# Everything that needs a GPU, the most important first: tests, throughput, profile, kernels, float8, whole runs.
#
#     bash benchmarks/on_a_gpu.sh [STEP …]        all steps where none is named
#
# A step that fails or runs out of its time stops no other; its output is in logs/STEP.txt of $OUT, which also gets a
# copy of benchmarks/results/gpu after each step. Exit status 1 where a step failed.
#
# Each step has a limit; together they are 48 minutes. Where a command may take no more than ten, these are commands of
# their own. The limits of the first three are 27 minutes:
#
#     bash benchmarks/on_a_gpu.sh tests
#     bash benchmarks/on_a_gpu.sh throughput
#     bash benchmarks/on_a_gpu.sh profile kernels
#     bash benchmarks/on_a_gpu.sh float8 micro_batch
#     bash benchmarks/on_a_gpu.sh cases
#     bash benchmarks/on_a_gpu.sh first_light
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

step tests 450 python -m pytest -m cuda -n 0 -q --durations=10
step throughput 570 python benchmarks/throughput.py --only "LoRA, guided, G 16" savings changes --minutes 9
step profile 200 python -m dgpo_fast.profile sd35m-geneval --random-weights --rewards jpeg --name profile --runs-dir "$OUT"
step kernels 380 python benchmarks/kernels.py test tune bench report
step float8 260 python benchmarks/throughput.py --only float8 --minutes 4
step micro_batch 120 python -m dgpo_fast.train sd35m-geneval --random-weights --rewards jpeg --policy.micro-batch auto \
    --iterations 1 --evaluation.images 8 --name micro_batch --runs-dir "$OUT"
step cases 570 python benchmarks/throughput.py --only unguided "G 24" full --minutes 9
step first_light 300 python benchmarks/first_light.py --seeds 0
exit $failed
