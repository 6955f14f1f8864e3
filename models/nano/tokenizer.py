#!/usr/bin/env python3
"""nano's tokenizer: byte-level BPE, gpt-oss's special tokens behind the merges, single digits.

    python3 models/nano/tokenizer.py --train    write tokenizer.json and tokenizer_config.json
    python3 models/nano/tokenizer.py --golden   write prompts.golden.jsonl
    python3 models/nano/tokenizer.py --stats    token counts of drawn conversations
"""

import argparse
import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

import data

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE / "tokenizer.json"
GOLDEN = HERE / "prompts.golden.jsonl"

N_BPE = 594  # 256 bytes and the merges; the special tokens follow
VOCAB_ROWS = 608  # rows of the embedding: 594 + 10, padded to a multiple of 32
SPECIALS = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
    "<|endofprompt|>",
]

# As in o200k, but a digit is always a token of its own, so that columns of digits line up.
SPLIT = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def load() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


def segments(rng: random.Random, n: int):
    """Ordinary text of n conversations, without the special tokens."""
    for _ in range(n):
        item, effort = data.draw_train(rng), data.draw_effort(rng)
        yield data.SYSTEM.format(effort=effort)
        yield data.DEVELOPER
        yield from ("system", "developer", "user", "assistant", "analysis", "final")
        yield item.user_text()
        yield item.analysis[effort]
        yield item.answer
        # So that each letter of a spelled word is one token, with or without its space.
        yield from (f" {c}" for c in data.ALPHABET)


def train() -> None:
    tok = Tokenizer(BPE(ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    tok.train_from_iterator(
        segments(random.Random("tokenizer"), 6000),
        BpeTrainer(
            vocab_size=N_BPE,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert tok.get_vocab_size() == N_BPE, tok.get_vocab_size()
    tok.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in SPECIALS])
    assert tok.token_to_id(SPECIALS[0]) == N_BPE
    tok.save(str(TOKENIZER))
    config = {
        "added_tokens_decoder": {
            str(tok.token_to_id(s)): {
                "content": s,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for s in SPECIALS
        },
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|return|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (HERE / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def golden() -> None:
    """30 test rows at each effort: the rendered prompt and its ids."""
    tok, files = load(), data.test_rows()
    rows = [files[f][i] for i in range(5) for f in data.FAMILIES][:30]
    with open(GOLDEN, "w", encoding="utf-8") as out:
        for row in rows:
            for effort in data.EFFORTS:
                options = row.get("options")
                text = data.render_prompt(data.user_text(row["question"], options), effort)
                line = {"effort": effort, "id": row["id"], "question": row["question"]}
                line |= {"options": options, "text": text, "ids": tok.encode(text).ids}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")


def stats() -> None:
    tok, rng = load(), random.Random("stats")
    for effort in data.EFFORTS:
        print(effort, "prefix", len(tok.encode(data.render_prefix(effort)).ids))
    for family, make in data.FAMILIES.items():
        for effort in data.EFFORTS:
            prompts, totals = [], []
            for _ in range(400):
                item = make(rng)
                prompt = data.render_prompt(item.user_text(), effort)
                whole = prompt + data.render_completion(item.analysis[effort], item.answer)
                prompts.append(len(tok.encode(prompt).ids))
                totals.append(len(tok.encode(whole).ids))
            mean = lambda xs: sum(xs) / len(xs)
            print(
                f"{family:17} {effort:7} prompt {mean(prompts):6.1f} total mean {mean(totals):6.1f} max {max(totals)}"
            )


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--train", action="store_true")
    ap.add_argument("--golden", action="store_true")
    ap.add_argument("--stats", action="store_true")
    args = ap.parse_args()
    if args.train:
        train()
    if args.golden:
        golden()
    if args.stats:
        stats()


if __name__ == "__main__":
    main()
