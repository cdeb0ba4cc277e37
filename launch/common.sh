# shellcheck shell=bash
# What the launch scripts share; sourced, never run. The sourcing script sets `program` and, for --dry-run, `dry` to 1.
: "${program:?}" "${dry:=0}"

# One line and status 2: what is wrong with the arguments.
fail() {
  printf '%s: %s\n' "$program" "$1" >&2
  exit 2
}

# Words -> one line that a shell reads back as the same words.
quote() {
  local word line='' escape="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*)
        word=${word//\'/$escape}
        word="'$word'"
        ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s' "$line"
}

# Runs a command; with --dry-run prints it instead, ready to paste.
run() {
  if [ "$dry" = 1 ]; then
    printf '%s\n' "$(quote "$@")"
  else
    "$@"
  fi
}

need() { # --option value
  [ -n "$2" ] || fail "$1=... is needed; see $program --help"
}

# The stage that several hosts share; the others are one process, on whatever devices it has.
stage() {
  case $1 in
    train | collect | controls) ;;
    *) fail "STAGE=$1: only train, collect and controls run on several hosts; the others on one, as dnd $1" ;;
  esac
}

number() { # --option value
  case $2 in
    '' | *[!0-9]* | 0*) fail "$1=$2: expected a whole number, 1 or more" ;;
  esac
}

# Names of TPUs and JobSets end up in host names: RFC 1035, as the platforms demand it.
name() { # --option value longest
  [[ $2 =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ && ${#2} -le $3 ]] ||
    fail "$1=$2: lower-case letters, digits and '-', a letter first, at most $3 characters"
}
