#!/usr/bin/env bash
# Runs training again until it is done. Usage: launch/keep_running.sh WORKDIR COMMAND...
#
# Exit code 0: done. 75: SIGTERM came and the state is saved: again. Anything else is a crash: again too, but after MAX_CRASHES
# (default 5) in a row without a newer checkpoint in WORKDIR it gives up with the command's exit code. SIGTERM to this script goes
# to the command, and is the end. One at a time for a WORKDIR on this host: a second one ends at once, with 0.
set -euo pipefail
# shellcheck source=launch/await.sh
source "$(dirname "${BASH_SOURCE[0]}")/await.sh"

(($# >= 2)) || { echo "usage: ${0##*/} WORKDIR COMMAND..." >&2; exit 2; }
workdir="$1"
shift
max_crashes="${MAX_CRASHES:-5}"
healthy="${HEALTHY_SECONDS:-300}" # a process that loses another host (134) or hangs (76) after so long has not crashed
pause="${RESTART_SECONDS:-10}" # before a restart: the network forgets the old connections
# A folder that nobody else can write to. The lock of a WORKDIR holds this script's process id, which means nothing once it is free.
locks="${XDG_RUNTIME_DIR:-$HOME/.cache}/f2llm_jax"
mkdir -p "$locks"
chmod 700 "$locks"
lock="$locks/$(printf '%s' "$workdir" | cksum | cut -d' ' -f1).lock"

say() { printf 'keep_running: %s %s\n' "$(date -u +%FT%TZ)" "$*" >&2; }

newest_checkpoint() {
  local list
  if [[ "$workdir" == gs://* ]]; then
    list="$(gcloud storage ls "$workdir/checkpoints/" 2>/dev/null || true)"
  else
    list="$(ls "$workdir/checkpoints" 2>/dev/null || true)"
  fi
  sed -n 's|^\(.*/\)\{0,1\}\([0-9][0-9]*\)/\{0,1\}$|\2|p' <<<"$list" | sort -n | tail -n 1
}

exec 9>>"$lock"
flock --nonblock 9 || { say "already runs on this host"; exit 0; }
echo "$$" >"$lock"
trap ': >"$lock"' EXIT

child="" asked=""
trap 'asked=yes; [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT

crashes=0 before="$(newest_checkpoint)"
while [[ -z "$asked" ]]; do
  begun=$SECONDS
  "$@" 9>&- &
  child=$!
  await "$child"
  child=""
  ((code != 0)) || { say "done"; exit 0; }
  now="$(newest_checkpoint)"
  if ((code == 75)) || ((${now:--1} > ${before:--1})); then
    crashes=0
  elif ! (((code == 134 || code == 76) && SECONDS - begun >= healthy)); then
    crashes=$((crashes + 1))
  fi
  before="$now"
  if ((crashes >= max_crashes)); then
    say "gives up: exit code $code, $crashes times without a checkpoint newer than ${now:-none}"
    exit "$code"
  fi
  [[ -n "$asked" ]] || { say "exit code $code, newest checkpoint ${now:-none}; again in $pause s"; sleep "$pause" 9>&- & wait $! || true; }
done
say "stopped on request"
exit 75
