#!/usr/bin/env bash
# Tests of scripts/setup.sh on a copy of the scripts, from nothing: interrupted in the download and in the unpacking,
# with a damaged cache, with bad LIBTORCH settings. Downloads LibTorch (550 MB) once or twice.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

work="$(mktemp -d)"
trap 'rm -rf -- "$work"' EXIT
mkdir "$work/scripts"
cp "$ROOT"/scripts/* "$work/scripts/" 2>/dev/null || true
# States which Rust is needed.
cp "$ROOT/Cargo.toml" "$work/"
setup="$work/scripts/setup.sh"
# `large` stands beside `scripts`, so both use this folder.
deps="$work/.deps"
unset LIBTORCH UNDERSTUDY_CACHE UNDERSTUDY_DEPS

check() { # check WHAT COMMAND...
    local what="$1"
    shift
    if "$@"; then note "ok: $what"; else die "failed: $what"; fi
}

# refuses PATTERN COMMAND...: it fails, and says so in words that match.
refuses() {
    local pattern="$1" said
    shift
    if said="$("$@" 2>&1)"; then die "did not fail: $*"; fi
    grep -q -- "$pattern" <<<"$said" || die "said, where '$pattern' was expected:" "$said"
    note "ok: refuses, saying '$pattern'"
}

# interrupt WHEN: starts the set-up, and sends SIGINT to all of it as soon as the command WHEN succeeds.
interrupt() {
    local pid status=0
    # A group of its own that heeds SIGINT, as a terminal's foreground job does.
    python3 -c '
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.setpgid(0, 0)
os.execv(sys.argv[1], sys.argv[1:])' "$setup" --keep-wheels 2>"$work/said" &
    pid=$!
    until "$@"; do
        kill -0 "$pid" 2>/dev/null || die "the set-up ended before it was interrupted:" "$(cat "$work/said")"
        sleep 0.02
    done
    kill -INT -- "-$pid"
    wait "$pid" || status=$?
    ((status != 0)) || die "an interrupted set-up reported success"
    [[ ! -e "$deps/libtorch" ]] || die "an interrupted set-up left a .deps/libtorch"
}

downloading() { compgen -G "$deps/cache/partial/tmp/*/*.whl" >/dev/null || compgen -G "$deps/cache/partial/tmp/*/*" >/dev/null; }
unpacking() { [[ -e "$deps/libtorch.new/torch/include" ]]; }

refuses "is not a folder" env LIBTORCH="$work/none" "$setup"
mkdir -p "$work/other/lib"
refuses "has no lib/libtorch_cpu.so" env LIBTORCH="$work/other" "$setup"
touch "$work/other/lib/libtorch_cpu.so"
refuses "cannot tell the version" env LIBTORCH="$work/other" "$setup"
echo '2.6.0+cpu' >"$work/other/build-version"
refuses "is LibTorch 2.6.0+cpu; Understudy needs 2.11.0" env LIBTORCH="$work/other" "$setup"
echo '2.11.0+cpu' >"$work/other/build-version"
check "takes the user's own 2.11.0" env LIBTORCH="$work/other" "$setup"
refuses "unknown argument" "$setup" --nonsense
# A disk that is too small: the wheels are said to have a petabyte each.
cp -r "$work/scripts" "$work/large"
sed -i -E 's/^(x86_64|aarch64)( +cpu +)[0-9]+/\1\2999999999999999/' "$work/large/libtorch.lock"
refuses "MB free, .* MB needed" "$work/large/setup.sh"

step "Interrupted in the download"
interrupt downloading
step "Interrupted in the unpacking"
interrupt unpacking
step "Killed in the unpacking, without a chance to clean up"
"$setup" --keep-wheels 2>/dev/null &
victim=$!
until unpacking; do sleep 0.02; done
kill -KILL "$victim"
wait "$victim" || true

step "A damaged wheel in the cache"
wheel="$(compgen -G "$deps/cache/nvidia_cuda_cupti*.whl")"
printf 'x' | dd of="$wheel" bs=1 seek=1000 conv=notrunc status=none
"$setup" --keep-wheels 2>&1 | tee "$work/said"
check "noticed the damage" grep -q "cached copy is damaged" "$work/said"
check "LibTorch is there" test -f "$deps/libtorch/torch/lib/libtorch_cpu.so"
check "no half-made thing is left" test ! -e "$deps/libtorch.new" -a ! -e "$deps/libtorch.old" -a ! -e "$deps/cache/partial"
check "its build-version is 2.11.0" grep -q '^2\.11\.0' "$deps/libtorch/torch/build-version"

step "A second run"
before="$(stat -c %Y%i "$deps/libtorch/.complete")"
begun="$(date +%s%N)"
"$setup"
took_ms=$((($(date +%s%N) - begun) / 1000000))
check "took $took_ms ms (at most 1000)" test "$took_ms" -le 1000
check "changed nothing" test "$before" = "$(stat -c %Y%i "$deps/libtorch/.complete")"

step "Interrupted between the two renames"
mv "$deps/libtorch" "$deps/libtorch.new"
mkdir "$deps/libtorch.old"
"$setup"
check "went on" test -f "$deps/libtorch/.complete" -a ! -e "$deps/libtorch.old"

step "Two at once"
rm "$deps/libtorch/.complete"
"$setup" --keep-wheels 2>/dev/null &
first=$!
"$setup" --keep-wheels 2>/dev/null
wait "$first"
check "LibTorch is there once" test -f "$deps/libtorch/.complete" -a ! -e "$deps/libtorch.new"
note "set-up: all tests passed"
