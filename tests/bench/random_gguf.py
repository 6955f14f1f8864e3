#!/usr/bin/env python3
"""Writes a GGUF file of gpt-oss-20b's shape with random weights, for measuring llama.cpp.

    random_gguf.py FILE [--layers N] [--dense bf16|q8_0] [--seed N]

Experts are MXFP4; attention, embedding and output are BF16 (or Q8_0); norms, biases, sinks and
routers are F32, as llama.cpp's converter writes them. There is no tokenizer. The whole model has
13.8 GB. A few hundred MB of random blocks are made once for each kind, and every tensor is cut from
them at an offset of its own. Needs numpy and nothing else; the format is described in ggml's
docs/gguf.md.
"""

import argparse
import math
import os
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

HIDDEN = 2880
HEADS = 64
KV_HEADS = 8
HEAD_DIM = 64
EXPERTS = 32
EXPERTS_PER_TOKEN = 4
INTERMEDIATE = 2880
VOCABULARY = 201_088
SLIDING_WINDOW = 128

ALIGNMENT = 32
POOL_BYTES = 1 << 28


@dataclass(frozen=True)
class Kind:
    """A number format of ggml: its number there, and how many values share how many bytes."""

    number: int
    values: int
    bytes: int


F32 = Kind(0, 1, 4)
Q8_0 = Kind(8, 32, 34)
BF16 = Kind(30, 1, 2)
MXFP4 = Kind(39, 32, 17)


@dataclass(frozen=True)
class Tensor:
    name: str
    kind: Kind
    shape: tuple[int, ...]  # the fastest dimension first, as GGUF has it
    mean: float = 0.0
    deviation: float = 1.0

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) // self.kind.values * self.kind.bytes


def tensors(n_layers: int, dense: Kind) -> Iterator[Tensor]:
    """All tensors in the order of the file."""
    # A power of two near 1/sqrt(HIDDEN), so that products of unit vectors stay near one.
    small = 2.0**-6
    yield Tensor("token_embd.weight", dense, (HIDDEN, VOCABULARY))
    yield Tensor("output_norm.weight", F32, (HIDDEN,), mean=1.0, deviation=0.1)
    yield Tensor("output.weight", dense, (HIDDEN, VOCABULARY), deviation=small)
    for layer in range(n_layers):
        block = f"blk.{layer}."
        for norm in ("attn_norm", "post_attention_norm"):
            yield Tensor(f"{block}{norm}.weight", F32, (HIDDEN,), mean=1.0, deviation=0.1)
        products = {
            "attn_q": (HIDDEN, HEADS * HEAD_DIM),
            "attn_k": (HIDDEN, KV_HEADS * HEAD_DIM),
            "attn_v": (HIDDEN, KV_HEADS * HEAD_DIM),
            "attn_output": (HEADS * HEAD_DIM, HIDDEN),
        }
        for name, shape in products.items():
            yield Tensor(f"{block}{name}.weight", dense, shape, deviation=small)
            yield Tensor(f"{block}{name}.bias", F32, shape[1:], deviation=small)
        yield Tensor(f"{block}attn_sinks.weight", F32, (HEADS,))
        # Logits of deviation one: no expert is taken by every token.
        router = (HIDDEN, EXPERTS)
        yield Tensor(f"{block}ffn_gate_inp.weight", F32, router, deviation=HIDDEN**-0.5)
        yield Tensor(f"{block}ffn_gate_inp.bias", F32, (EXPERTS,), deviation=small)
        experts = {
            "ffn_gate_exps": (HIDDEN, INTERMEDIATE, EXPERTS),
            "ffn_up_exps": (HIDDEN, INTERMEDIATE, EXPERTS),
            "ffn_down_exps": (INTERMEDIATE, HIDDEN, EXPERTS),
        }
        for name, shape in experts.items():
            yield Tensor(f"{block}{name}.weight", MXFP4, shape)
            yield Tensor(f"{block}{name}.bias", F32, shape[1:], deviation=small)


