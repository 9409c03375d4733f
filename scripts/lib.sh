# shellcheck shell=bash
# Shared by the scripts beside it (sourced, never run): where things are, and how to speak to a person.

SCRIPTS="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
ROOT="$(dirname -- "$SCRIPTS")"
# Where cargo is told to put the programs, whatever the person's own settings say.
PROGRAMS="$ROOT/target/release"

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

# at_least WANTED FOUND: whether a version is new enough.
at_least() { [[ -n "$2" && "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n1)" == "$1" ]]; }

# The two binaries that everything else here starts. From the root: cargo and rustup look for .cargo/config.toml (which names
# LibTorch) and rust-toolchain.toml from the current folder upwards, wherever the manifest is.
build_binaries() {
    local program newer
    (cd -- "$ROOT" && env -u CARGO_BUILD_TARGET cargo build --release --target-dir "$ROOT/target" \
        -p understudy-node -p understudy-torch)
    # A `build.target` of the person's own puts them one folder deeper, which no option takes back.
    for program in understudy understudy-engine; do
        # Where there is no such folder, find fails.
        newer="$(find "$ROOT"/target/*/release -maxdepth 1 -name "$program" -newer "$PROGRAMS/$program" 2>/dev/null | head -n1 || true)"
        if [[ ! -x "$PROGRAMS/$program" || -n "$newer" ]]; then
            die "cargo has built $program, but not into $PROGRAMS${newer:+ (it is $newer)}" \
                "take build.target out of your cargo configuration (~/.cargo/config.toml, or a .cargo above this folder)"
        fi
    done
}
