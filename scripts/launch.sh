#!/usr/bin/env bash
# The first command: sets up, builds, and starts a cluster. Each part does nothing where nothing is left to do.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

DEFAULT_CONFIG="$ROOT/config/profiles/local.toml"

usage() {
    cat <<'EOF'
Usage: scripts/launch.sh [CONFIG] [--detach] [--no-sample] [--cuda]
       scripts/launch.sh stop | status | ps | logs NODE [-f]  [CONFIG]

Fetches LibTorch, builds in release mode, starts the cluster of CONFIG (default: config/profiles/local.toml), waits until
it serves, streams one sample completion, and stays until Ctrl-C, which stops everything. Words may come in any order.

  CONFIG        a cluster's TOML file; nodes that name an ssh destination are started there
  --detach      return when the cluster serves, and leave it running
  --no-sample   no sample completion
  --cuda        the full LibTorch, with CUDA

  stop          stop the cluster
  status        what its gateways say: nodes, replicas, requests
  ps            which of its processes run
  logs NODE     a node's log; -f goes on showing what is added; `logs launcher` for a detached launcher's own
EOF
}

config='' verb=up detach='' sample='' node='' setup=() follow=()
while (($#)); do
    case "$1" in
    -h | --help)
        usage
        exit 0
        ;;
    --detach | -d) detach=--detach ;;
    --no-sample) sample=--no-sample ;;
    --cuda) setup+=(--cuda) ;;
    -f | --follow) follow=(--follow) ;;
    -*) die "unknown option '$1'" "scripts/launch.sh --help lists what there is" ;;
    *)
        # The first word behind `logs` is the node, whatever it is called; a configuration may stand between them.
        if [[ "$verb" == logs && -z "$node" && ! ("$1" == *.toml && -f "$1") ]]; then
            node="$1"
        else
            case "$1" in
            stop | down) verb=stop ;;
            status | ps | logs) verb="$1" ;;
            *)
                [[ -z "$config" ]] || die "two configurations: '$config' and '$1'" "name one"
                [[ -f "$1" ]] ||
                    die "'$1' is neither a command of this script nor a file" "scripts/launch.sh --help lists what there is"
                config="$1"
                ;;
            esac
        fi
        ;;
    esac
    shift
done
[[ "$verb" != logs || -n "$node" ]] || die "logs: which node?" "scripts/launch.sh logs NODE"
case "$verb$detach$sample${follow[*]-}" in
up | up--detach | up--no-sample | up--detach--no-sample | stop | status | ps | logs | logs--follow) ;;
*) die "these words do not go together" "scripts/launch.sh --help shows the forms" ;;
esac

config="${config:-$DEFAULT_CONFIG}"
understudy="$PROGRAMS/understudy"
via="${0}"

if [[ "$verb" != up ]]; then
    # To stop or look at a cluster nothing is built.
    [[ -x "$understudy" ]] || die "nothing has been built here yet, so nothing runs" "scripts/launch.sh starts a cluster"
    case "$verb" in
    stop) exec "$understudy" down "$config" ;;
    status) exec "$understudy" status --config "$config" ;;
    ps) exec "$understudy" ps "$config" ;;
    logs) exec "$understudy" logs "$node" --config "$config" ${follow[@]+"${follow[@]}"} ;;
    esac
fi

# Beside a running cluster nothing is built: its programs would be replaced under it. Status 1 alone means that it runs;
# programs of another version may know neither the option nor the configuration.
if [[ -x "$understudy" ]]; then
    status=0
    said="$("$understudy" up "$config" --if-free --via "$via" 2>&1)" || status=$?
    if ((status == 1)); then
        printf '%s\n' "$said" >&2
        exit 1
    fi
fi

"$ROOT/scripts/setup.sh" --quiet ${setup[@]+"${setup[@]}"}

# Cargo shows its progress: a bar on a terminal, a line for each crate elsewhere.
[[ -x "$understudy" ]] || step "Building (the first time takes some minutes)"
build_binaries

exec "$understudy" up "$config" ${detach:+"$detach"} ${sample:+"$sample"} --via "$via"
