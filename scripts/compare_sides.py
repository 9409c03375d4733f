"""The two programs that compare_llama_cpp.py compares, each behind the same three methods, and the clients of their servers.

`decode(format)` returns tokens a second by the number of streams, `prefill(format)` tokens a second, `serve(format, load)` a
`Served`. What cannot be measured, for want of an option, is empty or None. Every wait has a deadline.
"""

import contextlib
import http.client
import json
import math
import os
import random
import shlex
import socket
import subprocess
import tempfile
import threading
import time
from collections import namedtuple

DECODE_STREAMS = [1, 4, 8, 16, 32]
DECODE_TOKENS = 64
PREFILL_TOKENS = 512
# Tokens that each stream of llama-server is asked for before the measure.
WARM_UP_TOKENS = 4

ENGINE_FLAGS = {
    "f32": ["--dtype", "f32"],
    "bf16": ["--dtype", "bf16"],
    "int8": ["--dtype", "f32", "--quantization", "int8"],
}

# Deadlines, far above what a slow machine takes: one command, a server's start, one silence of a stream.
COMMAND_LIMIT_S = 1800
START_LIMIT_S = 120
SILENCE_LIMIT_S = 300

Served = namedtuple("Served", "tokens_per_s ttft_ms_p50 ttft_ms_p99")
Load = namedtuple("Load", "streams prompt_tokens output_tokens requests")


class CompareError(Exception):
    """What went wrong, where, and what to do about it."""


class LlamaCpp:
    """llama.cpp's own benchmarks; its server is asked over HTTP."""

    name = "llama.cpp"

    def __init__(self, args, ggufs):
        self.bin, self.threads, self.ggufs = args.llama_bin, str(args.threads), ggufs

    def version(self):
        return run([self.bin / "llama-bench", "--version"], stderr=subprocess.STDOUT).strip().partition("\n")[0]

    def decode(self, format):
        """Tokens a second by the number of streams. Like `understudy-engine bench`, it feeds tokens without sampling any."""
        streams = ",".join(map(str, DECODE_STREAMS))
        context = str(2 * DECODE_TOKENS * max(DECODE_STREAMS))
        lengths = ["-npp", str(DECODE_TOKENS), "-ntg", str(DECODE_TOKENS), "-npl", streams, "-c", context]
        command = [self.bin / "llama-batched-bench", "-m", self.ggufs[format], "-t", self.threads, *lengths]
        results = json_lines(run([*command, "--output-format", "jsonl"]), command)
        return {result["pl"]: result["speed_tg"] for result in results}

    def prefill(self, format):
        lengths = ["-p", str(PREFILL_TOKENS), "-n", "0"]
        command = [self.bin / "llama-bench", "-m", self.ggufs[format], "-t", self.threads, *lengths]
        # One timed run after a warm-up, as on the other side.
        results = json_lines(run([*command, "-r", "1", "-o", "jsonl"]), command)
        return results[0]["avg_ts"]

    def serve(self, format, load):
        with LlamaServer(self.bin / "llama-server", self.ggufs[format], self.threads, load) as server:
            return HttpServerBench(server).measure(load)


class Understudy:
    """The engine alone by its own benchmark, and the server by a command."""

    name = "Understudy"

    def __init__(self, args):
        self.engine, self.model_dir, self.threads = args.engine, args.model_dir, str(args.threads)
        self.server_bench = args.our_server_bench

    def decode(self, format):
        if not self.engine:
            return {}
        results = self.bench(format, DECODE_STREAMS, DECODE_TOKENS, DECODE_TOKENS)
        return {streams: decode for streams, (_, decode) in results.items()}

    def prefill(self, format):
        if not self.engine:
            return None
        prefill, _ = self.bench(format, [1], PREFILL_TOKENS, 1)[1]
        return prefill

    def bench(self, format, streams, prompt_tokens, output_tokens):
        """Runs `understudy-engine bench`; returns tokens a second of prefill and of decode by the number of streams."""
        lengths = ["--prompt-tokens", str(prompt_tokens), "--output-tokens", str(output_tokens)]
        sequences = ["--sequences", ",".join(map(str, streams))]
        command = [self.engine, "bench", self.model_dir, *ENGINE_FLAGS[format], "--threads", self.threads]
        results = json_lines(run([*command, *sequences, *lengths, "--json"]), command)
        found = {line["sequences"]: (line["prefill_tokens_per_s"], line["decode_tokens_per_s"]) for line in results}
        if sorted(found) != sorted(streams):
            raise CompareError(f"{shlex.join(map(str, command))} reported sequences {sorted(found)}, asked for {streams}")
        return found

    def serve(self, format, load):
        if not self.server_bench:
            return None
        words = {"{format}": format, "{model_dir}": str(self.model_dir or ""), "{threads}": self.threads}
        return CommandServerBench(self.server_bench, words).measure(load)


# Clients of servers.


class ServerBench:
    """Puts a load on a server: so many streams, each of which asks again when it has its answer."""

    def measure(self, load):
        raise NotImplementedError


class CommandServerBench(ServerBench):
    """A command that has a client of its own."""

    def __init__(self, command, words):
        self.command = [replaced(part, words) for part in shlex.split(command)]

    def measure(self, load):
        command = list(self.command)
        for name, value in load._asdict().items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        result = json_lines(run(command), command)[-1]
        try:
            return Served(*(float(result[field]) for field in Served._fields))
        except (KeyError, TypeError, ValueError):
            raise CompareError(f"{shlex.join(command)} printed {result}; it must have {', '.join(Served._fields)}") from None


