#!/usr/bin/env bash
# A real SLURM on this machine alone, to try the job scripts beside this file and to test them:
#
#   scripts/slurm/local_cluster.sh start             starts it; says how to talk to it
#   scripts/slurm/local_cluster.sh run COMMAND...    runs a command that can use sbatch, srun, squeue; starts a
#                                                    cluster for it, and stops that again, unless one is running
#   scripts/slurm/local_cluster.sh stop              cancels all jobs and stops it
#   eval "$(scripts/slurm/local_cluster.sh env)"     lets this shell talk to it
#
# The daemons are Debian's own (apt-get install slurm-wlm munge), started in user space from a scratch folder with a
# configuration, key, socket and ports of their own, on 127.0.0.1: a SLURM that the machine may be part of is left
# alone. They stop by themselves after a time limit. Any user can do this; root is not needed.
#
# Variables:
#   ARF_SLURM_DIR      scratch folder                               (/tmp/arf-slurm-USER_ID)
#   ARF_SLURM_NODES    nodes, each a slurmd of its own              (2)
#   ARF_SLURM_CPUS     CPUs that each node claims to have           (4)
#   ARF_SLURM_MINUTES  time limit of the whole cluster              (60)
#   ARF_SLURM_PORT     first port to try                            (26817)
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # where Debian keeps daemons

dir=${ARF_SLURM_DIR:-${TMPDIR:-/tmp}/arf-slurm-$(id -u)}
nodes=${ARF_SLURM_NODES:-2}
cpus=${ARF_SLURM_CPUS:-4}
minutes=${ARF_SLURM_MINUTES:-60}
first_port=${ARF_SLURM_PORT:-26817}

die() {
    echo "local_cluster.sh: $*" >&2
    exit 1
}

