"""Writes comparison.json, an invented comparison of three runs for the page's tests. Figures that
belong together agree; texts are hostile where a page could be hurt. Seeded, so it repeats."""

import json
import math
import random
from pathlib import Path

random.seed(7)
GROUPS = ["sums", "sort_or_reverse", "choice", "count_letters", "products", "long_products", "gcd_or_remainder"]
N = 500
HOSTILE = "</script><script>document.title = 'hurt'</script><img src=x onerror=\"document.title = 'hurt'\">"
PRECISIONS = ["16bit", "4bit", "4bit-dense4"]


def wilson(k, n, z=1.959964):
    if n == 0:
        return {"n_correct": 0, "n": 0, "accuracy": None, "low": None, "high": None}
    p, d = k / n, 1 + z * z / n
    c, h = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return {"n_correct": k, "n": n, "accuracy": p, "low": (c - h) / d, "high": min(1.0, (c + h) / d)}


questions = []
for i in range(N):
    group = GROUPS[i % 7]
    hard = 0.71 if group == "long_products" else 0.98
    first = random.random() < hard
    sides = [first, first if random.random() < 0.99 else not first, first if random.random() < (0.78 if hard < 0.9 else 0.94) else False]
    questions.append((f"mixed-{i + 1:04}", group, sides))


def status(right, run, i):
    return "truncated_analysis" if not right and run == 2 and i % 3 == 0 else "answered"


runs = []
for index, precision in enumerate(PRECISIONS):
    by_group = [{"group": g, **wilson(sum(s[index] for _, h, s in questions if h == g), sum(h == g for _, h, _ in questions))} for g in GROUPS]

    def counts(keep):
        found = {}
        for i, (_, g, s) in enumerate(questions):
            if keep(g):
                word = status(s[index], index, i)
                found[word] = found.get(word, 0) + 1
        return found

    runs.append({
        "label": "ABC"[index], "name": f"mixed-{precision}-{index}1b2c3d4", "run_dir": f"submissions/mixed-{precision}-{index}1b2c3d4",
        "dataset": "datasets/nano/mixed.jsonl", "model": "nano", "precision": precision, "generation_hash": "a" * 64, "scoring_hash": "b" * 64,
        "numerics": "cpu/avx512/bf16", "device": "cpu", "n_slots": 64, "n_sessions": 1, "outcome": "complete", "samples": 1,
        "accuracy": wilson(sum(s[index] for _, _, s in questions), N), "by_group": by_group, "statuses": counts(lambda g: True),
        "statuses_by_group": [{"group": g, "statuses": counts(lambda h, g=g: h == g)} for g in GROUPS],
        "tokens": {"n_samples": N, "prompt": 46872, "reused": 35500, "output": 20205 + 900 * index, "analysis": 15011 + 800 * index, "final": 2194, "output_per_sample": 40.41 + 1.8 * index},
        "speed": {"wall_seconds": 9.1 - 1.5 * index, "prefill_seconds": 2.1, "decode_seconds": 6.6 - 1.2 * index, "prefill_tokens_per_s": 5415.2,
                  "decode_tokens_per_s": 3061.0 + 900 * index, "rows_per_s": 54.9 + 12 * index, "occupancy": 0.887},
        "memory": {"weights_bytes": [23803392, 9759424, 7100000][index], "planned_bytes": 131544072 - 14000000 * index, "allocated_bytes": 131544072 - 14000000 * index, "measured_bytes": 135244072 - 14000000 * index},
    })

