#!/bin/bash
# sbatch --array=0-7 launch/slurm/data.sh solutions --config FILE --out DIR [--key value ...]
#
# Makes rows in shards, one task of the array each (0-based: with 8 shards 0/8 to 7/8). DIR must be on a file system
# that all machines see. The task that finds every unit done joins the rows; they are the same, byte for byte, for any
# number of shards. After a failure give the same command again: what is done is skipped. SHARDS=8 with --array=3
# makes one shard of eight.
#SBATCH --job-name=stepladder-data
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=%x-%A-%a.log
#SBATCH --requeue
set -euo pipefail

stage=${1:?which stage: demonstrations, solutions, step_labels or best_solutions}
shift
shard=${SLURM_ARRAY_TASK_ID:?start it with --array=0-7}/${SHARDS:-$SLURM_ARRAY_TASK_COUNT}
exec stepladder data "$stage" "$@" --shard "$shard"
