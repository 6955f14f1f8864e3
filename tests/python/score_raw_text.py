#!/usr/bin/env python3
"""Scores a run's raw replies against its data set's gold, sharing nothing with podium.

    score_raw_text.py DATASET.jsonl RUN_FOLDER

Reads only `raw_text` from results.jsonl and `answer` from the data set, and compares the count of
correct rows with the one in run.json. pandas reads the submission as a competition would.
"""

import json
import re
import sys
from pathlib import Path

import pandas


def final_message(raw_text: str) -> str:
    """The text of the last final message of a Harmony reply."""
    found = re.findall(
        r"<\|channel\|>final<\|message\|>(.*?)(?:<\|return\|>|<\|end\|>|<\|endoftext\|>|$)",
        raw_text,
        re.DOTALL,
    )
    return found[-1].strip() if found else ""


def main() -> int:
    dataset, run = Path(sys.argv[1]), Path(sys.argv[2])
    gold = {}
    for line in dataset.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        gold[row["id"]] = str(row["answer"])
    last = {}
    for line in (run / "results.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        last[(row["key"], row["sample"])] = row
    correct = sum(final_message(row["raw_text"]) == gold[row["id"]] for row in last.values())

    accuracy = json.loads((run / "run.json").read_text(encoding="utf-8"))["tally"]["accuracy"]
    submission = pandas.read_csv(run / "submission.csv", dtype=str, keep_default_na=False)
    by_submission = sum(
        answer == gold[key] for key, answer in zip(submission["id"], submission["answer"])
    )
    print(f"{len(last)} rows: {correct} correct from raw text, {by_submission} from submission.csv,")
    print(f"{accuracy['n_correct']} of {accuracy['n']} in run.json")
    agree = (
        len(last) == len(gold) == len(submission) == accuracy["n"]
        and correct == by_submission == accuracy["n_correct"]
    )
    if not agree:
        print("they do not agree", file=sys.stderr)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
