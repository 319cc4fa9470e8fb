#!/usr/bin/env bash
#SBATCH --job-name=big-encode
#SBATCH --account=u1234
#SBATCH --partition=gpu
#SBATCH --qos=normal
#SBATCH --reservation=friday
#SBATCH --time=08:00:00
#SBATCH --mem=240G
#SBATCH --constraint="a100&ib"
#SBATCH --comment="the big one"
#SBATCH --gres=gpu:a100:4
#SBATCH --chdir=/work-folder
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --array=0-1
#SBATCH --output=/shared/encoded/logs/slurm_%A_%a.out
#SBATCH --requeue
#SBATCH --dependency=afterok:41

# Encoding of 2 data sets, one a task, written by `flagdit launch encode`. A task that is queued again goes on
# where it was.
set -euo pipefail

# The environment.
module load python/3.11
module load cuda/12.8

export PYTHONUNBUFFERED=1
export PYTHONFAULTHANDLER=1
export OMP_NUM_THREADS=4
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export NCCL_IB_TIMEOUT=22
export NCCL_IB_RETRY_CNT=7
export NCCL_SOCKET_IFNAME='^lo,docker'
export NCCL_P2P_LEVEL=NVL
export TRITON_CACHE_DIR="/tmp/flagdit/$UID/triton"
export TORCHINDUCTOR_CACHE_DIR="/tmp/flagdit/$UID/inductor"

sources=(
    '/raw/part 0'
    /raw/part-1
)
source=${sources[$SLURM_ARRAY_TASK_ID]}
out=/shared/encoded/$(basename "$source")
echo "[$(date '+%F %T')] $source to $out on $SLURM_JOB_NODELIST"
srun --cpus-per-task=8 python -m flagdit.cli data encode "$source" "$out" --recipe /shared/encoded/logs/recipe.yaml
