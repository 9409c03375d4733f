#!/usr/bin/env python3
"""Measures Understudy and llama.cpp on the same model, in turns, and prints both rates, their ratio, and the goal.

    scripts/compare_llama_cpp.py --llama-bin DIR --gguf-f32 FILE --gguf-bf16 FILE --gguf-q8 FILE \\
        --engine target/release/understudy-engine --model-dir DIR --our-server-bench COMMAND

Three measures: decode of several streams at once, prefill of one prompt, and a server under concurrent requests. A round
measures everything once; the two programs take turns, first one first and then the other, so that a machine that slows down
slows both. The table has the medians of the rounds. Leave --engine out to measure llama.cpp alone. The model's weights do not
matter: scripts/random_model.py writes one. Standard library only.

llama.cpp's int8 format is Q8_0. Its defaults are kept (flash attention, f16 cache), but its server is spared the sampling steps
and the prompt cache that greedy answers to new prompts do not need.

COMMAND measures Understudy's server. {format}, {model_dir} and {threads} in it are replaced, and these are added:
--streams N --prompt-tokens N --output-tokens N --requests N. It prints one JSON object: tokens_per_s, ttft_ms_p50, ttft_ms_p99.
"""

import argparse
import json
import os
import pathlib
import resource
import signal
import statistics
import sys
import time
from collections import namedtuple

from compare_sides import PREFILL_TOKENS, CompareError, LlamaCpp, Load, Understudy

FORMATS = ["f32", "bf16", "int8"]
MEASURES = ["decode", "prefill", "server"]
SERVER_PROMPT_TOKENS = 128
SERVER_OUTPUT_TOKENS = 64
SERVER_STREAMS = [8, 16]
# Each stream of the server test asks so often, one request after the other.
REQUESTS_PER_STREAM = 4
# What other processes may use meanwhile, in cores. A contended core costs the two programs very different shares of their rates
# (llama.cpp's threads spin while they wait for each other), so that the ratios of a busy machine mean nothing.
QUIET_CORES = 0.2
QUIET_SAMPLE_S = 1

# Ratios to llama.cpp's figure. Times are better when lower, and their goals are upper limits.
GOALS = {
    "decode, 1 stream": {"f32": 1.1, "bf16": 1.5, "int8": 1.5},
    "decode, 8 streams": {"f32": 1.6, "bf16": 2.5, "int8": 3.0},
    "decode, 32 streams": {"f32": 1.7, "bf16": 2.3, "int8": 2.5},
    "prefill, 512 tokens": {"f32": 1.6, "bf16": 1.7, "int8": 2.5},
    "server, 8 streams": {"f32": 1.8, "bf16": 2.2, "int8": 2.5},
    "server, 16 streams, first token p99": {"f32": 0.4, "bf16": 0.4, "int8": 0.3},
}
TOKENS_PER_S, MILLISECONDS = "tokens/s", "ms"

Row = namedtuple("Row", "format measure unit llama_cpp understudy ratio goal met llama_cpp_rounds understudy_rounds")