pairs = []
for other in (1, 2):
    cells = {"both_right": 0, "lost": 0, "gained": 0, "both_wrong": 0}
    changes = []
    for i, (key, group, s) in enumerate(questions):
        a, b = s[0], s[other]
        cells[{(1, 1): "both_right", (1, 0): "lost", (0, 1): "gained", (0, 0): "both_wrong"}[int(a), int(b)]] += 1
        if a == b and i % 97:
            continue
        gold = str(1000 + 37 * i)
        wrong = str(1001 + 37 * i)

        def side(right, run):
            word = status(right, run, i)
            if word != "answered":
                return {"status": word, "correct": False, "answer": None, "rule": None, "span": None, "final_text": None,
                        "raw_tail": f"then carry the {i}, and again, and again, {HOSTILE if i % 11 == 0 else ''}and again", "output_tokens": 512}
            text = gold if right else wrong
            before = "Größe: the answer is " if run == 0 else "The answer is "
            return {"status": "answered", "correct": right, "answer": text, "rule": "answer_is", "span": [len(before.encode()), len((before + text).encode())],
                    "final_text": f"{before}{text}.{HOSTILE if i % 5 == 0 else ''}", "raw_tail": None, "output_tokens": 30 + i % 40}

        base, new = side(a, 0), side(b, other)
        if a == b:
            new["answer"] = wrong + "0"
        cause = "truncated_in_one" if base["status"] != new["status"] else "answer_changed"
        changes.append({"key": key, "sample": 0, "group": group, "cause": cause, "direction": "neither" if a == b else "lost" if a else "gained",
                        "gold": {"kind": "option", "value": 3} if group == "choice" else {"kind": "text", "value": gold},
                        "prompt": f"<|start|>system<|message|>You are ChatGPT.<|end|><|start|>user<|message|>What is {i} * {i + 1}?<|end|><|start|>assistant",
                        "first_differing_token": i % 23, "base": base, "other": new})
    changes.sort(key=lambda c: c["direction"] == "neither")
    lost, gained = cells["lost"], cells["gained"]
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(0, min(lost, gained) + 1)) / 2**n if n else 0.5
    exact = min(1.0, 2 * tail)
    mid = min(1.0, 2 * tail - math.comb(n, min(lost, gained)) / 2**n) if n else 1.0
    d = (gained - lost) / N
    se = math.sqrt(max(n / N - d * d, 1e-9) / N)
    causes = [{"cause": c, "lost": sum(x["cause"] == c and x["direction"] == "lost" for x in changes), "gained": sum(x["cause"] == c and x["direction"] == "gained" for x in changes),
               "neither": sum(x["cause"] == c and x["direction"] == "neither" for x in changes)}
              for c in ["answer_changed", "extraction_changed", "truncated_in_one", "status_changed", "scoring_changed"]]
    by_group = []
    for g in GROUPS:
        mine = [s for _, h, s in questions if h == g]
        a, b = sum(s[0] for s in mine) / len(mine), sum(s[other] for s in mine) / len(mine)
        by_group.append({"group": g, "n_questions": len(mine), "accuracy_base": a, "accuracy_other": b, "difference": b - a,
                         "lost": sum(s[0] and not s[other] for s in mine), "gained": sum(s[other] and not s[0] for s in mine)})
    same = N - 40 * other
    pairs.append({
        "run": other, "n_questions": N, "n_samples": N, "excluded": {"missing": 0, "not_run": 0, "error": other - 1, "no_gold": 0},
        "accuracy_base": runs[0]["accuracy"]["accuracy"], "accuracy_other": runs[other]["accuracy"]["accuracy"], "table": cells,
        "difference": {"difference": d, "low": d - 1.96 * se, "high": d + 1.96 * se, "method": "Wald, paired"},
        "tests": {"mcnemar_exact_p": exact, "mcnemar_mid_p": mid, "permutation_p": None, "n_permutations": None, "n_bootstrap": None,
                  "p": exact, "p_method": "McNemar, exact", "p_holm": min(1.0, exact * (3 - other)), "significant": exact * (3 - other) < 0.05},
        "clustered": None, "detectable": {"difference": 2.8 * math.sqrt(max(n, 1) / N / N), "power": 0.8, "alpha": 0.05, "discordance": n / N, "formula": "normal"},
        "by_group": by_group,
        "identity": {"n_samples": N, "n_same_tokens": same, "same_tokens_share": same / N, "n_same_bits": same - 20, "same_bits_share": (same - 20) / N,
                     "n_trace_hashes": 0, "n_same_trace_hash": 0, "first_difference_min": 3, "first_difference_median": 21.0, "first_difference_max": 60},
        "causes": causes, "n_flips": n, "n_changes": len(changes), "changes": changes,
    })

CLASSES = [("experts", "mxfp4", 5087232, 19200000), ("attention", "bf16", 3944544, 3944544), ("router", "bf16", 98400, 98400),
           ("norms", "bf16", 6656, 6656), ("embedding", "bf16", 311296, 311296), ("lm_head", "bf16", 311296, 311296)]
ledger = []
for name, scheme, small, large in CLASSES:
    dense = name in ("attention", "lm_head")
    sides = [{"scheme": "bf16", "stored_bytes": small, "loaded_bytes": large, "lossless": True, "relative_error": None},
             {"scheme": scheme, "stored_bytes": small, "loaded_bytes": small, "lossless": True, "relative_error": None},
             {"scheme": "mxfp4" if dense else scheme, "stored_bytes": small, "loaded_bytes": small * 17 // 64 if dense else small, "lossless": not dense, "relative_error": 0.0873 if dense else None}]
    ledger.append({"class": name, "sides": sides, "values": ["same", "differ" if dense else "same"]})

document = {"schema": "podium.comparison/1", "name": "mixed-16bit-vs-mixed-4bit", "podium_version": "0.1.0", "seed": 0, "differences": [], "runs": runs, "pairs": pairs,
            "ledger": ledger, "questions": [], "notes": []}
Path(__file__).with_name("comparison.json").write_text(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n")
