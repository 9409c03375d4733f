#!/usr/bin/env bash
# Makes a fresh clone buildable: checks the tools and fetches LibTorch 2.11.0 into .deps/libtorch. Does nothing, in
# milliseconds, when that has been done. Interrupted anywhere, the next run goes on.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

LIBTORCH_VERSION=2.11.0
PYTHON_VERSION=3.8
DEPS="${UNDERSTUDY_DEPS:-$ROOT/.deps}"

usage() {
    cat <<EOF
Usage: scripts/setup.sh [--cuda] [--force] [--keep-wheels] [--quiet]

Checks the build tools and fetches LibTorch $LIBTORCH_VERSION into .deps/libtorch.

  --cuda         the full LibTorch with its CUDA libraries (2.5 GB of download, 3.8 GB on disk)
                 instead of the CPU part (545 MB of download, 500 MB on disk)
  --force        fetch and unpack again, whatever is there
  --keep-wheels  leave the downloaded packages in the cache after unpacking
  --quiet        say nothing when there is nothing to do

Environment:
  LIBTORCH             a LibTorch $LIBTORCH_VERSION of your own: checked and used, nothing is fetched
  UNDERSTUDY_CACHE     where downloads are kept (default: .deps/cache)
  UNDERSTUDY_DEPS      where LibTorch goes (default: .deps; another place also needs LIBTORCH set for builds)
EOF
}

profile=cpu force='' keep='' quiet=''
while (($#)); do
    case "$1" in
    --cuda) profile=cuda ;;
    --force) force=--force ;;
    --keep-wheels) keep=--keep-wheels ;;
    --quiet) quiet=1 ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) die "unknown argument '$1'" "scripts/setup.sh --help lists what there is" ;;
    esac
    shift
done

case "$(uname -s)" in
Linux) ;;
*) die "Understudy runs on Linux; this is $(uname -s)" ;;
esac
arch="$(uname -m)"
[[ "$arch" == arm64 ]] && arch=aarch64
case "$arch" in
x86_64 | aarch64) ;;
*) die "LibTorch $LIBTORCH_VERSION has no package for $arch (there are x86_64 and aarch64)" \
    "build one from source and set LIBTORCH to it" ;;
esac

