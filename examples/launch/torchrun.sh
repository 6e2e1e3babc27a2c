#!/usr/bin/env bash
# A run on all GPUs of this machine, or on several machines, under torchrun.
#
#   bash examples/launch/torchrun.sh sd35m-ocr --name my-run
#   NODES=4 HEAD=node0 bash examples/launch/torchrun.sh sd35m-ocr --name my-run     # on each of four machines
#
# HEAD is the first machine's name, PROCESSES the number of processes on each machine (default: its GPUs, or 1).
set -euo pipefail
nodes=${NODES:-1}
[ "$nodes" = 1 ] || head=${HEAD:?is the name of the first machine}
processes=${PROCESSES:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
if [ "$nodes" = 1 ]; then
    exec torchrun --standalone --nproc-per-node "$processes" --max-restarts 3 -m dgpo_fast.train "$@"
fi
exec torchrun --nnodes "$nodes" --nproc-per-node "$processes" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$head:${PORT:-29500}" --rdzv-id "${RUN_ID:-dgpo_fast}" \
    -m dgpo_fast.train "$@"