def metadata(n_layers: int) -> dict[str, str | int | float]:
    """What llama.cpp asks for; `vocab_size` stands in for a tokenizer."""
    values: dict[str, str | int | float] = {
        "block_count": n_layers,
        "context_length": 131_072,
        "embedding_length": HIDDEN,
        "feed_forward_length": INTERMEDIATE,
        "expert_feed_forward_length": INTERMEDIATE,
        "expert_count": EXPERTS,
        "expert_used_count": EXPERTS_PER_TOKEN,
        "vocab_size": VOCABULARY,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.sliding_window": SLIDING_WINDOW,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 150_000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 32.0,
        "rope.scaling.original_context_length": 4096,
    }
    return {
        "general.architecture": "gpt-oss",
        "general.name": f"gpt-oss-20b with random weights, {n_layers} layers",
        "general.quantization_version": 2,
        "tokenizer.ggml.model": "none",
    } | {f"gpt-oss.{key}": value for key, value in values.items()}


def string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def typed(value: str | float) -> bytes:
    """A value of the metadata behind its type: string, uint32 or float32."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + string(value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    return struct.pack("<If", 6, value)


def padding(n_bytes: int) -> int:
    return -n_bytes % ALIGNMENT


def header(n_layers: int, all_tensors: list[Tensor]) -> bytes:
    pairs = metadata(n_layers)
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(all_tensors), len(pairs))]
    parts += [string(key) + typed(value) for key, value in pairs.items()]
    offset = 0
    for tensor in all_tensors:
        n_dims = len(tensor.shape)
        parts.append(string(tensor.name))
        parts.append(struct.pack(f"<I{n_dims}Q", n_dims, *tensor.shape))
        parts.append(struct.pack("<IQ", tensor.kind.number, offset))
        offset += tensor.n_bytes + padding(tensor.n_bytes)
    head = b"".join(parts)
    return head + bytes(padding(len(head)))


class Pools:
    """Random blocks of each kind and deviation, and slices of them."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.made: dict[tuple[Kind, float], np.ndarray] = {}

    def blocks(self, kind: Kind, deviation: float) -> np.ndarray:
        """Bytes, a row a block."""
        # Odd, so that rows of a tensor that is longer than the pool do not come back.
        n_blocks = POOL_BYTES // kind.bytes | 1
        if kind is BF16:
            values = self.random.standard_normal(n_blocks, dtype=np.float32)
            values *= np.float32(deviation)
            return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8).reshape(-1, 2)
        blocks = self.random.integers(0, 256, (n_blocks, kind.bytes), dtype=np.uint8)
        if kind is MXFP4:
            # Scales 2^-8 to 2^-6: products of unit vectors stay near one, and nothing overflows.
            blocks[:, 0] = blocks[:, 0] % 3 + 119
        else:
            # Uniform whole numbers from -128 to 127 have a deviation of 73.9.
            scale = np.array([deviation / 73.9], dtype="<f2").view(np.uint8)
            blocks[:, :2] = scale
        return blocks

    def write(self, file: BinaryIO, tensor: Tensor) -> None:
        if tensor.kind is F32:
            values = self.random.standard_normal(math.prod(tensor.shape), dtype=np.float32)
            values = values * np.float32(tensor.deviation) + np.float32(tensor.mean)
            file.write(values.astype("<f4"))
            return
        key = (tensor.kind, tensor.deviation)
        if key not in self.made:
            self.made[key] = self.blocks(*key)
        pool = self.made[key]
        start = int(self.random.integers(len(pool)))
        left = tensor.n_bytes // tensor.kind.bytes
        while left > 0:
            part = pool[start : start + left]
            file.write(part)
            left -= len(part)
            start = 0


def write(path: Path, n_layers: int, dense: Kind, seed: int) -> int:
    """Writes the file and returns its size."""
    all_tensors = list(tensors(n_layers, dense))
    pools = Pools(seed)
    with path.open("wb") as file:
        file.write(header(n_layers, all_tensors))
        for tensor in all_tensors:
            pools.write(file, tensor)
            file.write(bytes(padding(tensor.n_bytes)))
    return path.stat().st_size


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Writes a GGUF file of gpt-oss-20b's shape with random weights."
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--layers", type=int, default=24, help="24 is the whole model (default)")
    parser.add_argument(
        "--dense",
        choices=("bf16", "q8_0"),
        default="bf16",
        help="format of attention, embedding and output (default: bf16)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all weights (default: 0)")
    args = parser.parse_args()
    if args.layers < 1:
        parser.error("--layers must be positive")
    begun = time.monotonic()
    dense = {"bf16": BF16, "q8_0": Q8_0}[args.dense]
    size = write(args.file, args.layers, dense, args.seed)
    seconds = time.monotonic() - begun
    print(f"{os.fspath(args.file)}: {size / 1e9:.2f} GB in {seconds:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
