"""Writes all golden files anew, or checks that the committed ones are what their scripts give.

    python make.py [--check] [--only logits quant stats harmony mutations]

--check writes into a temporary folder and compares: text, tokens, checkpoints and integers byte for byte, other
floats to 1e-5 relative (1e-5 of a tensor's largest value), since another CPU may round them otherwise.
The harmony part needs TIKTOKEN_ENCODINGS_BASE (see make_harmony.py).
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import safetensors.torch
import torch

HERE = pathlib.Path(__file__).parent
PARTS = {"logits": ["make_logits.py"], "quant": ["make_quant.py"], "stats": ["make_stats.py", "make_compare_stats.py"],
         "harmony": ["make_harmony.py"]}
BY_HAND = {"parse_malformed.jsonl"}
RELATIVE = 1e-5


def close(a, b):
    return abs(a - b) <= RELATIVE * max(abs(a), abs(b))


def same_json(a, b, near):
    """Equal but for floats, which are as near as `near` asks."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[k], b[k], near) for k in a if k != "versions")
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same_json(x, y, near) for x, y in zip(a, b))
    if isinstance(a, float) and isinstance(b, float):
        return near(a, b)
    return a == b


def measured(a, b):
    """Measured numbers in meta.json may differ in their last digits."""
    return abs(a - b) <= 1e-4 * max(1.0, abs(a), abs(b))


def rounded(a, b):
    """Errors of bf16 runs hang on the order of sums and on routers that are nearly tied."""
    return max(abs(a), abs(b)) <= 4 * min(abs(a), abs(b))


def same_tensors(old, new):
    old, new = safetensors.torch.load_file(old), safetensors.torch.load_file(new)
    if {k: (v.shape, v.dtype) for k, v in old.items()} != {k: (v.shape, v.dtype) for k, v in new.items()}:
        return False
    return all(torch.equal(old[k], new[k]) or (
        old[k].is_floating_point() and torch.isfinite(old[k]).all()
        and ((old[k] - new[k]).abs().max() <= RELATIVE * old[k].abs().max()).item()) for k in old)


def same(old, new):
    if old.read_bytes() == new.read_bytes():
        return True
    if old.name == "bf16.json":
        return same_json(json.loads(old.read_text()), json.loads(new.read_text()), rounded)
    if old.name == "meta.json":
        return same_json(json.loads(old.read_text()), json.loads(new.read_text()), measured)
    if old.parent.name == "stats":
        return same_json(json.loads(old.read_text()), json.loads(new.read_text()), close)
    return old.name == "expected.safetensors" and same_tensors(old, new)


def differences(part, fresh):
    """What the committed folder and the fresh one do not have in common."""
    old = {p.relative_to(HERE): p for p in (HERE / part).rglob("*") if p.is_file() and p.name not in BY_HAND}
    new = {p.relative_to(fresh): p for p in (fresh / part).rglob("*") if p.is_file()}
    out = [f"{name}: in one of the two only" for name in sorted(old.keys() ^ new.keys())]
    return out + [f"{name}: differs" for name in sorted(old.keys() & new.keys()) if not same(old[name], new[name])]


def run(script, *arguments):
    print("==", script, flush=True)
    return subprocess.run([sys.executable, HERE / script, *arguments]).returncode


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", nargs="*", default=[*PARTS, "mutations"], choices=[*PARTS, "mutations"])
    args = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) if args.check else HERE
        for part, scripts in PARTS.items():
            if part not in args.only:
                continue
            broken = [f"{script} failed" for script in scripts if run(script, "--out", out)]
            failed += broken
            if args.check and not broken:
                failed += differences(part, out)
        if "mutations" in args.only:
            table = ["--out", out / "mutations.md"]
            failed += [f"{s} failed" for s, a in (("reference_numpy.py", []), ("mutate.py", table)) if run(s, *a)]
    for line in failed:
        print(line)
    passed = "the golden files are what their scripts give" if args.check else "written"
    print("FAILED" if failed else passed)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
