#!/usr/bin/env bash
# Creates a slice, trains on it once, and deletes it, also after an error, Ctrl-C, a closed terminal or
# SIGTERM. After SIGKILL, `slice.yml -e expired=true` deletes it once it is older than MAX_HOURS.
#   make once SLICE='-e accelerator_type=v5p-16' TRAIN='-e gmm=true -e max_steps=100'
set -euo pipefail
# Job control gives every playbook its own process group, so that only this script receives Ctrl-C.
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
  || refuse 'the slice is not named: export TPU_NAME=… ZONE=… PROJECT=…'
[[ $restarts =~ ^[0-9]+$ ]] || refuse "RESTARTS is $restarts and must be a number, such as RESTARTS=3"
bucket=
[[ ${TRAIN:-} == *checkpoint_bucket=gs://* ]] && bucket=true
if ((restarts)) || [[ $bucket ]]; then
  # After a restart the run is found again by its name.
  [[ ${TRAIN:-} == *run_name=* ]] || train+=(-e "run_name=${RUN_NAME:-once-$(date -u +%Y%m%d-%H%M%S)}")
fi
if ((restarts)) && [[ ! $bucket ]]; then
  [[ ${WORKER_DIR:-} == /* ]] || refuse "RESTARTS=$restarts needs a place for checkpoints that outlives the slice: \
-e checkpoint_bucket=gs://… in TRAIN, or WORKER_DIR=…, a directory on a disk that every worker mounts"
  # Each worker has its own directory below WORKER_DIR.
  train+=(-e "{\"worker_dir\": \"$WORKER_DIR/{{ inventory_hostname }}\"}")
fi

inventory_graph() { ansible-inventory --inventory "$inventory" --graph 2>&1 | tr -s '[:space:]' ' '; }

# A slice that exists already may be in use, and would be deleted at the end.
graph=$(inventory_graph || true)
[[ $graph == *'there is no TPU slice'* ]] || refuse "the slice $TPU_NAME is deleted in the end, so it must not \
be there in the beginning. The inventory says: ${graph% }. Choose another TPU_NAME, or delete the slice first"

playbook=
play() {
  # A script that is started in the background ignores SIGINT; its playbooks must not, to be interruptible.
  env --default-signal=INT ansible-playbook --inventory "$inventory" "$@" < /dev/null &
  playbook=$!
  local code=0
  wait "$playbook" || code=$?
  playbook=
  return "$code"
}

delete_slice() {
  local code=$?
  trap '' INT TERM HUP
  trap - EXIT
  if [[ -n $playbook ]]; then
    kill -INT -- "-$playbook" 2> /dev/null || true
    wait "$playbook" || true
  fi
  for _ in 1 2 3; do
    if play slice.yml -e state=absent; then exit "$code"; fi
    sleep 5
  done
  echo "make once: $TPU_NAME could not be deleted and COSTS MONEY. Delete it by hand: gcloud compute tpus" \
    "tpu-vm delete $TPU_NAME --zone $ZONE --project $PROJECT" >&2
  exit 1
}
trap delete_slice EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
# A closed terminal takes no more output, and a playbook that cannot write ends: log to a file instead.
trap 'mkdir -p .cache && exec >> .cache/once.log 2>&1; exit 129' HUP

require_lasting_worker_dir() {
  ((restarts == 0)) || [[ $bucket ]] && return
  ansible --inventory "$inventory" tpu_workers --module-name ansible.builtin.shell \
    --args "test \"\$(df --output=target '$WORKER_DIR' | tail -n 1)\" != /" \
    || refuse "WORKER_DIR=$WORKER_DIR is on the worker's own disk or does not exist, and must be on a \
disk that outlives the slice: mount one there, or save to a bucket with -e checkpoint_bucket=gs://… in TRAIN"
}

for ((restart = 0; ; restart++)); do
  code=0
  if play slice.yml -e state=present "${slice[@]}"; then
    require_lasting_worker_dir
    if play site.yml "${train[@]}" && play train.yml "${train[@]}"; then exit 0; else code=$?; fi
  else
    code=$?
  fi
  ((restart < restarts)) || exit "$code"
  graph=$(inventory_graph || true)
  [[ $graph =~ \ is\ (PREEMPTED|TERMINATED)|'there is no TPU slice' ]] || exit "$code"
  echo "make once: $TPU_NAME was preempted; restart $((restart + 1)) of $restarts"
done
