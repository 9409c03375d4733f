# shellcheck shell=bash
# Shared by the scripts beside it (sourced, never run): where things are, and how to speak to a person.

SCRIPTS="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
ROOT="$(dirname -- "$SCRIPTS")"

# Colours only on a terminal, and not where NO_COLOR asks for none.
if [[ -t 2 && -z "${NO_COLOR:-}" && "${TERM:-dumb}" != dumb ]]; then
    BOLD=$'\e[1m' RED=$'\e[31m' YELLOW=$'\e[33m' GREEN=$'\e[32m' PLAIN=$'\e[0m'
else
    BOLD='' RED='' YELLOW='' GREEN='' PLAIN=''
fi

# step TEXT: a stage begins.            note TEXT: detail.
step() { printf '%s==>%s %s%s%s\n' "$GREEN" "$PLAIN" "$BOLD" "$*" "$PLAIN" >&2; }
note() { printf '    %s\n' "$*" >&2; }
warn() { printf '%swarning:%s %s\n' "$YELLOW" "$PLAIN" "$*" >&2; }

# die TEXT...: one line an argument; the first says what is wrong, the others what to do.
die() {
    printf '%serror:%s %s\n' "$RED" "$PLAIN" "$1" >&2
    shift
    local line
    for line in "$@"; do printf '       %s\n' "$line" >&2; done
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# The two binaries that everything else here starts. From the root: cargo and rustup look for .cargo/config.toml (which names
# LibTorch) and rust-toolchain.toml from the current folder upwards, wherever the manifest is.
build_binaries() {
    (cd -- "$ROOT" && cargo build --release -p understudy-node -p understudy-torch)
}
