#!/usr/bin/env python3
"""Strict accuracy of an exported checkpoint, greedy, by family and effort; agreement with transformers.

    python3 models/nano/evaluate.py models/nano                  the accuracy table
    python3 models/nano/evaluate.py models/nano --transformers   logits against transformers in float32
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch

import data
from batches import Encoder
from export import from_release

MAX_NEW = 176


def final_text(encoder: Encoder, ids: list[int]) -> str | None:
    """The text of the final message; None where the completion has none."""
    text = encoder.tok.decode(ids, skip_special_tokens=False)
    head, mark, answer = text.partition("<|start|>assistant<|channel|>final<|message|>")
    return answer if mark and "<|" not in answer else None


def right_answers(model, encoder, rows: list[dict], effort: str, dtype) -> list[bool]:
    """One entry a row: whether the answer is the gold, character by character."""
    right = []
    for at in range(0, len(rows), 1024):
        some = rows[at : at + 1024]
        texts = [data.user_text(r["question"], r.get("options")) for r in some]
        prompts = [encoder.prompt(t, effort) for t in texts]
        outs = model.generate(prompts, encoder.stop, MAX_NEW, dtype)
        right += [final_text(encoder, o) == r["answer"] for o, r in zip(outs, some)]
    return right


def majority(rows: list[dict]) -> float:
    return Counter(r["answer"] for r in rows).most_common(1)[0][1] / len(rows)


def table(model, encoder, files: dict[str, list[dict]], dtype) -> dict:
    rows = [r for file in files.values() for r in file]
    right = {e: right_answers(model, encoder, rows, e, dtype) for e in data.EFFORTS}
    result, at = {}, 0
    for name, file in files.items():
        span = slice(at, at + len(file))
        result[name] = {"n": len(file), "majority": majority(file)}
        result[name] |= {e: sum(right[e][span]) / len(file) for e in data.EFFORTS}
        at += len(file)
    return result


def print_table(result: dict) -> None:
    print("| family | n | majority | low | medium | high |\n| --- | --- | --- | --- | --- | --- |")
    for name, r in result.items():
        shares = " | ".join(f"{r[k]:.1%}" for k in ("majority", *data.EFFORTS))
        print(f"| {name} | {r['n']} | {shares} |", flush=True)


def compare_transformers(folder: Path, encoder: Encoder, files: dict, n: int) -> dict:
    """Teacher-forced float32 logits of both on n of our own greedy answers, prompts included."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    model = from_release(folder).eval()
    theirs = GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    # transformers 5.17 leaves dequantized experts in bf16 whatever dtype says; 5.23 does not.
    theirs = theirs.float().eval()
    rows = [file[i] for i in range(n) for file in files.values()][:n]
    largest, where, n_positions, same = 0.0, None, 0, 0
    for i, row in enumerate(rows):
        text, effort = data.user_text(row["question"], row.get("options")), data.EFFORTS[i % 3]
        prompt = encoder.prompt(text, effort)
        out = model.generate([prompt], encoder.stop, MAX_NEW, torch.float32)[0]
        ids = torch.tensor([prompt + out])
        with torch.no_grad():
            hidden, _ = model.hidden(ids, torch.zeros_like(ids), torch.float32)
            a, b = model.logits(hidden, torch.float32)[0], theirs(ids).logits[0]
        d = (a - b).abs()
        if d.max() > largest:
            largest = d.max().item()
            where = {"row": row["id"], "position": int(d.amax(1).argmax()), "token": int(d.amax(0).argmax())}
        same += (a.argmax(-1) == b.argmax(-1)).sum().item()
        n_positions += ids.shape[1]
    result = {"rows": n, "positions": n_positions, "same_argmax": same}
    return result | {"largest_difference": largest, "where": where}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("folder", type=Path)
    ap.add_argument("--transformers", action="store_true", help="compare logits with transformers")
    ap.add_argument("--limit", type=int, help="rows a file")
    ap.add_argument("--json", type=Path, help="write the table here as well")
    args = ap.parse_args()
    encoder, files = Encoder(), data.test_rows()
    files = {name: rows[: args.limit] for name, rows in files.items()}
    if args.transformers:
        print(json.dumps(compare_transformers(args.folder, encoder, files, args.limit or 21)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = from_release(args.folder).to(device).eval()
    result = table(model, encoder, files, torch.bfloat16)
    print_table(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
