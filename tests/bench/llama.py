#!/usr/bin/env python3
"""Measures llama.cpp on podium's CPU workloads and writes one JSON object to stdout.

    llama.py --program llama-batched-bench --model FILE.gguf --threads N [--repeats N] > llama.json

llama-batched-bench takes the prompts' lengths as a list, so each workload is one process: its first
round warms up and is left out, as in `podium bench`. podium runs all but the last token of a prompt
in its prefill and the last one in the first decode step, so the prompts here are one token shorter
and both programs take the same steps. Needs nothing but Python.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

# name: sequences, tokens of a prompt as podium counts them, tokens of a reply.
WORKLOADS = {
    "prefill-512": (1, 513, 1),
    "decode-1": (1, 16, 32),
    "decode-8": (8, 16, 32),
    "decode-32": (32, 16, 16),
    "decode-64": (64, 16, 16),
}

# llama.cpp rounds the context of a sequence up to a multiple of this.
CONTEXT_STEP = 256


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def command(args: argparse.Namespace, sequences: int, prompt: int, output: int) -> list[str]:
    n_prefill = prompt - 1
    context = -(-(n_prefill + output) // CONTEXT_STEP) * CONTEXT_STEP
    options: dict[str, str | int] = {
        "--model": args.model,
        "--threads": args.threads,
        "--threads-batch": args.threads,
        "--ctx-size": sequences * context,
        "--batch-size": 2048,
        "--ubatch-size": 512,
        "-npp": ",".join([str(n_prefill)] * (1 + args.repeats)),
        "-ntg": output,
        "-npl": sequences,
        "--output-format": "jsonl",
    }
    words = [args.program] + [str(word) for pair in options.items() for word in pair]
    return words + args.options


def measure(words: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """Runs llama-batched-bench once and takes what all rounds but the first came to."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    rounds = [json.loads(line) for line in lines if line.startswith("{")]
    if done.returncode != 0 or len(rounds) != 1 + repeats:
        sys.exit(f"{shlex.join(words)} gave {done.returncode}:\n{done.stderr[-2000:]}")
    return {
        "prefill_tokens_per_s": spread([one["speed_pp"] for one in rounds[1:]]),
        "decode_tokens_per_s": spread([one["speed_tg"] for one in rounds[1:]]),
    }


def version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return " ".join((done.stdout + done.stderr).split())


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Measures llama.cpp on podium's CPU workloads; JSON on stdout."
    )
    parser.add_argument("--program", required=True, help="llama-batched-bench")
    parser.add_argument("--model", required=True, help="a file of random_gguf.py")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=3, help="after one that warms up")
    parser.add_argument("--workload", default=",".join(WORKLOADS), help="names, commas between")
    parser.add_argument(
        "--options",
        type=shlex.split,
        default=[],
        help="more options for llama-batched-bench, in one word: --options='--no-mmap'",
    )
    args = parser.parse_args()
    names = args.workload.split(",")
    if unknown := [name for name in names if name not in WORKLOADS]:
        parser.error(f"no workload {unknown[0]}, expected {', '.join(WORKLOADS)}")
    workloads = {}
    for name in names:
        workloads[name] = measure(command(args, *WORKLOADS[name]), args.repeats)
        print(name, json.dumps(workloads[name]), file=sys.stderr)
    report = {
        "schema": "podium.peer/1",
        "version": version(args.program),
        "model": Path(args.model).name,
        "model_bytes": Path(args.model).stat().st_size,
        "device": cpu_model(),
        "cpus": sorted(os.sched_getaffinity(0)),
        "threads": args.threads,
        "options": args.options,
        "repeats": args.repeats,
        "workloads": workloads,
    }
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
