#!/usr/bin/env bash
# One training run on a slice that is there only for it. However that ends, the slice is deleted: after
# an error, Ctrl-C, a closed terminal or a kill. After kill -9, `slice.yml -e expired=true` deletes it
# once its MAX_HOURS are over.
#   make once SLICE='-e accelerator_type=v5p-16' TRAIN='-e gmm=true -e max_steps=100'
set -euo pipefail
# Every playbook is a process group of its own: a signal comes here first.
set -m
cd "$(dirname "$0")/.."

inventory=${INVENTORY:-inventory/gcp}
restarts=${RESTARTS:-0}
read -ra slice <<< "-e max_hours=${MAX_HOURS:-24} ${SLICE:-}"
read -ra train <<< "${TRAIN:-}"

refuse() {
  echo "make once: $1" >&2
  exit 2
}

[[ -n ${TPU_NAME:-} && -n ${ZONE:-} && -n ${PROJECT:-} ]] \
  || refuse 'which slice? export TPU_NAME=… ZONE=… PROJECT=…'
[[ $restarts =~ ^[0-9]+$ ]] || refuse "RESTARTS is $restarts: a number is needed"
bucket=
[[ ${TRAIN:-} == *checkpoint_bucket=gs://* ]] && bucket=true
if ((restarts)) || [[ $bucket ]]; then
  # One name for all of its parts.
  [[ ${TRAIN:-} == *run_name=* ]] || train+=(-e "run_name=${RUN_NAME:-once-$(date -u +%Y%m%d-%H%M%S)}")
fi
if ((restarts)) && [[ ! $bucket ]]; then
  [[ ${WORKER_DIR:-} == /* ]] || refuse "RESTARTS=$restarts needs what outlives the slice, to resume from: \
-e checkpoint_bucket=gs://… in TRAIN, or WORKER_DIR=…, a directory on a disk that every worker mounts"
  # A directory for every worker.
  train+=(-e "{\"worker_dir\": \"$WORKER_DIR/{{ inventory_hostname }}\"}")
fi

look() { ansible-inventory --inventory "$inventory" --graph 2>&1 | tr -s '[:space:]' ' '; }

# What is there already is somebody's, and would be deleted in the end.
there=$(look || true)
[[ $there == *'there is no TPU slice'* ]] || refuse "it deletes the slice in the end, so the slice must \
not be there in the beginning. The inventory says: $there"

child=
play() {
  # Whoever started this in the background has made it deaf to Ctrl-C's signal; a playbook must not be.
  env --default-signal=INT ansible-playbook --inventory "$inventory" "$@" < /dev/null &
  child=$!
  local code=0
  wait "$child" || code=$?
  child=
  return "$code"
}

down() {
  local code=$?
  trap '' INT TERM HUP
  trap - EXIT
  if [[ -n $child ]]; then
    kill -INT -- "-$child" 2> /dev/null || true
    wait "$child" || true
  fi
  for _ in 1 2 3; do
    if play slice.yml -e state=absent; then exit "$code"; fi
    sleep 5
  done
  echo "make once: $TPU_NAME could not be deleted and COSTS MONEY. Delete it by hand: gcloud compute tpus" \
    "tpu-vm delete $TPU_NAME --zone $ZONE --project $PROJECT" >&2
  exit 1
}
trap down EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
# With the terminal goes its output, and a playbook that cannot write ends.
trap 'mkdir -p .cache && exec >> .cache/once.log 2>&1; exit 129' HUP

outlives() {
  ((restarts == 0)) || [[ $bucket ]] && return
  ansible --inventory "$inventory" tpu_workers --module-name ansible.builtin.shell \
    --args "test \"\$(df --output=target '$WORKER_DIR' | tail -n 1)\" != /" \
    || refuse "$WORKER_DIR is on the worker's own disk, or not there: nothing in it outlives the slice"
}

for ((restart = 0; ; restart++)); do
  code=0
  if play slice.yml -e state=present "${slice[@]}"; then
    outlives
    if play site.yml "${train[@]}" && play train.yml "${train[@]}"; then exit 0; else code=$?; fi
  else
    code=$?
  fi
  ((restart < restarts)) || exit "$code"
  there=$(look || true)
  [[ $there =~ \ is\ (PREEMPTED|TERMINATED)|'there is no TPU slice' ]] || exit "$code"
  echo "make once: $TPU_NAME was preempted; restart $((restart + 1)) of $restarts"
done
