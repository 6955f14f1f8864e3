"""MXFP4 dequantized by transformers: every byte under many scales, and one shaped tensor. And blocks quantized
to MXFP4 and MXINT8 by a search over all codes in NumPy float64, by the words of the OCP text.

    python make_quant.py [--out FOLDER]

What transformers gives is checked here against the OCP text (make_logits.unpacked), value by value, before it is
written. Scale byte 255 means NaN by that text, and transformers multiplies by 2^128 instead: it is left out.
"""

import argparse
import pathlib

import numpy
import safetensors.torch
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import make_logits

SCALES = [0, 1, 2, 64, 118, 121, 124, 126, 127, 128, 131, 200, 252, 253, 254]


E2M1 = numpy.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
INT8 = numpy.arange(-127, 128)


def exponent(block):
    """floor(log2(largest magnitude)), without a logarithm that could round."""
    return int(numpy.frexp(numpy.abs(block).max())[1]) - 1


def nearest(values, grid, is_even):
    """Index of the nearest grid point for each value; of two at the same distance the even one."""
    distance = numpy.abs(values[:, None] - grid[None, :])
    best = distance.min(axis=1, keepdims=True)
    return numpy.argmax((distance == best) * (1 + is_even[None, :]), axis=1)


def quantize_mxfp4(block):
    """Scale byte and codes: the scale is the largest magnitude's power of two over E2M1's own largest, 4."""
    scale = min(max(exponent(block) - 2, -125), 125)
    codes = nearest(numpy.abs(block) / 2.0 ** scale, E2M1, numpy.arange(8) % 2 == 0)
    codes = codes + 8 * numpy.signbit(block)
    return scale + 127, (codes[0::2] + 16 * codes[1::2]).astype(numpy.uint8)


def quantize_mxint8(block):
    """Scale byte and codes: of the two scales at the largest magnitude the one with less squared error."""
    tried = []
    for scale in (exponent(block), exponent(block) + 1):
        step = 2.0 ** (scale - 6)
        codes = INT8[nearest(block / step, INT8, INT8 % 2 == 0)]
        tried.append((((block - codes * step) ** 2).sum(), scale + 127, codes.astype(numpy.int8)))
    return min(tried, key=lambda t: t[:2])[1:]


def blocks_to_quantize(rng):
    """Normal and heavy-tailed blocks of many sizes, ties, a largest value near each end of its binade, one outlier."""
    blocks = [rng.normal(size=32) * 2.0 ** rng.integers(-40, 40) for _ in range(30)]
    blocks += [rng.standard_t(2, size=32) * 2.0 ** rng.integers(-8, 8) for _ in range(20)]
    blocks += [numpy.resize([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0], 32) * rng.choice([-1, 1], 32)]
    blocks += [(rng.integers(-254, 255, 32) / 2.0) / 64.0 * sign for sign in (1, -1, 4)]
    for top in (1.0, 1.5, 1.75, 1.98, 1.99, 1.995, 1.999):
        block = rng.uniform(-1, 1, 32)
        block[7] = top
        blocks += [block, block * rng.choice([0.01, 1], 32)]
        blocks += [numpy.where(numpy.arange(32) == 7, top, rng.integers(-60, 60, 32) / 32.0)]
    blocks += [numpy.eye(32)[5] * -3.3]
    return numpy.array(blocks).astype(numpy.float32).astype(numpy.float64)


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

    values = blocks_to_quantize(rng)
    four = [quantize_mxfp4(block) for block in values]
    eight = [quantize_mxint8(block) for block in values]
    column = lambda rows, i, dtype: torch.from_numpy(numpy.array([row[i] for row in rows]).astype(dtype))
    safetensors.torch.save_file(
        {"values": torch.from_numpy(values).to(torch.float32),
         "mxfp4_scale": column(four, 0, numpy.uint8), "mxfp4_codes": column(four, 1, numpy.uint8),
         "mxint8_scale": column(eight, 0, numpy.uint8), "mxint8_codes": column(eight, 1, numpy.int8)},
        folder / "quantized.safetensors")


if __name__ == "__main__":
    main()