def replaced(text, words):
    for word, value in words.items():
        text = text.replace(word, value)
    return text


class HttpServerBench(ServerBench):
    """llama-server's /completion, greedy, with prompts of random tokens."""

    def __init__(self, server):
        self.server = server

    def measure(self, load):
        self.requests(load._replace(output_tokens=WARM_UP_TOKENS, requests=load.streams), seed=0)
        seconds, first_tokens = self.requests(load, seed=1)
        percentiles = [nearest_rank(first_tokens, percent) for percent in (50, 99)]
        return Served(load.requests * load.output_tokens / seconds, *percentiles)

    def requests(self, load, seed):
        """Makes all requests; returns the seconds that they took together, and each one's milliseconds to the first token."""
        bodies = [self.body(load, random.Random(f"{seed}/{index}")) for index in range(load.requests)]
        lock, first_tokens, failures = threading.Lock(), [], []

        def stream():
            while True:
                with lock:
                    if not bodies or failures:
                        return
                    body = bodies.pop()
                try:
                    first_tokens.append(self.request(body, load))
                except (OSError, http.client.HTTPException, ValueError, CompareError) as error:
                    failures.append(error)

        threads = [threading.Thread(target=stream, daemon=True) for _ in range(load.streams)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begun
        if failures:
            raise CompareError(f"llama-server failed at a request: {failures[0]!r}\n{self.server.log_tail()}")
        return seconds, first_tokens

    def body(self, load, rng):
        # The middle of a vocabulary has no special tokens.
        low, high = self.server.vocab // 4, 3 * self.server.vocab // 4
        return json.dumps(
            {
                "prompt": [rng.randrange(low, high) for _ in range(load.prompt_tokens)],
                "n_predict": load.output_tokens,
                "stream": True,
                "ignore_eos": True,
                "cache_prompt": False,
                "temperature": 0,
                # The best candidate alone is what greedy means; the default chain sorts and filters first.
                "samplers": ["top_k"],
                "top_k": 1,
            }
        )

    def request(self, body, load):
        """One request; returns the milliseconds to its first token."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=SILENCE_LIMIT_S)
        with contextlib.closing(connection):
            begun = time.perf_counter()
            connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            # Nothing is parsed before the end: the client shares the cores with the server.
            pieces, first_ms = [], None
            while piece := response.read1():
                if first_ms is None:
                    first_ms = (time.perf_counter() - begun) * 1e3
                pieces.append(piece)
        answer = b"".join(pieces).decode()
        if response.status != 200:
            raise CompareError(f"status {response.status}: {answer[:200]}")
        events = [json.loads(line.removeprefix("data: ")) for line in answer.splitlines() if line.startswith("data: ")]
        counted = (events[-1].get("tokens_evaluated"), events[-1].get("tokens_predicted")) if events else None
        if counted != (load.prompt_tokens, load.output_tokens):
            raise CompareError(f"prompt and output tokens are {counted}; asked for {load.prompt_tokens, load.output_tokens}")
        return first_ms


class LlamaServer:
    """A running llama-server with a slot for each stream."""

    def __init__(self, program, gguf, threads, load):
        self.port = free_port()
        self.log = tempfile.TemporaryFile("w+")
        context = load.streams * (load.prompt_tokens + load.output_tokens)
        # A slot's share of the context is rounded down to a multiple of 256.
        context += load.streams * (-(load.prompt_tokens + load.output_tokens) % 256)
        listen = ["--host", "127.0.0.1", "--port", str(self.port)]
        slots = ["-np", str(load.streams), "-c", str(context), "--cache-ram", "0"]
        self.command = [program, "-m", gguf, "-t", threads, *listen, *slots]
        self.vocab = 0

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT)
        try:
            self.await_start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def await_start(self):
        deadline = time.monotonic() + START_LIMIT_S
        while self.get("/health") is None:
            if self.process.poll() is not None:
                raise CompareError(f"llama-server ended with {self.process.returncode} before it served\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise CompareError(f"llama-server did not serve within {START_LIMIT_S} s\n{self.log_tail()}")
            time.sleep(0.05)
        models = self.get("/v1/models")
        self.vocab = models["data"][0]["meta"]["n_vocab"]

    def get(self, path):
        """The JSON at a path, or None while there is none."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_LIMIT_S)) as connection:
            try:
                connection.request("GET", path)
                response = connection.getresponse()
                body = response.read()
            except (OSError, http.client.HTTPException):
                return None
        return json.loads(body) if response.status == 200 else None

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log_tail(self):
        self.log.seek(0)
        return tail(self.log.read())


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def nearest_rank(values, percent):
    return sorted(values)[max(math.ceil(len(values) * percent / 100) - 1, 0)]


# Commands.


def run(command, stderr=subprocess.PIPE):
    """The standard output of a command that must succeed."""
    shown = shlex.join(map(str, command))
    try:
        done = subprocess.run(
            [os.fspath(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=COMMAND_LIMIT_S,
        )
    except OSError as error:
        raise CompareError(f"cannot run {shown}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise CompareError(f"{shown} took more than {COMMAND_LIMIT_S} s") from None
    if done.returncode != 0:
        raise CompareError(f"{shown} failed with {done.returncode}\n{tail(done.stderr or done.stdout)}")
    return done.stdout


def json_lines(output, command):
    """The JSON objects among the lines of an output; the programs print other lines, too."""
    found = []
    for line in output.splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    if not found:
        raise CompareError(f"{shlex.join(map(str, command))} printed no JSON object\n{tail(output)}")
    return found


def tail(text, lines=12):
    return "\n".join(f"  | {line}" for line in text.splitlines()[-lines:])
