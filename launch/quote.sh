# Sourced by the launch scripts: show COMMAND... prints it as one would type it.
# shellcheck shell=bash
show() {
  local word escaped="'\\''" line=""
  for word in "$@"; do
    if [[ ! "$word" =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then word="'${word//\'/$escaped}'"; fi
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}
