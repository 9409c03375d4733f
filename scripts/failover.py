#!/usr/bin/env python3
"""Kills the engine that is generating an answer, in the middle of it, and checks that the answer goes on.

    scripts/launch.sh --detach
    scripts/failover.py [--config FILE] [--to N] [--streams S]

Asks the cluster to count, several times at once, and shows one of the answers; a lost, repeated or changed number is visible
to the naked eye, and looked for in all of them. Exits with 1 if there is one. Standard library only; the engines must run on
this machine.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
WIDTH = 100
# A killed engine is replaced in a second or two; a slow machine may take longer.
HEAL_S = 60


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "config/profiles/local.toml"))
    parser.add_argument("--to", type=int, default=300, help="count from 1 to this (default: 300)")
    parser.add_argument("--streams", type=int, default=16, help="answers at the same time (default: 16)")
    parser.add_argument("--understudy", default=str(ROOT / "target/release/understudy"))
    args = parser.parse_args()
    show = Wrapped()
    show.line(f"> Count from 1 to {args.to}.  ({args.streams} times at once; one is shown)")
    for replica in status(args)["replicas"]:
        show.line(f"  engine of {name(replica)}: pid {pid(replica)}")
    look = Look(args)
    answers = [Answer(args) for _ in range(args.streams)]
    try:
        victim = watch(args, answers, look, show)
    finally:
        for ended in [look, *answers]:
            ended.end()
    judge(args, answers, victim, show)


def watch(args, answers, look, show):
    """Shows the answer that began last, and kills the busiest engine in the middle of it. Returns that one."""
    answer = answers[-1]
    # Early: the engine is ahead of what has been shown.
    kill_at, shown, victim = args.to // 6, 0, None
    while shown < len(answer.pieces) or answer.thread.is_alive():
        if shown == len(answer.pieces):
            time.sleep(0.001)
            continue
        show.text(answer.pieces[shown])
        shown += 1
        if shown == kill_at:
            victim = look.busiest()
            if not victim:
                sys.exit("\nno engine is busy: the answers were too short; try more (--streams), or longer ones (--to)")
            os.kill(pid(victim), signal.SIGKILL)
            show.line("")
            show.line(f"  --- kill -9 {pid(victim)}: the engine of {name(victim)}, {victim['in_flight']} answers on it ---")
    show.line("")
    for answer in answers:
        answer.thread.join()  # the requests have a deadline of their own
    return victim


def judge(args, answers, victim, show):
    wanted = [str(number) for number in range(1, args.to + 1)]
    wrong = 0
    for answer in answers:
        numbers = "".join(answer.pieces).split()
        if answer.error or numbers != wanted:
            wrong += 1
            at = next((i for i, pair in enumerate(zip(numbers, wanted)) if pair[0] != pair[1]), min(len(numbers), args.to))
            show.line(f"  WRONG: {answer.error or f'from number {at + 1} on: ' + ' '.join(numbers[at : at + 8])}")
    for replica in healed(args, victim):
        restarts = sum(worker["restarts"] for worker in replica["workers"])
        show.line(f"  engine of {name(replica)}: {replica['state']}, pid {pid(replica)}, restarts {restarts}")
    longest = max(answer.longest_pause for answer in answers)
    show.line(f"  {args.streams} streams of {answers[0].tokens} tokens; longest pause of any {longest * 1e3:.0f} ms")
    if wrong:
        sys.exit(f"  {wrong} of {args.streams} answers are wrong")
    show.line(f"  every answer has all {args.to} numbers: none lost, none repeated, none changed")


def healed(args, victim):
    """The replicas, once an engine serves in the place of the killed one; as they are, when that takes too long."""
    deadline = time.monotonic() + HEAL_S
    while True:
        replicas = status(args)["replicas"]
        serve = all(replica["state"] == "ready" and pid(replica) for replica in replicas)
        replaced = not victim or all(pid(replica) != pid(victim) for replica in replicas)
        if serve and replaced or time.monotonic() > deadline:
            return replicas
        time.sleep(0.05)


class Look:
    """The cluster's status, over and over: asking at the moment of the kill might take longer than the answer."""

    def __init__(self, args):
        command = [args.understudy, "status", "--config", args.config, "--json", "--watch", "--interval", "5ms"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.replicas = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.replicas = json.loads(line)["replicas"]

    def busiest(self):
        busy = [replica for replica in self.replicas if replica["in_flight"] and pid(replica)]
        return max(busy, key=lambda replica: replica["in_flight"], default=None)

    def end(self):
        self.process.kill()
        self.process.wait()


class Answer:
    """One `understudy generate`, read by a thread."""

    def __init__(self, args):
        command = [args.understudy, "generate", "--config", args.config, "--message", f"Count from 1 to {args.to}."]
        command += ["--temperature", "0", "--max-tokens", str(20 * args.to), "--json"]
        self.pieces, self.tokens, self.error, self.longest_pause = [], 0, None, 0.0
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        last = None
        for line in self.process.stdout:
            event, now = json.loads(line), time.monotonic()
            if "position" not in event:
                self.error = event["error"]["message"] if "error" in event else None
                self.tokens = len(self.pieces)
                self.pieces.append(event.get("text", ""))
                return
            if event["position"] != len(self.pieces):
                self.error = f"position {event['position']} came where {len(self.pieces)} was due"
                return
            self.longest_pause = max(self.longest_pause, now - last if last else 0.0)
            self.pieces.append(event["text"])
            last = now
        self.error = "the stream ended without its end"

    def end(self):
        self.process.kill()
        self.process.wait()


def status(args):
    command = [args.understudy, "status", "--config", args.config, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def name(replica):
    return f"{replica['model']}/{replica['replica']} on node {replica['node']}"


def pid(replica):
    return replica["workers"][0]["engine_pid"] if replica["workers"] else None


class Wrapped:
    """Text in lines of a width, each word as it comes."""

    def __init__(self):
        self.column = 0

    def text(self, text):
        for character in text:
            if self.column >= WIDTH and character == " ":
                self._put("\n", 0)
            else:
                self._put(character, self.column + 1)

    def line(self, text):
        self._put(("\n" if self.column else "") + text + ("\n" if text else ""), 0)

    def _put(self, text, column):
        self.column = column
        print(text, end="", flush=True)


if __name__ == "__main__":
    main()
