#!/usr/bin/env python3
"""Sets llama.cpp's figures beside podium's in a Markdown table.

    compare.py llama.json podium.jsonl

The first file is llama.py's, the second the lines of `podium bench --device cpu --json`. Of a
workload of one output token the prefill is compared, of all others the decode steps. podium's
share of the limit is that of the bytes or of the multiplications, whichever is larger; both limits
were measured by podium in the same process.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HEADER = ("workload", "llama.cpp tok/s", "podium tok/s", "ratio", "podium's share of the limit")


def with_spread(spread: dict[str, float]) -> str:
    digits = 2 if spread["median"] < 10 else 1 if spread["median"] < 100 else 0
    median, least, most = (f"{spread[key]:.{digits}f}" for key in ("median", "least", "most"))
    return f"{median} ({least}..{most})"


def share_of_limit(report: dict[str, Any], phase: str) -> str:
    limits = report["limits"]
    shares = {}
    if phase == "decode" and report["share_of_bandwidth"] is not None:
        shares["memory"] = report["share_of_bandwidth"]
    flops = report[f"{phase}_flops_per_s"]
    if flops is not None and limits["flops_per_s"] is not None:
        shares["multiplications"] = flops["median"] / limits["flops_per_s"]
    if not shares:
        return ""
    limit = max(shares, key=lambda name: shares[name])
    return f"{100 * shares[limit]:.0f} % of {limit}"


def row(peer: dict[str, Any], report: dict[str, Any]) -> tuple[str, ...]:
    phase = "prefill" if report["output_tokens"] == "1" else "decode"
    theirs = peer["workloads"][report["workload"]][f"{phase}_tokens_per_s"]
    ours = report[f"{phase}_tokens_per_s"]
    return (
        report["workload"],
        with_spread(theirs),
        with_spread(ours),
        f"{ours['median'] / theirs['median']:.2f}",
        share_of_limit(report, phase),
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Sets llama.cpp's figures beside podium's in a Markdown table."
    )
    parser.add_argument("peer", type=Path, help="of llama.py")
    parser.add_argument("podium", type=Path, help="of `podium bench --device cpu --json`")
    args = parser.parse_args()
    peer = json.loads(args.peer.read_text())
    reports = [json.loads(line) for line in args.podium.read_text().splitlines() if line]
    for schema in [peer["schema"]] + [report["schema"] for report in reports]:
        if schema not in ("podium.peer/1", "podium.bench/2"):
            parser.error(f"cannot read {schema}")
    rows = [row(peer, report) for report in reports if report["workload"] in peer["workloads"]]
    if not rows:
        parser.error("no workload is in both files")
    first = reports[0]
    print(f"{peer['device']}, {peer['threads']} threads: llama.cpp {peer['version']} on")
    print(f"{peer['model']}, podium {first['numerics']} on {first['model']};")
    print(f"medians (least..most) of {peer['repeats']} and {first['repeats']} runs\n")
    print(f"| {' | '.join(HEADER)} |\n|---|--:|--:|--:|--:|")
    for cells in rows:
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
