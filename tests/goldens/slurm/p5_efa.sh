#!/usr/bin/env bash
#SBATCH --job-name=big
#SBATCH --partition=p5
#SBATCH --time=2-00:00:00
#SBATCH --exclude=p5-[3,7]
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --chdir=/work-folder
#SBATCH --open-mode=append
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=192
#SBATCH --output=/shared/runs/big/logs/slurm_%j.out
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --dependency=singleton

# Training of big, written by `flagdit launch slurm`. The job may be queued again by itself: at most 20 times,
# after SIGUSR1 or SIGTERM (the run has saved by then), after a node failed, and after a bad node was found.
set -uo pipefail

run=/shared/runs/big
logs=/shared/runs/big/logs
state="$run/slurm"
most_restarts=20
restart=${SLURM_RESTART_COUNT:-0}
mkdir -p "$state" "$logs"

say() { echo "[$(date '+%F %T')] $*"; }
record() { echo "{\"job\": \"$SLURM_JOB_ID\", \"restart\": $restart, \"event\": \"$1\", \"time\": $(date +%s)}" >>"$state/events.jsonl"; }

# The environment.
ulimit -l unlimited
# shellcheck disable=SC1091
source /fsx/envs/flagdit/bin/activate

export PYTHONUNBUFFERED=1
export PYTHONFAULTHANDLER=1
export OMP_NUM_THREADS=12
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export FI_PROVIDER=efa
export FI_EFA_USE_DEVICE_RDMA=1
export FI_EFA_FORK_SAFE=1
export NCCL_SOCKET_IFNAME='^lo,docker'
export NCCL_DEBUG=WARN
export TRITON_CACHE_DIR="/opt/dlami/nvme/flagdit/$UID/triton"
export TORCHINDUCTOR_CACHE_DIR="/opt/dlami/nvme/flagdit/$UID/inductor"

# The ranks find each other at the first node. The port differs from job to job, so that neighbours do not meet.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# Hold, leave the nodes out, release: SLURM takes a change of nodes of waiting jobs only.
again() { # again REASON [NODE,...]
    if ((restart >= most_restarts)); then
        say "$1; not queued again: cluster.restarts=$most_restarts"
        record "gave up"
        exit 1
    fi
    say "$1; queued again ($((restart + 1)) of $most_restarts)"
    record "requeue"
    if [[ -n ${2:-} ]]; then
        tr ',' '\n' <<<"$2" >>"$state/bad_nodes"
    fi
    trap '' TERM
    if [[ -s $state/bad_nodes ]]; then
        python -m flagdit.launch.requeue "$SLURM_JOB_ID" "$(sort -u "$state/bad_nodes" | paste -sd,)" || exit 1
    else
        timeout 60 scontrol requeue "$SLURM_JOB_ID" || exit 1
    fi
    sleep 120 # until SLURM ends this script
    exit 1
}

if ((restart > most_restarts)); then
    say "restarted $restart times, more than cluster.restarts=$most_restarts: giving up"
    record "gave up"
    exit 1
fi
if [[ -e $state/stop ]]; then
    say "the run was stopped (flagdit stop); nothing to do"
    exit 0
fi
# SLURM signals this script before the time is up and when it preempts. `wait` returns at every signal: it is asked again.
asked=
step=
waiting=
trap 'asked=USR1; waiting=1; [[ -z $step ]] || kill -USR1 "$step"' USR1
trap 'asked=${asked:-TERM}; waiting=1' TERM
record "start"
say "job $SLURM_JOB_ID, restart $restart, on $SLURM_JOB_NODELIST"

# A bad node is found in a minute here, or after hours there.
rm -f "$state"/health/*.json
if ! srun --ntasks-per-node=1 --ntasks=4 --cpus-per-task=24 python -m flagdit.launch.health --gpus 8 --min-disk 50 --min-bandwidth 20 --folder "$state/health" --cache /opt/dlami/nvme/flagdit; then
    bad=$(python -m flagdit.launch.health --bad "$state/health" --nodes "$SLURM_JOB_NODELIST")
    [[ -n $bad ]] || { say "the health check failed and blames no node: see $state/health"; record "failed"; exit 1; }
    again "bad nodes: $bad" "$bad"
fi

# Ranks that are signalled save and leave with 138 (SIGUSR1) or 143 (SIGTERM). srun tells on stderr how each ended: one that
# knew why (2) or else the first is the cause, the others are consequences.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --cpus-per-task=192 --output=/shared/runs/big/logs/node_%t.log \
    python -m torch.distributed.run --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --max-restarts=0 --rdzv-id="$SLURM_JOB_ID.$restart" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 -m flagdit.cli train /shared/runs/big/slurm/recipe.yaml 2>"$state/srun.log" &
step=$!
while :; do
    waiting=
    wait "$step"
    code=$?
    [[ -n $waiting ]] || break
done
cat "$state/srun.log"
ends=$(grep -E 'tasks? [0-9,-]+: ' "$state/srun.log")
first=$(grep -m 1 -E 'exit code 2$' <<<"$ends" || head -n 1 <<<"$ends")

if [[ -e $state/stop ]]; then
    say "stopped by flagdit stop; the same launch continues the run"
    record "stopped"
    exit 0
elif ((code == 0)); then
    say "done"
    record "done"
    exit 0
elif [[ -n $asked || $first =~ exit\ code\ (138|143)$ ]]; then
    again "saved after ${asked:-a signal}"
elif [[ -s $state/suspect ]]; then
    bad=$(cat "$state/suspect")
    rm -f "$state/suspect"
    again "a rank on $bad hung or failed" "$bad"
fi
say "failed: ${first:-exit code $code}; see $logs"
record "failed"
exit "$code"
