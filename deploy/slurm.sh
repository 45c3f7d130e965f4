#!/bin/bash
# Train on Slurm, on one machine or on several (--nodes). The run is in TAGGER_RUN_DIR on a disk that all nodes see, and
# resumes from it. Log in to the Hub once with `hf auth login`, set the variables of the job, then:
#   sbatch --export=ALL deploy/slurm.sh
# PROGRAM names the program, for example
#   "apptainer run --nv --env HF_HOME=$HOME/.cache/huggingface docker://ghcr.io/owner/tagger-job:0.2.0"
# HF_HOME is where `hf auth login` keeps the token; in the image it is a folder that only Docker makes writable.
# deploy/slurm-tag.sh tags files with an array job.
#SBATCH --job-name=tagger-job
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@30
set -u
export TAGGER_RUN_ID=${TAGGER_RUN_ID:-tagger-$SLURM_JOB_ID} # the same after a requeue
export NNODES=$SLURM_JOB_NUM_NODES MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR

# --signal reaches the steps that srun starts, not this script; each of them is one machine
read -r -a program <<< "${PROGRAM:-tagger-job}"
# shellcheck disable=SC2016 # each machine has a number of its own
srun bash -c 'NODE_RANK=$SLURM_NODEID exec "$@"' job "${program[@]}" run
code=$?
# srun returns the highest code of its machines. 75: interrupted, and the same job resumes; but not forever, if one
# machine fails each time.
if [ "$code" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
