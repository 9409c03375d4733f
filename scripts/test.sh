#!/usr/bin/env bash
# The second command: all quick tests. Slow ones have names of their own (--help).
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
cd "$ROOT"

usage() {
    cat <<'EOF'
Usage: scripts/test.sh [--fuzz [SECONDS]] [--setup] [--all]

Without arguments: every quick test — set-up, shell checks, formatting, clippy, cargo tests with a real engine.

  --fuzz [SECONDS]  the decoder of the client protocol against random bytes (default: 60)
  --setup           the set-up script from nothing, interrupted and damaged on the way (downloads LibTorch)
  --all             everything
EOF
}

quick=1 fuzz='' setup_tests=''
while (($#)); do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    --fuzz)
        quick='' fuzz=60
        if [[ "${2:-}" =~ ^[0-9]+$ ]]; then
            fuzz="$2"
            shift
        fi
        ;;
    --setup) quick='' setup_tests=1 ;;
    --all) all=1 ;;
    *) die "unknown argument '$1'" "scripts/test.sh --help lists what there is" ;;
    esac
    shift
done
if [[ -n "${all:-}" ]]; then quick=1 fuzz="${fuzz:-60}" setup_tests=1; fi

# What has been left out, and why; shown at the end, for cargo shows nothing of what a test that passes has to say.
skipped=()

# Tools that some checks use. Where UNDERSTUDY_REQUIRE_TOOLS is set, as in continuous integration, they must be there.
install_tools() {
    local packages=()
    have promtool || packages+=(prometheus)
    have shellcheck || packages+=(shellcheck)
    if ((${#packages[@]})) && [[ "$(id -u)" == 0 ]] && have apt-get; then
        step "Installing ${packages[*]}"
        local said apt=(apt-get -o Acquire::Retries=3 -o Acquire::http::Timeout=20)
        if ! said="$({ "${apt[@]}" update -qq && DEBIAN_FRONTEND=noninteractive \
            "${apt[@]}" install -y -qq --no-install-recommends "${packages[@]}"; } 2>&1)"; then
            warn "apt-get failed:" "$(tail -n 5 <<<"$said")"
        fi
    fi
    packages=()
    if ! have promtool; then
        packages+=(prometheus)
        skipped+=("the metrics page in the eyes of promtool (tests/integration/metrics.rs): promtool is missing")
    fi
    if ! have shellcheck; then
        packages+=(shellcheck)
        skipped+=("shellcheck of the scripts: it is missing")
    fi
    ((${#packages[@]})) || return 0
    [[ -z "${UNDERSTUDY_REQUIRE_TOOLS:-}" ]] ||
        die "not installed: ${packages[*]}" "UNDERSTUDY_REQUIRE_TOOLS is set, so nothing may be skipped for want of a tool"
    warn "not installed: ${packages[*]}; the checks that need them are skipped"
}

# One test fills a disk, and wants one of its own.
look_for_mount() {
    local folder
    folder="$(mktemp -d)"
    if mount -t tmpfs -o size=64k tmpfs "$folder" 2>/dev/null; then
        umount "$folder"
    else
        skipped+=("a node and a full disk (runtime/node/tests/launch/disk.rs): this user may not mount one")
    fi
    rmdir "$folder"
}

check_shell() {
    local scripts=(scripts/*.sh .ci/run) script
    for script in "${scripts[@]}"; do bash -n "$script"; done
    if have shellcheck; then
        shellcheck --external-sources --source-path="$ROOT" "${scripts[@]}"
    fi
    python3 - scripts/*.py <<'EOF'
import ast, sys
for script in sys.argv[1:]:
    ast.parse(open(script, encoding="utf-8").read(), script)
EOF
}

# Every relative link of every Markdown page leads somewhere.
check_links() {
    python3 - <<'EOF'
import pathlib, re, subprocess, sys
pages = [p for p in pathlib.Path(".").rglob("*.md")
         if not {"target", ".deps", ".git", "node_modules"} & set(p.parts)]
broken = []
for page in pages:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path = link.split("#")[0]
        if "://" in link or link.startswith("mailto:") or not path:
            continue
        if not (page.parent / path).exists():
            broken.append(f"{page}: {link}")
print("\n".join(broken), end="\n" if broken else "", file=sys.stderr)
sys.exit(bool(broken))
EOF
}

if [[ -n "$quick" ]]; then
    scripts/setup.sh
    install_tools
    look_for_mount
    step "Shell scripts and links"
    check_shell
    check_links
    step "Formatting"
    cargo fmt --all --check
    step "Clippy"
    cargo clippy --release --workspace --all-targets -- -D warnings
    step "Building the programs that the tests start"
    cargo build --release --workspace --bins
    step "Tests"
    # A test that needs a real engine, and finds none, fails instead of being skipped: this script has just built it.
    UNDERSTUDY_REQUIRE_ENGINE=1 cargo test --release --workspace
fi

if [[ -n "$fuzz" ]]; then
    step "Fuzzing the protocol's decoder for $fuzz s"
    cargo run --release -p understudy-protocol --example fuzz_decoder -- --seconds "$fuzz"
fi

if [[ -n "$setup_tests" ]]; then
    step "Set-up from nothing, with interruptions"
    scripts/test_setup.sh
fi

if ((${#skipped[@]})); then
    warn "skipped:"
    for what in "${skipped[@]}"; do note "$what"; done
fi
