#!/usr/bin/env bash
# Managed jobs of SkyPilot, each on a machine of its own: bash launch.sh
# Written by `jaxprune launch`; never run.
set -euo pipefail

name=lottery
workers=4
job=$(dirname "$0")/job.yaml

for ((number = 0; number < workers; number++)); do
  sky jobs launch --name "$name-$number" --yes --detach-run "$job"
done
