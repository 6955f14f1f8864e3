#!/usr/bin/env python3
"""Reads a CURE-Bench package as the competition would, sharing nothing with podium.

    check_submission.py DATASET.jsonl SUBMISSION.zip
    check_submission.py --null-words WORD...

Of a package: both members and no others, four columns in order, every cell in quotes by its bytes,
no missing value under pandas' defaults, one row an id in the data set's order and spelling, a choice
among the row's letters or NOTAVALUE, the reasoning a list of messages, the object flat. With
`--null-words`: the words are exactly those that pandas reads as missing, but for the empty cell.
"""

import io
import json
import sys
import zipfile

import pandas
from pandas._libs.parsers import STR_NA_VALUES

COLUMNS = ["id", "prediction", "choice", "reasoning"]
FIELDS = {
    "model_name",
    "model_type",
    "track",
    "base_model_type",
    "base_model_name",
    "dataset",
    "additional_info",
    "average_tokens_per_question",
    "average_tools_per_question",
    "tool_category_coverage",
}


def unquoted_cells(text: str) -> int:
    """Cells that do not stand in quotes, found with a split by quotes: even parts lie outside."""
    outside = text.split('"')[::2]
    assert outside[0] == "" and outside[-1] in ("", "\n"), "it begins or ends outside of quotes"
    # Between cells: a comma, a line end, or nothing inside of a doubled quote.
    return sum(part not in (",", "\n", "") for part in outside)


def check_package(dataset: str, package: str) -> None:
    with open(dataset, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    with zipfile.ZipFile(package) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == ["meta_data.json", "submission.csv"], archive.namelist()
        raw = archive.read("submission.csv")
        meta = json.loads(archive.read("meta_data.json"))
    assert not raw.startswith(b"\xef\xbb\xbf") and b"\0" not in raw
    text = raw.decode("utf-8")
    assert unquoted_cells(text) == 0

    read = pandas.read_csv(io.BytesIO(raw), dtype={"id": str})
    assert list(read.columns) == COLUMNS, list(read.columns)
    assert not read.isnull().values.any(), read[read.isnull().any(axis=1)]
    assert [str(row["id"]) for row in rows] == list(read["id"])
    as_written = pandas.read_csv(io.BytesIO(raw), dtype=str, keep_default_na=False)
    n_chosen = 0
    for row, cells in zip(rows, as_written.to_dict("records")):
        assert all(cell.strip() for cell in cells.values()), cells
        letters = set(row.get("options", {}))
        assert cells["choice"] in letters | {"NOTAVALUE"}, cells
        n_chosen += cells["choice"] in letters
        if cells["reasoning"] != "NOTAVALUE":
            turns = json.loads(cells["reasoning"])
            assert turns and all(isinstance(turn["content"], str) and turn["role"] for turn in turns)
            asked = " ".join(turn["content"] for turn in turns if turn["role"] == "user")
            assert row["question"] in asked, cells["id"]
    assert FIELDS <= set(meta), FIELDS - set(meta)
    assert all(isinstance(value, (str, int, float)) for value in meta.values()), meta
    print(f"{len(rows)} rows, {n_chosen} of them with a letter")


def check_null_words(words: list) -> None:
    expected = set(STR_NA_VALUES) - {""}
    assert set(words) == expected, set(words) ^ expected
    # As pandas behaves, not only as its list says.
    cells = "".join(f'"{word}"\n"{word}."\n' for word in words)
    found = pandas.read_csv(io.StringIO('"cell"\n' + cells)).isnull()["cell"]
    assert list(found) == [True, False] * len(words)


if __name__ == "__main__":
    if sys.argv[1] == "--null-words":
        check_null_words(sys.argv[2:])
    else:
        check_package(sys.argv[1], sys.argv[2])
