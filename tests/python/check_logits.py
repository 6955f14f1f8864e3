#!/usr/bin/env python3
"""Holds what `podium logits --full --exact` wrote against transformers' float32 run.

    check_logits.py MODEL_FOLDER INPUT.jsonl LOGITS.jsonl

Every position's logits within 2e-4 of the prompt's logit standard deviation, and the same greedy
tokens.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import GptOssForCausalLM, Mxfp4Config

TOLERANCE = 2e-4


def read(path: str) -> list:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def main() -> int:
    folder, inputs, outputs = sys.argv[1], read(sys.argv[2]), read(sys.argv[3])
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    packed = {"quantization_config": Mxfp4Config(dequantize=True)}
    model = GptOssForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        **(packed if "quantization_config" in config else {}),
    ).float()
    greedy = {row["prompt"]: row["greedy"] for row in outputs if "greedy" in row}
    logits = {}
    for row in outputs:
        if "logits" in row:
            logits.setdefault(row["prompt"], {})[row["position"]] = torch.tensor(row["logits"])
    worst = 0.0
    for row in inputs:
        tokens = row["tokens"] + greedy[row["prompt"]]
        with torch.no_grad():
            expected = model(torch.tensor([tokens[:-1]])).logits[0]
        found = torch.stack([logits[row["prompt"]][p] for p in range(len(tokens) - 1)])
        assert found.shape == expected.shape, (found.shape, expected.shape)
        error = ((found - expected).abs().max() / expected.std()).item()
        worst = max(worst, error)
        chosen = expected[len(row["tokens"]) - 1 :].argmax(-1).tolist()
        if chosen != greedy[row["prompt"]]:
            print(f"{row['prompt']}: other greedy tokens", file=sys.stderr)
            return 1
    print(f"{len(inputs)} prompts, largest error {worst:.2e} standard deviations")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
