#!/usr/bin/env bash
# Several processes on this machine as one run, each with fake CPU devices: what a pod does, in small.
# Usage: launch/local.sh [--dry-run] PROCESSES DEVICES FLAGS...     (flags of f2llm_jax.main; PORT, 12355, and the one below are used)
#
# Ends when all have ended: 0 if all did well, 75 if all stopped on SIGTERM, which goes to the first alone (it tells the others); else the
# first other exit code. Each line of output bears its process's number.
set -euo pipefail
# shellcheck source=launch/quote.sh
source "$(dirname "${BASH_SOURCE[0]}")/quote.sh"
# shellcheck source=launch/await.sh
source "$(dirname "${BASH_SOURCE[0]}")/await.sh"

dry=""
[[ "${1:-}" != --dry-run ]] || { dry=yes; shift; }
(($# >= 3)) || { echo "usage: ${0##*/} [--dry-run] PROCESSES DEVICES FLAGS..." >&2; exit 2; }
count="$1" devices="$2"
shift 2

pids=()
trap '[[ ${#pids[@]} == 0 ]] || kill -TERM "${pids[0]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < count; i++)); do
  line=(env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$devices" "${PYTHON:-python}" -m f2llm_jax.main
    --coordinator_address="localhost:${PORT:-12355}" --num_processes="$count" --process_id="$i" "$@")
  if [[ -n "$dry" ]]; then
    show "${line[@]}"
  else
    "${line[@]}" > >(sed -u "s/^/[$i] /") 2>&1 &
    pids+=($!)
  fi
done

result=0
for pid in ${pids[@]+"${pids[@]}"}; do
  await "$pid"
  if ((code != 0 && (result == 0 || result == 75))); then result=$code; fi
done
exit "$result"
