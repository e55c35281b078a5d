#!/usr/bin/env bash
# Workloads of xpk that work at every chunk of a sweep that nobody finished: bash xpk.sh CLUSTER
# Each is a slice of its own: a preemption restarts no other.
# Written by `jaxprune launch`; never run against a live cluster.
set -euo pipefail

cluster=${1:?usage: bash xpk.sh CLUSTER}
name=lottery
workers=4
command='jaxprune chunk gs://bucket/lottery --all --grace 25'
place=(--project=my-project --zone=us-central1-a)

for ((number = 0; number < workers; number++)); do
  xpk workload create --cluster="$cluster" --workload="$name-$number" --num-slices=1 \
    --tpu-type=v6e-4 --docker-image=registry.example/jaxprune:1 --command="$command" \
    --restart-on-exit-codes=75 --max-restarts=100 \
    --termination-grace-period-seconds=60 ${place[@]+"${place[@]}"}
done
