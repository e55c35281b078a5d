#!/usr/bin/env bash
# What a TPU virtual machine does, as root, whenever it boots; see queued_resources.sh.
# Written by `jaxprune launch`; never run on a live machine.
set -uo pipefail

sweep=gs://bucket/lottery
package='jaxprune[cloud]'
retries=3
home=/opt/jaxprune
log=/var/log/jaxprune.log
export HOME=${HOME:-/root} PYTHONUNBUFFERED=1
export JAXPRUNE_CACHE_DIR=$home/cache

metadata() {
  curl -sf -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/$1"
}

# The machine's own Python is too old, so uv brings another.
install() {
  [ ! -x "$home/bin/jaxprune" ] || return 0
  python3 -m pip install --quiet uv &&
    python3 -m uv venv --quiet --allow-existing --python 3.11 "$home" &&
    python3 -m uv pip install --quiet --python "$home/bin/python" "$package" 'jax[tpu]'
}

worker=
stopped=
stop() {
  stopped=1
  [ -z "$worker" ] || kill -TERM "$worker"
}
trap stop TERM INT

# Exit code 75 is no fault, and 2 is one that each attempt repeats.
work() {
  local code faults=0
  while [ -z "$stopped" ]; do
    "$home/bin/jaxprune" chunk "$sweep" --all --grace 25 &
    worker=$!
    [ -z "$stopped" ] || stop # the signal came before the chunk had a number
    wait "$worker"
    code=$?
    if [ -n "$stopped" ]; then
      wait "$worker" # the signal ended the first wait, and the chunk is being saved
      return 75
    fi
    case $code in
      0 | 2) return "$code" ;;
      75) ;;
      *)
        faults=$((faults + 1))
        [ "$faults" -le "$retries" ] || return "$code"
        sleep 30
        ;;
    esac
  done
  return 75
}

# The machine deletes itself: an idle TPU costs as much as a busy one.
leave() {
  local name zone
  name=$(metadata instance/attributes/jaxprune-name)
  zone=$(metadata instance/zone)
  gcloud storage cp "$log" "$sweep/logs/$name.log"
  gcloud compute tpus queued-resources delete "$name" --zone="${zone##*/}" \
    --project="$(metadata project/project-id)" --force --quiet --async
}

exec >>"$log" 2>&1
if install; then
  work
  code=$?
else
  code=1
fi
echo "jaxprune ended with exit code $code"
[ "$code" -eq 75 ] || leave
