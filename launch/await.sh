# Sourced by the launch scripts: await PID sets `code` to its exit code. `wait` alone returns early when a trap forwards a signal.
# shellcheck shell=bash
# shellcheck disable=SC2034  # `code` is for the script that sources this
await() {
  code=0
  wait "$1" || code=$?
  while kill -0 "$1" 2>/dev/null; do
    code=0
    wait "$1" || code=$?
  done
}