def main():
    args = parse_args()
    # An exception, so that a server that is being measured is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    disturbances = []
    try:
        sides = programs(args)
        found = [row for format in args.formats for row in compare(args, sides, format, disturbances)]
    except CompareError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
    if args.json:
        settings = {"llama_cpp": sides[0].version(), "threads": args.threads, "rounds": args.rounds}
        settings["disturbances"] = disturbances
        print(json.dumps({**settings, "rows": [row._asdict() for row in found]}, indent=2))
    else:
        print_table(found)
    if disturbances:
        note(f"{len(disturbances)} measures were disturbed by other processes: their figures and ratios are rough")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    path = pathlib.Path
    parser.add_argument("--llama-bin", type=path, required=True, help="has llama-bench, llama-batched-bench, llama-server")
    parser.add_argument("--gguf-f32", type=path, metavar="FILE")
    parser.add_argument("--gguf-bf16", type=path, metavar="FILE")
    parser.add_argument("--gguf-q8", type=path, metavar="FILE", help="Q8_0, compared with int8")
    parser.add_argument("--engine", type=path, metavar="FILE", help="understudy-engine; left out, only llama.cpp is measured")
    parser.add_argument("--model-dir", type=path, metavar="DIR", help="the same model in Hugging Face's layout")
    parser.add_argument("--our-server-bench", metavar="COMMAND", help="measures Understudy's server; see above")
    parser.add_argument("--formats", type=words(FORMATS), default=FORMATS, help="default: all of f32,bf16,int8")
    parser.add_argument("--measures", type=words(MEASURES), default=MEASURES, help="default: all of decode,prefill,server")
    parser.add_argument("--threads", type=int, default=2, help="compute threads of each program (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="the table has their medians (default: 3)")
    quiet = "before each measure, wait so long for other processes to leave the cores alone (default: 0)"
    parser.add_argument("--patience", type=float, default=0, metavar="SECONDS", help=quiet)
    parser.add_argument("--json", action="store_true", help="one JSON object, with the figures of each round")
    args = parser.parse_args()
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    if args.engine and not args.model_dir:
        parser.error("--engine needs --model-dir")
    return args


def words(allowed):
    """A parser of comma-separated lists of the allowed words."""

    def parse(value):
        chosen = value.split(",")
        for word in chosen:
            if word not in allowed:
                raise argparse.ArgumentTypeError(f"{word!r} is not known; allowed: {', '.join(allowed)}")
        return chosen

    return parse


def programs(args):
    """The two sides, after checking that the files they need are there; the second is None if it is left out."""
    ggufs = {"f32": ("--gguf-f32", args.gguf_f32), "bf16": ("--gguf-bf16", args.gguf_bf16), "int8": ("--gguf-q8", args.gguf_q8)}
    for format in args.formats:
        option, file = ggufs[format]
        if not file:
            raise CompareError(f"format {format} needs {option} FILE; or leave it out of --formats")
        need_file(file, option)
    tools = {"decode": "llama-batched-bench", "prefill": "llama-bench", "server": "llama-server"}
    for tool in ["llama-bench", *(tools[measure] for measure in args.measures)]:
        need_file(args.llama_bin / tool, "--llama-bin")
    if args.engine:
        need_file(args.engine, "--engine")
        need_file(args.model_dir / "config.json", "--model-dir")
        if "server" in args.measures and not args.our_server_bench:
            note("no --our-server-bench: of the servers, only llama.cpp's is measured")
    llama_cpp = LlamaCpp(args, {format: file for format, (_, file) in ggufs.items()})
    return llama_cpp, Understudy(args) if args.engine or args.our_server_bench else None


def need_file(path, option):
    if not path.is_file():
        raise CompareError(f"{path} is not a file; check {option}")


# Rounds, and what is made of them.


def compare(args, sides, format, disturbances):
    """The rows of one format; what other processes disturbed is added to the list."""
    results = [[] for _ in sides]
    for turn in range(args.rounds):
        found = [{} for _ in sides]
        for name, job in jobs(args):
            # The order alternates, so that neither side always has the machine that the other has warmed up.
            for index in (0, 1) if turn % 2 == 0 else (1, 0):
                if sides[index]:
                    label = f"{format}, round {turn + 1} of {args.rounds}: {name}, {sides[index].name}"
                    note(label)
                    await_quiet(args.patience)
                    watch = Watch()
                    found[index].update(job(sides[index], format))
                    if (cores := watch.others()) > QUIET_CORES:
                        note(f"  meanwhile, other processes used {cores:.1f} cores")
                        disturbances.append({"measure": label, "cores": round(cores, 2)})
        for index, figures in enumerate(found):
            results[index].append(figures)
    return rows(format, *results)


def jobs(args):
    """What a round is made of: functions of a side and a format, which return figures by the names of rows."""

    def decode(side, format):
        return {(f"decode, {count_of(n)}", TOKENS_PER_S): rate for n, rate in side.decode(format).items()}

    def prefill(side, format):
        rate = side.prefill(format)
        return {} if rate is None else {(f"prefill, {PREFILL_TOKENS} tokens", TOKENS_PER_S): rate}

    def server(streams):
        load = Load(streams, SERVER_PROMPT_TOKENS, SERVER_OUTPUT_TOKENS, REQUESTS_PER_STREAM * streams)

        def serve(side, format):
            served, name = side.serve(format, load), f"server, {count_of(streams)}"
            if served is None:
                return {}
            return {
                (name, TOKENS_PER_S): served.tokens_per_s,
                (f"{name}, first token p50", MILLISECONDS): served.ttft_ms_p50,
                (f"{name}, first token p99", MILLISECONDS): served.ttft_ms_p99,
            }

        return serve

    parts = {
        "decode": [("decode", decode)],
        "prefill": [("prefill", prefill)],
        "server": [(f"server with {count_of(streams)}", server(streams)) for streams in SERVER_STREAMS],
    }
    return [job for measure in MEASURES if measure in args.measures for job in parts[measure]]


def await_quiet(patience_s):
    """Waits until other processes leave the cores alone, but no longer than that."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        watch = Watch()
        time.sleep(QUIET_SAMPLE_S)
        if watch.others() <= QUIET_CORES:
            return


class Watch:
    """The processor time that others use, from now on."""

    def __init__(self):
        self.begun, self.used = time.monotonic(), self.others_seconds()

    def others(self):
        """In cores. A server that the command of --our-server-bench found running counts as another's."""
        return (self.others_seconds() - self.used) / (time.monotonic() - self.begun)

    @staticmethod
    def others_seconds():
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        # Children count once they have been waited for: each measure ends its own.
        own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return busy - sum(usage.ru_utime + usage.ru_stime for usage in own)


def count_of(streams):
    return f"{streams} stream{'s' if streams > 1 else ''}"


def rows(format, theirs, ours):
    """Medians of the rounds, in the order in which llama.cpp's first round found them."""
    for measure, unit in theirs[0]:
        their_rounds = [figures[measure, unit] for figures in theirs]
        our_rounds = [figures[measure, unit] for figures in ours if (measure, unit) in figures]
        their_median, our_median = statistics.median(their_rounds), statistics.median(our_rounds) if our_rounds else None
        ratio = our_median / their_median if our_rounds else None
        goal = GOALS.get(measure, {}).get(format)
        met = None
        if goal is not None and ratio is not None:
            met = ratio <= goal if unit == MILLISECONDS else ratio >= goal
        yield Row(format, measure, unit, their_median, our_median, ratio, goal, met, their_rounds, our_rounds)


def print_table(rows):
    lines = [["format", "measure", "unit", "llama.cpp", "Understudy", "ratio", "goal", "met"]]
    for row in rows:
        sign = "≤" if row.unit == MILLISECONDS else "≥"
        lines.append(
            [
                row.format,
                row.measure,
                row.unit,
                cell(row.llama_cpp, ".1f"),
                cell(row.understudy, ".1f"),
                cell(row.ratio, ".2f"),
                "-" if row.goal is None else f"{sign} {row.goal}",
                {None: "-", True: "yes", False: "no"}[row.met],
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |")


def cell(value, form):
    return "-" if value is None else format(value, form)


def note(text):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
