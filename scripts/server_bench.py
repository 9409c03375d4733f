#!/usr/bin/env python3
"""Starts a cluster of one node and one replica for a checkpoint, puts a load on it, and prints one JSON object.

    scripts/server_bench.py --model-dir DIR --format f32|bf16|int8 --threads 2 \\
        --streams 8 --prompt-tokens 128 --output-tokens 64 --requests 32

What scripts/compare_llama_cpp.py takes as --our-server-bench. Every request has a random prompt of its own, so that no prefix cache
helps, and goes the whole way: client, TCP protocol, gateway, router, worker, engine. Needs the programs in target/release.
"""

import argparse
import json
import pathlib
import socket
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
UNDERSTUDY = ROOT / "target/release/understudy"
MODEL_KEYS = {
    "f32": 'dtype = "f32"',
    "bf16": 'dtype = "bf16"',
    "int8": 'dtype = "f32"\nquantization = "int8"',
}
LIMIT_S = 900


def main():
    args = parse_args()
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as folder:
        config = pathlib.Path(folder) / "cluster.toml"
        port = free_port()
        config.write_text(toml(args, port))
        run([UNDERSTUDY, "up", "--detach", "--no-sample", config])
        try:
            found = json.loads(run(load(args, port)))
        finally:
            run([UNDERSTUDY, "down", config])
    if found.get("failed", 0):
        sys.exit(f"error: {found['failed']} requests failed: {found}")
    ttft = found["ttft_ms"]
    print(json.dumps({
        "tokens_per_s": found["output_tokens_per_second"],
        "ttft_ms_p50": ttft["p50"],
        "ttft_ms_p99": ttft["p99"],
    }))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=pathlib.Path, required=True)
    parser.add_argument("--format", choices=sorted(MODEL_KEYS), required=True)
    for name in ["threads", "streams", "prompt-tokens", "output-tokens", "requests"]:
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args()


def toml(args, port):
    """Sixteen sequences and a chunk of 256 tokens a step: the defaults, written down."""
    return f"""[cluster]
name = "bench"
run_dir = "run"

[[node]]
name = "bench"
cluster_port = {free_port()}
client_port = {port}
devices = ["cpu"]

[[model]]
name = "bench"
path = "{args.model_dir.resolve()}"
threads = {args.threads}
max_sequences = 16
context_length = 1024
{MODEL_KEYS[args.format]}
"""


def load(args, port):
    vocabulary = json.loads((args.model_dir / "config.json").read_text())["vocab_size"]
    # Ids from the middle of the vocabulary: none of them is special.
    ids = f"{vocabulary // 4}..{vocabulary * 3 // 4 - 1}"
    numbers = {
        "--concurrency": args.streams,
        "--requests": args.requests,
        "--prompt-tokens": args.prompt_tokens,
        "--output-tokens": args.output_tokens,
    }
    options = [str(word) for pair in numbers.items() for word in pair]
    return [UNDERSTUDY, "bench", "--addr", f"127.0.0.1:{port}", "--prompt-ids", ids, *options, "--ignore-eos", "--json"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
