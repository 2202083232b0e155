#!/bin/bash
# sbatch --nodes 2 --gpus-per-node 8 launch/slurm/train.sh prm --config FILE [--key value ...]
#
# Trains on several machines: one task a machine, and accelerate starts a process for each GPU there. A job that was
# stopped continues from its newest whole checkpoint when the same command is given again. The output folder must be
# on a file system that all machines see. ACCELERATE_CONFIG names another configuration than ZeRO-3, relative to where
# sbatch is called.
#SBATCH --job-name=stepladder-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
set -euo pipefail

trainer=${1:?which trainer: sft, orm or prm}
shift
config=${ACCELERATE_CONFIG:-launch/accelerate/multi_node.yaml}
gpus=${SLURM_GPUS_ON_NODE:?no GPU was asked for: --gpus-per-node N}
machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=${machines%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs that share a machine must not meet

# SLURM_NODEID is known on each machine only: single quotes keep it until then.
srun --ntasks-per-node=1 --kill-on-bad-exit=1 \
  bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
  --config_file "$config" \
  --num_machines "$SLURM_JOB_NUM_NODES" \
  --num_processes "$((SLURM_JOB_NUM_NODES * gpus))" \
  --main_process_ip "$address" \
  --main_process_port "$port" \
  -m "stepladder.trainers.$trainer" "$@"
