#!/usr/bin/env bash
# TPU virtual machines that work at every chunk of a sweep that nobody finished.
# Written by `jaxprune launch`; never run against a live project.
#   bash queued_resources.sh up      asks for the machines; again for those preempted or failed
#   bash queued_resources.sh status
#   bash queued_resources.sh down    deletes all of them
set -euo pipefail

name=lottery
workers=4
accelerator=v6e-4
runtime=v2-alpha-tpuv6e
place=(--project=my-project --zone=us-central1-a)
capacity=(--spot)
identity=(--service-account=sweeps@my-project.iam.gserviceaccount.com)
startup=$(dirname "$0")/startup.sh

tpus() {
  gcloud compute tpus queued-resources "$@" ${place[@]+"${place[@]}"}
}

ask() {
  tpus create "$1" --node-id="$1" --accelerator-type="$accelerator" --runtime-version="$runtime" \
    --metadata="jaxprune-name=$1" --metadata-from-file="startup-script=$startup" \
    --scopes=https://www.googleapis.com/auth/cloud-platform --async \
    ${capacity[@]+"${capacity[@]}"} ${identity[@]+"${identity[@]}"}
}

up() {
  local number state
  for ((number = 0; number < workers; number++)); do
    state=$(tpus describe "$name-$number" --format='value(state.state)' 2>/dev/null || true)
    case $state in
      SUSPENDED | FAILED)
        tpus delete "$name-$number" --force --quiet
        ask "$name-$number"
        ;;
      '') ask "$name-$number" ;;
      *) echo "$name-$number: $state" ;;
    esac
  done
}

down() {
  local number
  for ((number = 0; number < workers; number++)); do
    tpus delete "$name-$number" --force --quiet --async || true
  done
}

case ${1:-} in
  up) up ;;
  status) tpus list --filter="name~$name-[0-9]+\$" ;;
  down) down ;;
  *)
    echo "usage: bash $0 up|status|down" >&2
    exit 2
    ;;
esac