# check_tools [fetch]: with `fetch`, pip too (asking it takes half a second, so not on every run).
check_tools() {
    local missing=()
    local rust_wanted rust
    rust_wanted="$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$ROOT/Cargo.toml")"
    have cargo || die "cargo is missing" \
        "install Rust $rust_wanted or newer (rustup, or your distribution's package), and open a new shell"
    # From the root, where rust-toolchain.toml has a say.
    rust="$(cd -- "$ROOT" && cargo --version 2>&1)" || die "cargo does not run:" "$rust"
    rust="$(awk '$1 == "cargo" {print $2; exit}' <<<"$rust")"
    at_least "$rust_wanted" "${rust%%-*}" ||
        die "Rust $rust_wanted or newer needed, found ${rust:-an unknown version}: rustup update stable" \
            "without rustup: your distribution's newer package, or https://rustup.rs"
    have cc || have gcc || missing+=(gcc)
    have c++ || have g++ || missing+=(g++)
    have ld || missing+=(binutils)
    have python3 || missing+=(python3)
    if [[ "${1:-}" == fetch ]] && have python3 && ! python3 -m pip --version >/dev/null 2>&1; then
        missing+=(python3-pip)
    fi
    ((${#missing[@]} == 0)) || die "missing: ${missing[*]}" \
        "on Debian or Ubuntu: sudo apt-get update && sudo apt-get install -y --no-install-recommends ${missing[*]} libc6-dev"
    python3 -c "import sys; sys.exit(sys.version_info < (${PYTHON_VERSION/./, }))" ||
        die "Python $PYTHON_VERSION or newer needed, found $(python3 --version 2>&1)" \
            "install a newer python3, and make it the first on the PATH"
    # The wheels are manylinux_2_28: an older C library cannot load them.
    local glibc
    glibc="$(getconf GNU_LIBC_VERSION 2>/dev/null | awk '{print $2}')" || true
    [[ -n "$glibc" ]] || die "this system's C library is not glibc; LibTorch's packages need glibc 2.28 or newer"
    at_least 2.28 "$glibc" ||
        die "glibc $glibc is too old: LibTorch's packages need 2.28 or newer (Debian 10, Ubuntu 20.04, RHEL 8)"
}

# The version that a LibTorch folder states: build-version (the zip of PyTorch's site), version.py (a Python
# package), or the header.
libtorch_version() {
    local dir="$1" header
    if [[ -f "$dir/build-version" ]]; then
        head -n1 "$dir/build-version"
    elif [[ -f "$dir/version.py" ]]; then
        sed -n "s/^__version__ = ['\"]\(.*\)['\"].*/\1/p" "$dir/version.py"
    else
        for header in "$dir/include/torch/headeronly/version.h" "$dir/include/torch/csrc/api/include/torch/version.h"; do
            [[ -f "$header" ]] || continue
            awk '/#define TORCH_VERSION_(MAJOR|MINOR|PATCH) +[0-9]/ {v = v sep $3; sep = "."} END {print v}' "$header"
            return
        done
    fi
}

# A LIBTORCH that the user has set wins over ours, in cargo too (.cargo/config.toml does not force its own).
if [[ -n "${LIBTORCH:-}" && "$(readlink -m -- "$LIBTORCH")" != "$(readlink -m -- "$DEPS/libtorch/torch")" ]]; then
    check_tools
    [[ -d "$LIBTORCH" ]] || die "LIBTORCH=$LIBTORCH is not a folder" \
        "set it to a folder with include/ and lib/libtorch_cpu.so, or unset it and run again to fetch one"
    [[ -f "$LIBTORCH/lib/libtorch_cpu.so" ]] || die "LIBTORCH=$LIBTORCH has no lib/libtorch_cpu.so" \
        "set it to a folder with include/ and lib/libtorch_cpu.so, or unset it and run again to fetch one"
    version="$(libtorch_version "$LIBTORCH")"
    [[ -n "$version" ]] || die "cannot tell the version of LIBTORCH=$LIBTORCH (no build-version, version.py or version.h)" \
        "Understudy needs LibTorch $LIBTORCH_VERSION"
    case "$version" in
    "$LIBTORCH_VERSION" | "$LIBTORCH_VERSION"+*) ;;
    *) die "LIBTORCH=$LIBTORCH is LibTorch $version; Understudy needs $LIBTORCH_VERSION" \
        "point LIBTORCH at a $LIBTORCH_VERSION, or unset it and run again to fetch one" ;;
    esac
    [[ -n "$quiet" ]] || note "using your LibTorch $version: $LIBTORCH"
    exit 0
fi

# `layout` counts changes to what is unpacked, so that an older tree is replaced.
layout=1
stamp="$DEPS/libtorch/.complete"
if [[ -z "$force" && -f "$stamp" ]]; then
    have_stamp="$(<"$stamp")"
    # The full LibTorch serves where the CPU part was asked for; the other way round it does not.
    for ok in "$profile" cuda; do
        if [[ "$have_stamp" == "libtorch $LIBTORCH_VERSION $ok $arch layout $layout" &&
            -f "$DEPS/libtorch/torch/lib/libtorch_cpu.so" ]]; then
            check_tools
            [[ -n "$quiet" ]] || note "LibTorch $LIBTORCH_VERSION ($ok) is in place: $DEPS/libtorch"
            exit 0
        fi
    done
fi

check_tools fetch
step "Fetching LibTorch $LIBTORCH_VERSION ($profile, $arch) into ${DEPS#"$ROOT"/}/libtorch"
exec python3 "$SCRIPTS/libtorch.py" --deps "$DEPS" --cache "${UNDERSTUDY_CACHE:-$DEPS/cache}" \
    --lock "$SCRIPTS/libtorch.lock" --profile "$profile" --arch "$arch" \
    --stamp "libtorch $LIBTORCH_VERSION $profile $arch layout $layout" ${force:+"$force"} ${keep:+"$keep"}
