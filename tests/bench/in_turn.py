#!/usr/bin/env python3
"""Runs podium and llama.cpp in turn, workload by workload, and prints a Markdown table.

    in_turn.py --podium podium --llama llama-batched-bench --model random.gguf --rounds 3 --cpus 0,1

For virtual machines, whose speed changes by the minute. Both programs are loaded once and stopped
(SIGSTOP) while the other one runs, so that what is compared is some seconds apart; in every other
round llama.cpp is first. With `--probe ./probe` (probe.c) each turn is on the CPUs that are least
disturbed just before it.

A program is stopped when it has told a workload's figures, some milliseconds into the next one:
podium into the round that warms up, llama.cpp into a prompt whose time is not used. Replies are
short, and llama.cpp computes prompts once for all sequences (`-pps`), since only decode steps are
compared; both take the steps that compare.py's table has. Needs nothing but Python.
"""

import argparse
import atexit
import contextlib
import json
import os
import pty
import signal
import statistics
import subprocess
import sys
import time
from typing import Any, TextIO

# Workloads of a turn. Of the first two llama.cpp takes the prefill last, since it is stopped after it.
TURNS = (("1x16/16", "prefill-512"), ("8x16/8",), ("32x16/6",), ("64x16/6",))
BEGUN = time.monotonic()


def say(*words: object) -> None:
    print(f"{time.monotonic() - BEGUN:6.0f} s", *words, file=sys.stderr, flush=True)


class Program:
    """One of the two, stopped unless it has its turn."""

    def __init__(self, words: list[str]) -> None:
        # A terminal: to a pipe llama.cpp would write all lines at its end.
        ours, theirs = pty.openpty()
        self.name = os.path.basename(words[0])
        self.process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        # What is stopped would outlive this script.
        atexit.register(self.process.kill)
        self.lines: TextIO = os.fdopen(ours, errors="replace")

    def figures(self) -> dict[str, Any]:
        """The next JSON object that it writes."""
        while True:
            try:
                line = self.lines.readline()
            except OSError:  # what a terminal gives at its end
                line = ""
            if not line:
                sys.exit(f"{self.name} ended with {self.process.wait()}")
            with contextlib.suppress(ValueError):
                found: dict[str, Any] = json.loads(line[line.index("{") :])
                return found

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self, cpus: set[int]) -> None:
        for thread in os.listdir(f"/proc/{self.process.pid}/task"):
            with contextlib.suppress(OSError):  # it may have ended
                os.sched_setaffinity(int(thread), cpus)
        self.process.send_signal(signal.SIGCONT)


def podium(args: argparse.Namespace, turns: tuple[tuple[str, ...], ...]) -> Program:
    layers = "" if args.layers == 24 else f":layers={args.layers}"
    workloads = ["1x16/2"] + [name for turn in turns for name in turn] * args.rounds
    words = [args.podium, "bench", "--device", "cpu", "--threads", str(args.threads), "--json"]
    words += ["--model", f"synthetic:gpt-oss-20b{layers}", "--repeats", str(args.repeats)]
    return Program(words + ["--workload", ",".join(workloads)])


def llama(args: argparse.Namespace, context: int, options: dict[str, str]) -> Program:
    words = [args.llama, "--model", args.model, "--output-format", "jsonl", "-pps"]
    words += ["--threads", str(args.threads), "--threads-batch", str(args.threads)]
    words += ["--batch-size", "2048", "--ubatch-size", "512", "--ctx-size", str(context)]
    return Program(words + [word for pair in options.items() for word in pair])


