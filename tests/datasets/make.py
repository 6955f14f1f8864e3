"""Makes the compressed and the Parquet files of this folder; the others are written by hand.

    python make.py            # writes them
    python make.py --check    # whether the Parquet files hold the rows below

Needs pyarrow (tried with 26.0.1). The gzip files are the same bytes every time.
"""

import gzip
import pathlib
import sys

import pyarrow as pa
import pyarrow.parquet as pq

HERE = pathlib.Path(__file__).parent

LISTS = pa.table(
    {
        "question": ["Which is a bird?", "Which is a tree?", "Which is a fish?"],
        "subject": pa.array(["birds", "trees", "fish"]).dictionary_encode(),
        "choices": [["a wren", "an oak", "a carp"], ["a wren", "an oak", "a carp"], ["an elm", "a trout"]],
        "answer": pa.array([0, 1, 1], pa.int64()),
        "weight": pa.array([0.5, float("nan"), 3.0], pa.float64()),
    }
)
STRUCTS = pa.table(
    {
        "id": ["s/1", "s/2"],
        "question": ["What do you read?", "What do you wear?"],
        "choices": pa.array(
            [
                {"text": ["a book", "a sock"], "label": ["A", "B"]},
                {"text": ["a book", "a sock"], "label": ["1", "2"]},
            ]
        ),
        "answerKey": ["A", "2"],
    }
)
# Every type a cell may have, and a gold inside a struct.
PLAIN = pa.table(
    {
        "idx": pa.array([1, 2, 3], pa.int32()),
        "problem": ["What is 1/4 as a decimal?", "What is 10/4 as a decimal?", "Is 4 even?"],
        "answer": ["0.25", "2.5", "yes"],
        "picture": pa.array([b"\xff\xd8", None, b"ok"], pa.binary()),
        "points": pa.array([1.1, 2.0, None], pa.float32()),
        "seen": pa.array([True, False, None]),
        "meta": pa.array([{"answer": "hidden", "level": 1}, {"answer": "hidden", "level": 2}, None]),
    }
)
PARQUET = {
    "lists.parquet": (LISTS, "snappy"),
    "structs_zstd.parquet": (STRUCTS, "zstd"),
    "plain_gzip.parquet": (PLAIN, "gzip"),
    "plain_stored.parquet": (PLAIN, "none"),
}
GZIPPED = ["plain.jsonl", "array.json", "header.csv", "lists.parquet"]


def main():
    for name, (table, compression) in PARQUET.items():
        if "--check" in sys.argv:
            # NaN is not equal to itself: the texts are compared.
            assert str(pq.read_table(HERE / name).to_pylist()) == str(table.to_pylist()), name
        else:
            pq.write_table(table, HERE / name, compression=compression, store_schema=False)
    for name in GZIPPED:
        plain = (HERE / name).read_bytes()
        packed = HERE / f"{name}.gz"
        if "--check" in sys.argv:
            assert gzip.decompress(packed.read_bytes()) == plain, name
        else:
            packed.write_bytes(gzip.compress(plain, mtime=0))


if __name__ == "__main__":
    main()
