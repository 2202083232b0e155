#!/bin/bash
# MODEL=FOLDER sbatch --array=0-3 --gpus 8 launch/slurm/served_data.sh solutions --config FILE --out DIR [--key value ...]
#
# As data.sh, for models that a machine's GPUs serve together: each task of the array starts a vLLM server on its machine, with a copy of
# MODEL on each GPU (TENSOR_PARALLEL=2 splits a copy over two), makes its shard at it, and stops it. A server that ends is started
# again: what is being asked waits for it and nothing is lost. After a failure give the same command again.
#SBATCH --job-name=stepladder-served
#SBATCH --ntasks=1
#SBATCH --nodes=1
#SBATCH --gpus=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --output=%x-%A-%a.log
#SBATCH --requeue
set -euo pipefail

stage=${1:?which stage: solutions, step_labels, omegaprm ...}
shift
model=${MODEL:?which model is served: MODEL=FOLDER}
shard=${SLURM_ARRAY_TASK_ID:?start it with --array=0-3}/${SHARDS:-$SLURM_ARRAY_TASK_COUNT}
port=$((20000 + (SLURM_JOB_ID + SLURM_ARRAY_TASK_ID) % 20000)) # two tasks may share a machine
split=${TENSOR_PARALLEL:-1}
copies=$((${SLURM_GPUS_ON_NODE:?no GPU was asked for: --gpus N} / split))

serve() {
  while true; do
    vllm serve "$model" --port "$port" --tensor-parallel-size "$split" --data-parallel-size "$copies" &
    server=$!
    trap 'kill "$server" 2>/dev/null; exit 0' TERM
    wait "$server" || true
    echo "the server ended; it is started again" >&2
    sleep "${RESTART_SECONDS:-5}"
  done
}
serve &
keeper=$!
trap 'kill "$keeper" 2>/dev/null; wait "$keeper" 2>/dev/null || true' EXIT

for ((tries = 0; ; tries++)); do # a large model takes minutes to load
  if curl --silent --fail "http://127.0.0.1:$port/health" >/dev/null; then break; fi
  if ((tries >= ${WAIT_TRIES:-360})); then
    echo "vllm serve $model did not come up" >&2
    exit 1
  fi
  sleep "${WAIT_SECONDS:-5}"
done
stepladder data "$stage" "$@" --policy "$model" --backend openai --base_url "http://127.0.0.1:$port/v1" --shard "$shard"