def cpus(args: argparse.Namespace) -> tuple[str, str]:
    """The CPUs for a turn, and why."""
    if args.cpus:
        return args.cpus, ""
    done = subprocess.run(
        [args.probe, str(args.threads)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr.strip()


def spread(values: list[float]) -> str:
    digits = 2 if statistics.median(values) < 10 else 1 if statistics.median(values) < 100 else 0
    median, least, most = (f(values) for f in (statistics.median, min, max))
    return f"{median:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Runs podium and llama.cpp in turn; a Markdown table on stdout."
    )
    parser.add_argument("--podium", required=True, help="podium")
    parser.add_argument("--llama", required=True, help="llama-batched-bench")
    parser.add_argument("--model", required=True, help="a file of random_gguf.py")
    parser.add_argument("--layers", type=int, default=24, help="of that file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--repeats", type=int, default=1, help="of podium's workloads in a turn, for their medians"
    )
    parser.add_argument(
        "--turns", type=int, default=len(TURNS), help="the first so many alone: 1 is one sequence"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--cpus", help="numbers, commas between: as many as threads")
    where.add_argument("--probe", help="what names them before each turn")
    args = parser.parse_args()

    turns = TURNS[: args.turns]
    names = [name for turn in turns for name in turn]
    ours: dict[str, list[float]] = {name: [] for name in names}
    theirs: dict[str, list[float]] = {name: [] for name in names}
    limits = {}

    def turn_of_podium(program: Program, turn: tuple[str, ...]) -> None:
        where, why = cpus(args)
        program.go_on({int(cpu) for cpu in where.split(",")})
        for name in turn:
            found = program.figures()
            if found["workload"] != name:
                sys.exit(f"podium told {found['workload']} where {name} was expected")
            phase = "prefill" if name.startswith("prefill") else "decode"
            ours[name].append(found[f"{phase}_tokens_per_s"]["median"])
            limits.update(found["limits"])
            say(f"podium {name}: {ours[name][-1]:.4g} tok/s on {where}", why)
        program.stop()

    def turn_of_llama(program: Program, turn: tuple[str, ...]) -> None:
        where, why = cpus(args)
        program.go_on({int(cpu) for cpu in where.split(",")})
        for name in turn:
            found = program.figures()
            rate = found["speed_pp" if name.startswith("prefill") else "speed_tg"]
            theirs[name].append(rate)
            say(f"llama.cpp {name}: {rate:.4g} tok/s on {where}", why)
        program.stop()

    # Each begins with a workload that is not used, told when it is loaded.
    everywhere = os.sched_getaffinity(0)
    first, _ = cpus(args)
    os.sched_setaffinity(0, {int(cpu) for cpu in first.split(",")})
    n = args.rounds
    alone = {"-npp": ",".join(["15"] + ["15", "512"] * n), "-ntg": "16", "-npl": "1"}
    together = {"-npp": "15", "-ntg": "6", "-npl": ",".join(["1"] + ["8,32,64"] * n)}
    programs = []
    begins = (
        lambda: podium(args, turns),
        lambda: llama(args, 768, alone),
        lambda: llama(args, 16384, together),
    )
    for begin in begins if len(turns) > 1 else begins[:2]:
        program = begin()
        program.figures()
        program.stop()
        programs.append(program)
        say(program.name, "is loaded")
    os.sched_setaffinity(0, everywhere)

    for number in range(n):
        for turn in turns:
            in_turn = [
                (turn_of_podium, programs[0]),
                (turn_of_llama, programs[1 if turn == TURNS[0] else 2]),
            ]
            for run, program in in_turn if number % 2 == 0 else reversed(in_turn):
                run(program, turn)

    rates = f"{limits['bytes_per_s'] / 1e9:.1f} GB/s and {limits['flops_per_s'] / 1e12:.2f} TFLOP/s"
    print(f"{args.layers} layers, {n} rounds: medians (least to most), {rates} at first\n")
    print("| workload | podium tok/s | llama.cpp tok/s | ratio of medians (of each round) |")
    print("|---|--:|--:|--:|")
    for name in names:
        pairs = zip(ours[name], theirs[name], strict=True)
        of_rounds = ", ".join(f"{a / b:.2f}" for a, b in pairs)
        ratio = statistics.median(ours[name]) / statistics.median(theirs[name])
        cells = (name, spread(ours[name]), spread(theirs[name]), f"{ratio:.2f} ({of_rounds})")
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
