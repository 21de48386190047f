#!/usr/bin/env bash
# One slice or several on GKE. Usage: launch/gke/gke.sh [--dry-run] SUBCOMMAND
#
#   build              build the image from this folder and push it, with docker
#   manifest FLAGS...  print the JobSet: flags of f2llm_jax.main
#   apply FLAGS...     create it, or leave it as it is if it is the same
#   logs [LINES]       the last lines of every host
#   delete             delete it; nothing happens when it is gone
#   xpk FLAGS...       the same run through XPK instead, which also queues and finds the topology
#   xpk-delete         delete that
#
# Settings, from the environment: NAME, IMAGE (its full name; `build` makes it), WORKDIR (gs://).
#   JobSet: ACCELERATOR (value of the node label cloud.google.com/gke-tpu-accelerator, as tpu7x), TOPOLOGY (as 4x4x4), HOSTS (of a slice),
#           CHIPS (of a host, 4), NAMESPACE (default), SERVICE_ACCOUNT (default), SPOT (no; yes for spot nodes)
#   XPK:    CLUSTER, PROJECT, ZONE, TPU_TYPE (as tpu7x-128)
#   both:   SLICES (1), MAX_RESTARTS (20), GRACE_SECONDS (600, from SIGTERM to SIGKILL)
set -euo pipefail
# shellcheck source=launch/quote.sh
source "$(dirname "${BASH_SOURCE[0]}")/../quote.sh"

fail() { echo "${0##*/}: $*" >&2; exit 2; }
need() { for name in "$@"; do [[ -n "${!name:-}" ]] || fail "set $name (see the head of this file)"; done; }
dry=""
[[ "${1:-}" != --dry-run ]] || { dry=yes; shift; }
command="${1:-}"
shift || true
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

do_it() { if [[ -n "$dry" ]]; then show "$@"; else "$@"; fi; }

training() { # sets `line` to the command of every host
  need WORKDIR
  (($# > 0)) || fail "flags of f2llm_jax.main are missing, as --config=configs/stage1.py:size=0.6b"
  [[ "$WORKDIR" == gs://* ]] || fail "WORKDIR=$WORKDIR must be gs://: hosts share no disk"
  line=(python -m f2llm_jax.main --workdir="$WORKDIR" "$@")
}

json() { # its arguments as a JSON list of strings, which is YAML too
  local text="" argument
  for argument in "$@"; do
    argument="${argument//\\/\\\\}"
    argument="${argument//\"/\\\"}"
    text+="${text:+, }\"$argument\""
  done
  printf '[%s]' "$text"
}

string() { # its argument as a JSON string
  local text
  [[ "$1" != *[[:cntrl:]]* ]] || fail "a setting holds a line break or another control character: $1"
  text="$(json "$1")"
  text="${text#[}"
  printf '%s' "${text%]}"
}

numbers() { # fails unless the settings of these names are numbers
  local name
  for name in "$@"; do [[ "${!name:-0}" =~ ^[0-9]+$ ]] || fail "$name=${!name} is no number"; done
}

manifest() {
  need NAME IMAGE ACCELERATOR TOPOLOGY HOSTS
  numbers HOSTS SLICES MAX_RESTARTS GRACE_SECONDS CHIPS
  local line
  training "$@"
  local selector tolerations="[]"
  selector="cloud.google.com/gke-tpu-accelerator: $(string "$ACCELERATOR"), cloud.google.com/gke-tpu-topology: $(string "$TOPOLOGY")"
  if [[ "${SPOT:-no}" == yes ]]; then
    selector+=", cloud.google.com/gke-spot: \"true\""
    tolerations='[{key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}]'
  fi
  local text
  text="$(<"$here/jobset.yaml")"
  text="${text//@NAME@/"$(string "$NAME")"}"
  text="${text//@NAMESPACE@/"$(string "${NAMESPACE:-default}")"}"
  text="${text//@MAX_RESTARTS@/${MAX_RESTARTS:-20}}"
  text="${text//@SLICES@/${SLICES:-1}}"
  text="${text//@HOSTS@/$HOSTS}"
  text="${text//@GRACE_SECONDS@/${GRACE_SECONDS:-600}}"
  text="${text//@SERVICE_ACCOUNT@/"$(string "${SERVICE_ACCOUNT:-default}")"}"
  text="${text//@NODE_SELECTOR@/"{$selector}"}"
  text="${text//@TOLERATIONS@/"$tolerations"}"
  text="${text//@IMAGE@/"$(string "$IMAGE")"}"
  text="${text//@CHIPS@/${CHIPS:-4}}"
  local words
  words="$(json "${line[@]}")"
  printf '%s\n' "${text//@COMMAND@/"$words"}"
}

build() {
  need IMAGE
  cd "$here/../.."
  do_it docker build --platform=linux/amd64 "--tag=$IMAGE" .
  do_it docker push "$IMAGE"
}

apply() {
  local text
  text="$(manifest "$@")"
  if [[ -n "$dry" ]]; then show kubectl apply --filename=-; else kubectl apply --filename=- <<<"$text"; fi
}

logs() {
  need NAME
  [[ "${1:-20}" =~ ^[0-9]+$ ]] || fail "logs takes a number of lines, not '$1'"
  do_it kubectl logs --namespace="${NAMESPACE:-default}" --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --prefix --tail="${1:-20}" \
    --max-log-requests=1024
}

delete() {
  need NAME
  do_it kubectl delete jobset "$NAME" --namespace="${NAMESPACE:-default}" --ignore-not-found
}

xpk_create() {
  need NAME IMAGE CLUSTER PROJECT ZONE TPU_TYPE
  local line
  training "$@"
  # XPK restarts on 42 and 127 to 255 only; 75 is "saved, go on", 76 "hung", 1 may be a host that came late to the startup check.
  do_it xpk workload create --workload="$NAME" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
    --tpu-type="$TPU_TYPE" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" --max-restarts="${MAX_RESTARTS:-20}" \
    --restart-on-exit-codes=1,75,76 --termination-grace-period-seconds="${GRACE_SECONDS:-600}" --command="$(show "${line[@]}")"
}

xpk_delete() {
  need NAME CLUSTER PROJECT ZONE
  do_it xpk workload delete --workload="$NAME" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE"
}

case "$command" in
  build | manifest | apply | logs | delete) "$command" "$@" ;;
  xpk) xpk_create "$@" ;;
  xpk-delete) xpk_delete ;;
  *) fail "unknown subcommand '$command'; there are build, manifest, apply, logs, delete, xpk, xpk-delete" ;;
esac
