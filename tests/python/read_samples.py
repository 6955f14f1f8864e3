"""Reads a benchmark's file in a few lines and holds podium's reading of it against that.

    read_samples.py FILE ROWS [SUBMISSION PROMPTS]

ROWS is what podium read (see tests/samples.rs). With a submission: it has every row, in order, with
the file's ids, and no prompt holds a gold. Standard library only.
"""

import csv
import gzip
import json
import re
import sys


def rows_of(path):
    opened = gzip.open(path, "rt") if path.endswith(".gz") else open(path)
    with opened as file:
        text = file.read()
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return whole.get("examples", [whole]) if isinstance(whole, dict) else whole


def expected(row):
    """(id, question, options, gold, what gives the gold away)"""
    if "input" in row and "target" in row:
        stem, found, tail = row["input"].partition("\nOptions:\n")
        options = re.findall(r"^\([A-Z]\) (.*)$", tail, re.M)
        if found and re.fullmatch(r"\([A-Z]\)", row["target"]):
            return None, stem, options, row["target"][1], None
        return None, row["input"], [], row["target"], None
    if "canonical_solution" in row:
        return row["task_id"], row["prompt"], [], None, row["canonical_solution"]
    work, gold = row["answer"].rsplit("####", 1)
    return None, row["question"], [], gold.strip(), work


def main():
    path, read, *run = sys.argv[1:]
    rows = rows_of(path)
    read = json.load(open(read))
    if all("completion" in row and "prompt" not in row for row in rows):
        assert "completion" in read["refused"] and "no questions" in read["refused"], read
        return
    wanted = [expected(row) for row in rows]
    assert len(wanted) == len(read["rows"]), (len(wanted), len(read["rows"]))
    for (row_id, question, options, gold, _), found in zip(wanted, read["rows"]):
        assert found["id"] == row_id, (row_id, found)
        assert found["question"] == question, (question, found)
        assert found["options"] == options, (options, found)
        assert found["gold"] == gold, (gold, found)
        assert not {"answer", "target", "canonical_solution", "test"} & set(found["fields"]), found
    if run:
        submission, prompts = run
        lines = list(csv.DictReader(open(submission, newline="")))
        prompts = [json.loads(line) for line in open(prompts)]
        assert len(lines) == len(prompts) == len(wanted)
        for (row_id, question, options, _, hidden), line, prompt in zip(wanted, lines, prompts):
            assert line["id"] == (row_id or prompt["key"]), (row_id, line)
            for part in [question, *options]:
                assert prompt["text"].count(part) >= 1, (part, prompt)
            assert "Options:\n" not in prompt["text"], prompt
            assert hidden is None or hidden not in prompt["text"], (hidden, prompt)


if __name__ == "__main__":
    main()