need() {
    local tool missing=()
    for tool in munged slurmctld slurmd scontrol sbatch setsid flock ss; do
        command -v "$tool" >/dev/null || missing+=("$tool")
    done
    [ ${#missing[@]} -eq 0 ] ||
        die "not installed: ${missing[*]}. On Debian and Ubuntu: apt-get install slurm-wlm munge util-linux iproute2"
}

# ours PID: is this a process of this cluster? A pid file may be left over, and its number may be another's by now.
ours() {
    [ -n "$1" ] && [ -r "/proc/$1/cmdline" ] && tr '\0' '\n' <"/proc/$1/cmdline" 2>/dev/null | grep -qF "$dir/"
}

gone() { ! ours "$1"; }

pid_of() { cat "$dir/$1.pid" 2>/dev/null || true; }

is_up() { [ -f "$dir/slurm.conf" ] && ours "$(pid_of slurmctld)" && scontrol ping 2>/dev/null | grep -q UP; }

# free_ports N: the first N free ports from first_port on. Below 32768, where outgoing connections take theirs.
free_ports() {
    local port=$first_port found=0
    while [ "$found" -lt "$1" ]; do
        [ "$port" -le 65535 ] || die "no free ports from $first_port on"
        if [ -z "$(ss -Htan "sport = :$port")" ]; then
            echo "$port"
            found=$((found + 1))
        fi
        port=$((port + 1))
    done
}

# until_true SECONDS COMMAND...
until_true() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.2
    done
}

nodes_are_idle() { [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | wc -l)" -eq "$nodes" ]; }

configure() {
    local ports host user number
    mapfile -t ports < <(free_ports $((nodes + 1)))
    host=$(hostname -s)
    user=$(id -un)
    cat >"$dir/slurm.conf" <<CONF
ClusterName=arf-local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
SlurmUser=$user
SlurmdUser=$user
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
# Nodes say how many CPUs they have, whatever the machine's number: all jobs of a small test run at once.
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
# Quick to start the next job, as nobody else is waiting.
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=5
CONF
    for number in $(seq "$nodes"); do
        echo "NodeName=local$number NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[$number]} CPUs=$cpus"
        mkdir -p "$dir/spool-local$number"
    done >>"$dir/slurm.conf"
    echo "PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$dir/slurm.conf"
}

start() {
    need
    mkdir -p "$dir"
    [ -O "$dir" ] || die "$dir belongs to somebody else; set ARF_SLURM_DIR to a folder of your own"
    [ ${#dir} -le 80 ] || die "$dir is too long a path for a socket; set ARF_SLURM_DIR to a shorter one"
    chmod 711 "$dir" # munged wants its socket to be reachable
    exec 9>"$dir/lock"
    flock 9 # two starts at once become one
    if is_up; then
        echo "already running in $dir" >&2
        return
    fi
    stop # what is left of an earlier one
    rm -rf "$dir/state" "$dir"/spool-* "$dir"/*.log "$dir"/munge.*
    (
        umask 077
        mkdir "$dir/state"
        head -c 128 /dev/urandom >"$dir/munge.key"
        : >"$dir/munge.log"
    )
    configure
    # --force: munged would rather not live below a folder like /tmp; the key is readable by this user alone.
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munge.log" --seed-file="$dir/munge.seed" 2>>"$dir/munge.log" 9>&- ||
        die "munged does not start; see $dir/munge.log"
    slurmctld -f "$dir/slurm.conf" 9>&- || die "slurmctld does not start; see $dir/slurmctld.log"
    local number
    for number in $(seq "$nodes"); do
        slurmd -f "$dir/slurm.conf" -N "local$number" 9>&- ||
            die "slurmd does not start; see $dir/slurmd-local$number.log"
    done
    setsid bash "$0" expire "$dir/" "$minutes" >/dev/null 2>&1 9>&- </dev/null &
    echo $! >"$dir/expire.pid"
    if ! until_true 30 nodes_are_idle; then
        tail -n 5 "$dir"/slurm*.log >&2
        stop
        die "the nodes do not come up within 30 seconds; logs are in $dir"
    fi
    flock -u 9
    echo "running in $dir for at most $minutes minutes: $nodes nodes of $cpus CPUs" >&2
}

no_jobs() { [ -z "$(squeue -h -o %i 2>/dev/null)" ]; }

stop() {
    [ -d "$dir" ] || return 0
    local file pid pids=()
    if is_up; then # jobs first: their processes outlive the daemons
        scancel --user="$(id -un)" 2>/dev/null || true
        until_true 15 no_jobs || echo "jobs are still ending: $(squeue -h -o %i | tr '\n' ' ')" >&2
    fi
    for file in "$dir"/slurmd-*.pid "$dir"/slurmctld.pid "$dir"/munged.pid; do
        pid=$(cat "$file" 2>/dev/null || true)
        if ours "$pid"; then
            kill "$pid" 2>/dev/null || true
            pids+=("$pid")
        fi
    done
    for pid in "${pids[@]}"; do
        until_true 10 gone "$pid" || kill -KILL "$pid" 2>/dev/null || true
    done
    pid=$(pid_of expire)
    if [ "$pid" != "$$" ] && ours "$pid"; then
        kill -- "-$pid" 2>/dev/null || kill "$pid" 2>/dev/null || true # with its sleep
        until_true 5 gone "$pid" || true
    fi
    rm -f "$dir"/*.pid "$dir"/munge.socket*
}

usage() {
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
}

export SLURM_CONF=$dir/slurm.conf
command=${1:-help}
[ $# -eq 0 ] || shift
case $command in
    start)
        start
        echo "eval \"\$($0 env)\"    # lets this shell talk to it; later: $0 stop"
        ;;
    stop) stop ;;
    env) echo "export SLURM_CONF='$SLURM_CONF'" ;;
    run)
        [ $# -gt 0 ] || die "run what? For example: $0 run srun -n 2 hostname"
        if ! is_up; then
            start
            trap stop EXIT
        fi
        "$@"
        ;;
    expire) # the time limit, in a process of its own: expire FOLDER MINUTES
        dir=${1%/} SLURM_CONF=${1%/}/slurm.conf
        sleep "$2m"
        stop
        ;;
    help | -h | --help) usage ;;
    *) die "unknown command '$command'; expected start, stop, run, env or help" ;;
esac
