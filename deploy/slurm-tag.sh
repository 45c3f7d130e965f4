#!/bin/bash
# Tag a large input on Slurm with several workers: an array job. Each task tags its share of the parts and then helps
# with the others; the last one writes _SUCCESS.json. Set the variables of input, output and adapter, then:
#   sbatch --export=ALL deploy/slurm-tag.sh
# PROGRAM names the program, for example
#   "apptainer run --nv --env HF_HOME=$HOME/.cache/huggingface docker://ghcr.io/owner/tagger-job:0.2.0"
# HF_HOME is where `hf auth login` keeps the token; in the image it is a folder that only Docker makes writable.
#SBATCH --job-name=tagger-tag
#SBATCH --array=0-7
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@30
set -u
: "${TAGGER_TAG_INPUT:?}" "${TAGGER_TAG_OUTPUT:?}"

# --signal reaches the steps that srun starts, not this script
read -r -a program <<< "${PROGRAM:-tagger-job}"
srun "${program[@]}" tag
code=$?
if [ "$code" -eq 75 ]; then # interrupted: what is sealed is kept, and the same task does the rest
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" && exit 0
fi
exit "$code"
