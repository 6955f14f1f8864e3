"""MXFP4 dequantized by transformers: every byte under many scales, and one shaped tensor.

    python make_quant.py [--out FOLDER]

Checked here against the OCP text (make_logits.unpacked), value by value, before it is written.
Scale byte 255 means NaN by that text, and transformers multiplies by 2^128 instead: it is left out.
"""

import argparse
import pathlib

import numpy
import safetensors.torch
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import make_logits

SCALES = [0, 1, 2, 64, 118, 121, 124, 126, 127, 128, 131, 200, 252, 253, 254]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    folder = parser.parse_args().out / "quant"
    folder.mkdir(parents=True, exist_ok=True)

    scales = torch.tensor(SCALES, dtype=torch.uint8)
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(len(SCALES), 1, 16, 16)
    each = scales.view(-1, 1, 1).expand(len(SCALES), 1, 16)

    def theirs(blocks, scales, dtype):  # it gives [experts, in, out]
        return convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2).contiguous()

    value = theirs(blocks, each, torch.float32)
    with numpy.errstate(over="ignore"):
        assert torch.equal(value, make_logits.unpacked(blocks, each))
    bf16 = theirs(blocks, each, torch.bfloat16)
    safetensors.torch.save_file(
        {"scale": scales, "byte": torch.arange(256, dtype=torch.uint8),
         "f32": value.view(-1, 256, 2), "bf16": bf16.view(-1, 256, 2)},
        folder / "mxfp4_bytes.safetensors")

    rng = numpy.random.default_rng(77)
    blocks = torch.from_numpy(rng.integers(0, 256, (2, 6, 3, 16), dtype=numpy.uint8))
    scales = torch.from_numpy(rng.integers(110, 140, (2, 6, 3), dtype=numpy.uint8))
    shaped = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(shaped.transpose(1, 2), make_logits.unpacked(blocks, scales))
    safetensors.torch.save_file({"blocks": blocks, "scales": scales, "in_out": shaped},
                                folder / "mxfp4_tensor.safetensors")


if __name__ == "__main__":
    main()
