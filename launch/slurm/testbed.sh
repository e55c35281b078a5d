#!/bin/bash
# A real SLURM of two nodes, n1 and n2, on the loopback of one Debian machine, for tests and trials.
#
#   testbed.sh start DIR [--install]   starts it; prints the line of environment to export
#   testbed.sh status DIR              shows its daemons, nodes and jobs
#   testbed.sh stop DIR                kills what it started and its jobs, and deletes DIR
#
# Run it as root: slurmd starts jobs as other users. It needs no systemd. All files, sockets and
# keys are in DIR, which must be new or empty. Partition `low` can be preempted by `high`.
# For `start` these may be set: MAX_ARRAY_SIZE (1001), GRACE (seconds, 8), and USER_SIGNAL (1; with 0
# a preempted job gets SIGTERM only, as in most clusters).
set -euo pipefail

packages=(slurm-wlm munge)
install_line="apt-get install -y --no-install-recommends ${packages[*]}"

fail() {
  echo "testbed.sh: $1" >&2
  exit "${2:-2}"
}

# Fails with code 3, and says what to do, if a program is missing.
need_programs() {
  local missing=()
  for program in slurmctld slurmd sbatch munged; do
    command -v "$program" > /dev/null || missing+=("$program")
  done
  [[ ${#missing[@]} -eq 0 ]] && return
  [[ $1 == --install ]] || fail "no ${missing[*]} here; as root: apt-get update && $install_line" 3
  { apt-get update && DEBIAN_FRONTEND=noninteractive $install_line; } >&2
}

# Prints a port of 127.0.0.1 that nobody listens at.
free_port() {
  local port
  while port=$((20000 + RANDOM % 12000)); do
    (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null || break
  done
  echo "$port"
}

write_config() {
  local host preempted=''
  host=$(hostname -s)
  [[ ${USER_SIGNAL:-1} == 1 ]] && preempted=SlurmctldParameters=preempt_send_user_signal
  cat > "$dir/cgroup.conf" << END
CgroupPlugin=cgroup/v1
CgroupAutomount=no
END
  # Devices that any machine has stand for GPUs: SLURM hands out numbers and opens none of them.
  printf 'NodeName=n[1-2] Name=gpu File=%s\n' /dev/null /dev/zero > "$dir/gres.conf"
  # cred_expire is what a requeued job waits at least; the default is 120 seconds.
  cat > "$dir/slurm.conf" << END
ClusterName=testbed
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.sock,cred_expire=20
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$preempted
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=0
MaxArraySize=${MAX_ARRAY_SIZE:-1001}
KillWait=10
SlurmdTimeout=10
ReturnToService=2
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=2 Gres=gpu:2
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=2 Gres=gpu:2
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 GraceTime=${GRACE:-8}
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF
END
}

start() {
  [[ $(id -u) -eq 0 ]] || fail 'start it as root'
  need_programs "$1"
  mkdir -p "$dir"
  [[ -z $(ls -A "$dir") ]] || fail "$dir is not empty"
  # A Unix socket's path has at most 107 characters.
  [[ ${#dir} -le 90 ]] || fail "$dir is too long a name for a socket"
  touch "$dir/testbed"
  mkdir -m 755 "$dir/state" "$dir/spool-n1" "$dir/spool-n2"
  (umask 077 && head -c 1024 /dev/urandom > "$dir/munge.key")
  write_config
  {
    # The daemons must not hold the pipe of whoever started this script.
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.sock" \
      --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" \
      && slurmctld && slurmd -N n1 && slurmd -N n2
  } < /dev/null > "$dir/start.log" 2>&1 || { cat "$dir/start.log" >&2; stop; fail 'no start' 1; }
  for _ in {1..100}; do
    [[ $(sinfo -h -N -p low -o %t 2> /dev/null | sort -u) == idle ]] && break
    sleep 0.2
  done
  if [[ $(sinfo -h -N -p low -o %t 2> /dev/null | sort -u) != idle ]]; then
    tail -n 20 "$dir"/*.log >&2
    stop
    fail 'the nodes did not come up' 1
  fi
  echo "export SLURM_CONF=$SLURM_CONF"
}

# Prints the processes of jobs: they have this cluster's configuration and a job id, or are the
# slurmstepd above them. A shell that only exported SLURM_CONF is neither.
job_processes() {
  local process environment
  for process in /proc/[0-9]*; do
    [[ ${process#/proc/} -eq $$ ]] && continue
    environment=$(tr '\0' '\n' 2> /dev/null < "$process/environ") || continue
    grep -qxF "SLURM_CONF=$SLURM_CONF" <<< "$environment" || continue
    if grep -q '^SLURM_JOB_ID=' <<< "$environment" \
      || [[ $(tr '\0' ' ' 2> /dev/null < "$process/cmdline") == *slurmstepd* ]]; then
      echo "${process#/proc/}"
    fi
  done
}

# Kills the processes of pid files, if they still are what the files say, and waits for their end.
kill_daemons() {
  local file pid
  for file in "$@"; do
    pid=$(cat "$file" 2> /dev/null) || continue
    tr '\0' ' ' 2> /dev/null < "/proc/$pid/cmdline" | grep -qE 'slurm|munge' || continue
    kill "$pid" 2> /dev/null || continue
    for _ in {1..50}; do
      [[ -d /proc/$pid ]] || break
      sleep 0.1
    done
    kill -KILL "$pid" 2> /dev/null || true
  done
}

stop() {
  [[ -e $dir/testbed ]] || fail "$dir holds no testbed"
  kill_daemons "$dir/slurmctld.pid" "$dir/slurmd-n1.pid" "$dir/slurmd-n2.pid"
  for _ in 1 2 3; do
    job_processes | xargs -r kill -KILL 2> /dev/null || true
  done
  kill_daemons "$dir/munged.pid"
  rm -rf "$dir"
}

status() {
  [[ -e $dir/testbed ]] || fail "$dir holds no testbed"
  for file in "$dir"/*.pid; do
    pid=$(cat "$file")
    [[ -d /proc/$pid ]] && state="runs as $pid" || state='does not run'
    echo "$(basename "$file" .pid) $state"
  done
  sinfo -N
  squeue
}

[[ $# -ge 2 && $1 =~ ^(start|stop|status)$ ]] || fail 'usage: testbed.sh start|stop|status DIR'
dir=$(realpath -m "$2")
export SLURM_CONF=$dir/slurm.conf
"$1" "${3:-}"
