"""MXFP4: blocks of 32 along the input dimension, E2M1 codes under one E8M0 scale (OCP MX 1.0).

The scale is 2^(floor(log2(amax)) - 2), so the largest magnitude lies in [4, 8) and what exceeds 6
saturates. Codes are rounded to nearest, ties to the even code. A byte holds two codes, the even
element in its low nibble.
"""

import torch

BLOCK = 32
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E8M0_BIAS = 127


def _codes_and_exponents(w: torch.Tensor):
    """Unsigned codes [..., n_blocks, 32] in 0..7 and scale exponents [..., n_blocks, 1], as floats."""
    blocks = w.float().unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1, keepdim=True)
    exponent = torch.floor(torch.log2(amax.clamp_min(2.0**-100))) - 2
    a = blocks.abs() * torch.exp2(-exponent)
    # Midpoints between neighbours; `>=` where the upper of the two has the even code.
    code = (a > 0.25).float() + (a >= 0.75) + (a > 1.25) + (a >= 1.75)
    code = code + (a > 2.5) + (a >= 3.5) + (a > 5.0)
    return blocks, code, exponent


def fake_quantize(w: torch.Tensor) -> torch.Tensor:
    """w rounded to MXFP4 values; gradients pass straight through to w."""
    blocks, code, exponent = _codes_and_exponents(w.detach())
    # 0..4 are halves; 5, 6, 7 are 3, 4, 6.
    magnitude = torch.where(code <= 4, code * 0.5, torch.where(code == 7, code * 0 + 6, code - 2))
    q = (torch.sign(blocks) * magnitude * torch.exp2(exponent)).flatten(-2)
    return w + (q - w).detach() if w.requires_grad else q


def pack(w: torch.Tensor):
    """[..., n] to blocks [..., n/32, 16] u8 and scales [..., n/32] u8."""
    blocks, code, exponent = _codes_and_exponents(w)
    nibble = code.to(torch.uint8) | ((blocks < 0) & (code > 0)).to(torch.uint8) << 3
    packed = nibble[..., 0::2] | nibble[..., 1::2] << 4
    return packed.contiguous(), (exponent.squeeze(-1) + E8M0_BIAS).to(torch.uint8)


def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 values of packed blocks: [..., n/32, 16] and [..., n/32] to [..., n]."""
    table = torch.tensor(VALUES + [-v for v in VALUES], device=blocks.device)
    nibbles = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()
    scale = torch.exp2(scales.float() - E8M0_BIAS)
    return (table[nibbles] * scale.unsqueeze(-1)).flatten(-2)
