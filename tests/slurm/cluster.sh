#!/usr/bin/env bash
# A throw-away SLURM cluster on one machine, for tests: cluster.sh FOLDER start NODES | stop | power-off NODE | power-on NODE
#
# Every node is a slurmd in its own host name and mount namespace; everything listens on 127.0.0.1 and keeps its state in
# FOLDER. Nothing under /etc is touched. `start` begins with an empty queue, however the last cluster ended.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
folder=$1
action=$2
port=${SLURM_TEST_PORT:-26817} # of the controller; node i has port + i
export SLURM_CONF=$folder/etc/slurm.conf

running() { # running NAME: the process of that name is alive, is ours, and is no zombie
    local pid state
    pid=$(cat "$folder/run/$1.pid" 2>/dev/null) || return 1
    state=$(sed -n 's/^State:\t\(.\).*/\1/p' "/proc/$pid/status" 2>/dev/null) || return 1
    [[ -n $state && $state != Z ]] && tr '\0' ' ' <"/proc/$pid/cmdline" | grep -qF -- "$folder"
}

until_true() { # until_true SECONDS COMMAND...
    local tries=$(($1 * 20))
    shift
    until "$@" >/dev/null 2>&1; do
        ((tries-- > 0)) || return 1
        sleep 0.05
    done
}

daemon() { # daemon NAME COMMAND...
    setsid "${@:2}" </dev/null >>"$folder/log/$1.out" 2>&1 &
    echo $! >"$folder/run/$1.pid"
}

power_on() { # a node: its own host name, and /etc/hosts that knows all of them
    mkdir -p "$folder/spool/$1"
    # shellcheck disable=SC2016  # the inner shell expands
    daemon "$1" unshare --uts --mount --propagation private bash -c \
        'hostname "$1" && mount --bind "$2/etc/hosts" /etc/hosts && exec slurmd -D -N "$1" -f "$2/etc/slurm.conf"' node "$1" "$folder"
}

power_off() { # everything in the node's namespace dies at once, as when its power fails
    local pid space process
    pid=$(cat "$folder/run/$1.pid")
    space=$(readlink "/proc/$pid/ns/uts")
    [[ $space != "$(readlink /proc/self/ns/uts)" ]]
    for process in /proc/[0-9]*; do
        if [[ $(readlink "$process/ns/uts" 2>/dev/null) == "$space" ]]; then
            kill -9 "${process#/proc/}" 2>/dev/null || :
        fi
    done
}

configure() { # configure NODES
    mkdir -p "$folder"/{etc,log,spool,state,munge,run}
    chmod 755 "$folder" "$folder"/*
    [[ -s $folder/munge/key ]] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
    cp /etc/hosts "$folder/etc/hosts"
    {
        cat <<CONF
ClusterName=flagdit
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.own
SlurmdPidFile=$folder/run/%n.own
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/%n.log
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmctldTimeout=5
SlurmdTimeout=5
BatchStartTimeout=10
MessageTimeout=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
TCPTimeout=2
KillWait=5
CompleteWait=0
UnkillableStepTimeout=20
MinJobAge=600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
CONF
        for i in $(seq "$1"); do
            echo "127.0.0.1 node$i" >>"$folder/etc/hosts"
            echo "NodeName=node$i NodeHostname=node$i NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=8 Boards=1 SocketsPerBoard=1" \
                "CoresPerSocket=8 ThreadsPerCore=1 RealMemory=8192 State=UNKNOWN"
        done
        echo "PartitionName=main Nodes=ALL Default=YES GraceTime=20 MaxTime=1-00:00:00 State=UP PriorityTier=1"
        echo "PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF"
    } >"$SLURM_CONF"
}

all_idle() { [[ $(sinfo --noheader --partition=main --Node --format=%t | grep -c '^idle$') == "$1" ]]; }

start() { # start NODES
    stop
    rm -rf "$folder"/{state,spool,run}
    configure "$1"
    daemon munged munged --foreground --key-file="$folder/munge/key" --socket="$folder/munge/socket" --force \
        --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" --seed-file="$folder/munge/seed" --num-threads=4
    until_true 10 munge --socket="$folder/munge/socket" --no-input
    daemon slurmctld slurmctld -D -i -f "$SLURM_CONF"
    until_true 10 scontrol ping
    for i in $(seq "$1"); do power_on "node$i"; done
    until_true 30 all_idle "$1"
}

stop() { # jobs first, so that no step is left behind
    if running slurmctld; then
        timeout 5 scancel --user="$(id -un)" || :
        # shellcheck disable=SC2016
        until_true 15 bash -c '[[ -z $(squeue --noheader --states=R,CG) ]]' || :
    fi
    local file name pid
    for file in "$folder"/run/node*.pid "$folder"/run/{slurmctld,munged}.pid; do
        name=$(basename "$file" .pid)
        running "$name" || continue
        pid=$(cat "$file")
        kill "$pid" || :
        until_true 5 bash -c "! grep -q '^State:.[^Z]' /proc/$pid/status" || kill -9 "$pid" || :
    done
}

case $action in
    start) start "$3" || { tail -n 20 "$folder"/log/*; exit 1; } ;;
    stop) stop ;;
    power-off) power_off "$3" ;;
    power-on) power_on "$3" ;;
    *)
        sed -n 2p "$0"
        exit 2
        ;;
esac
