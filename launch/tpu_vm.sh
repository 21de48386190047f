#!/usr/bin/env bash
# One TPU VM, a pod slice or several slices through queued resources. Usage: launch/tpu_vm.sh [--dry-run] SUBCOMMAND
#
#   create               ask for the slice and wait until it is there; goes on waiting, or asks again, when given again
#   install              copy the committed code to every host and install it there
#   run MODULE_FLAGS...  train on every host under launch/keep_running.sh, in the background: flags of f2llm_jax.main
#   logs [LINES]         the last lines of every host
#   stop                 SIGTERM to training on every host: the state is saved
#   copy DIR             workdir and logs of the hosts to this machine
#   delete               give the slice back; nothing is left that costs
#
# Settings, from the environment: TPU_NAME, PROJECT, ZONE, ACCELERATOR (as v5p-128), RUNTIME (as v2-alpha-tpuv5), WORKDIR (local to the
# one host, or gs://), SLICES (1), TIER (on-demand, spot or reserved), SERVICE_ACCOUNT (the project's default), POLL_SECONDS (30),
# AUTOCHECKPOINT (no; yes for a SIGTERM before maintenance, which saves the state), DATA_DISK (a disk of the project in the same zone,
# attached read-only to every host, say with a copy of the data; empty for none).
set -euo pipefail
# shellcheck source=launch/quote.sh
source "$(dirname "${BASH_SOURCE[0]}")/quote.sh"

fail() { echo "${0##*/}: $*" >&2; exit 2; }
dry=""
[[ "${1:-}" != --dry-run ]] || { dry=yes; shift; }
command="${1:-}"
shift || true
for name in TPU_NAME PROJECT ZONE; do [[ -n "${!name:-}" ]] || fail "set $name (see the head of this file)"; done
where=(--project="$PROJECT" --zone="$ZONE")
every=("${where[@]}" --node=all --worker=all)
code_folder=f2llm_jax # in the home folder of every host
log=f2llm_jax.log     # beside it

exec 3>&1 # dry runs print here, also from within $(...)
do_it() { if [[ -n "$dry" ]]; then show "$@" >&3; else "$@"; fi; }
on_every_host() { do_it gcloud compute tpus queued-resources ssh "$TPU_NAME" "${every[@]}" --command="$1"; }

# Empty if there is no such request. A list, because `describe` fails alike for "not there" and for "not allowed to ask".
state() {
  do_it gcloud compute tpus queued-resources list "${where[@]}" --filter="name~/queuedResources/$TPU_NAME\$" --format="value(state.state)"
}

create() {
  for name in ACCELERATOR RUNTIME; do [[ -n "${!name:-}" ]] || fail "set $name (see the head of this file)"; done
  local request=(gcloud compute tpus queued-resources create "$TPU_NAME" "${where[@]}"
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME")
  if ((${SLICES:-1} > 1)); then request+=(--node-count="$SLICES"); else request+=(--node-id="$TPU_NAME"); fi
  case "${TIER:-on-demand}" in
    on-demand) ;;
    spot | reserved) request+=("--$TIER") ;;
    *) fail "TIER=$TIER must be on-demand, spot or reserved" ;;
  esac
  [[ -z "${SERVICE_ACCOUNT:-}" ]] || request+=(--service-account="$SERVICE_ACCOUNT")
  [[ "${AUTOCHECKPOINT:-no}" != yes ]] || request+=(--autocheckpoint-enabled)
  [[ -z "${DATA_DISK:-}" ]] || request+=("--data-disk=source=projects/$PROJECT/zones/$ZONE/disks/$DATA_DISK,mode=read-only")
  local now
  now="$(state)"
  case "$now" in
    FAILED | SUSPENDED) # taken away, or never granted: it does not come back by itself
      delete
      now=""
      ;;
  esac
  [[ -n "$now" ]] || do_it "${request[@]}"
  while now="$(state)"; [[ "$now" != ACTIVE && -z "$dry" ]]; do
    case "$now" in
      FAILED | SUSPENDED | SUSPENDING | DELETING) fail "the request is $now; \`gcloud compute tpus queued-resources describe $TPU_NAME\` says why; create again asks anew" ;;
    esac
    echo "$(date -u +%FT%TZ) ${now:-not listed yet}" >&2
    sleep "${POLL_SECONDS:-30}"
  done
  [[ -n "$dry" ]] || echo "$TPU_NAME is ACTIVE"
}

install() {
  local archive=build/f2llm_jax.tar.gz
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  [[ -n "$dry" ]] || mkdir -p build
  git diff --quiet HEAD || echo "note: changes that are not committed are not copied" >&2
  do_it git archive --format=tar.gz --output="$archive" HEAD
  do_it gcloud compute tpus queued-resources scp "$archive" "$TPU_NAME:" "${every[@]}"
  # Images bring Python 3.10; uv fetches one that is new enough. Old code goes first, so that no deleted file stays.
  on_every_host "mkdir -p $code_folder && cd $code_folder && rm -rf f2llm_jax configs launch && tar -xzf ../f2llm_jax.tar.gz \
&& python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv \
&& python3 -m uv pip install --quiet --python .venv/bin/python --constraint constraints.txt -e '.[tpu,gcs]'"
}

run() {
  [[ -n "${WORKDIR:-}" ]] || fail "set WORKDIR"
  (($# > 0)) || fail "run needs flags of f2llm_jax.main, as --config=configs/stage1.py:size=0.6b"
  on_every_host "cd $code_folder && (setsid nohup launch/keep_running.sh $(show "$WORKDIR" .venv/bin/python -m f2llm_jax.main \
    --workdir="$WORKDIR" "$@") >>../$log 2>&1 </dev/null &)"
}

stop() {
  # Only a lock that is held names a process that is ours.
  local locks="\"\${XDG_RUNTIME_DIR:-\$HOME/.cache}\"/f2llm_jax/*.lock"
  on_every_host "for lock in $locks; do [ ! -e \"\$lock\" ] || flock --nonblock \"\$lock\" true || kill -TERM \"\$(cat \"\$lock\")\" || true; done"
}

logs() {
  [[ "${1:-20}" =~ ^[0-9]+$ ]] || fail "logs takes a number of lines, not '$1'"
  on_every_host "hostname && tail -n ${1:-20} $log"
}

copy() {
  [[ -n "${1:-}" ]] || fail "copy needs a folder"
  [[ -n "${WORKDIR:-}" ]] || fail "set WORKDIR"
  [[ -n "$dry" ]] || mkdir -p "$1"
  local on_host="$code_folder/$WORKDIR"
  [[ "$WORKDIR" != /* ]] || on_host="$WORKDIR"
  if [[ "$WORKDIR" == gs://* ]]; then
    do_it gcloud storage rsync --recursive "$WORKDIR" "$1"
  else
    do_it gcloud compute tpus queued-resources scp --recurse "$TPU_NAME:$on_host" "$1" "${where[@]}" --worker=0
  fi
  do_it gcloud compute tpus queued-resources scp "$TPU_NAME:$log" "$1/$log" "${where[@]}" --worker=0
}

delete() {
  local now
  now="$(state)"
  [[ -n "$dry" || -n "$now" ]] || { echo "there is no $TPU_NAME"; return 0; }
  do_it gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force --quiet
}

case "$command" in
  create | install | run | logs | stop | copy | delete) "$command" "$@" ;;
  *) fail "unknown subcommand '$command'; there are create, install, run, logs, stop, copy, delete" ;;
esac
