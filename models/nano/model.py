"""GPT-OSS in PyTorch, sized for nano: training on packed rows, greedy decoding with a KV cache.

Semantics are those of the released model: RMSNorm in float32, biased projections, grouped-query
attention with a learned sink a head, a sliding window on even layers, YaRN rotary positions without
truncation, a router that picks its top k before the softmax, and clamped SwiGLU experts whose
gate and up rows interleave. Every expert is computed for every token and the unchosen ones get
weight zero: at this size that is faster than sorting tokens.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import mxfp4


@dataclass(frozen=True)
class Config:
    vocab_size: int = 608
    hidden_size: int = 256
    n_layers: int = 6
    n_heads: int = 8
    n_kv_heads: int = 2
    head_dim: int = 64
    n_experts: int = 8
    top_k: int = 4
    intermediate_size: int = 256
    sliding_window: int = 32
    swiglu_limit: float = 7.0
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150000.0
    rope_factor: float = 32.0
    rope_original_length: int = 256
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def is_sliding(self, layer: int) -> bool:
        return layer % 2 == 0


@functools.cache
def rope_tables(cfg: Config, length: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, head_dim / 2] with YaRN's mixed frequencies and its concentration."""
    half = cfg.head_dim // 2
    plain = cfg.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)

    def ramp_end(turns: float) -> float:
        wavelength = cfg.rope_original_length / (turns * 2 * math.pi)
        return half * math.log(wavelength) / math.log(cfg.rope_theta)

    low, high = max(ramp_end(cfg.beta_fast), 0), min(ramp_end(cfg.beta_slow), cfg.head_dim - 1)
    ramp = ((torch.arange(half, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    inv_freq = plain / cfg.rope_factor * ramp + plain * (1 - ramp)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * inv_freq
    concentration = 0.1 * math.log(cfg.rope_factor) + 1
    to = lambda t: (t * concentration).float().to(device)
    return to(angles.cos()), to(angles.sin())


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [..., n_heads, head_dim] with pairs (i, i + half); cos and sin [..., 1, head_dim / 2]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(cfg.hidden_size))
        self.eps = cfg.rms_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.float()


def init_weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * shape[-1] ** -0.5)


class Attention(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        self.q = init_weight(q, cfg.hidden_size)
        self.k = init_weight(kv, cfg.hidden_size)
        self.v = init_weight(kv, cfg.hidden_size)
        self.qkv_bias = nn.Parameter(torch.zeros(q + 2 * kv))
        self.o = nn.Parameter(torch.zeros(cfg.hidden_size, q))
        self.o_bias = nn.Parameter(torch.zeros(cfg.hidden_size))
        self.sinks = nn.Parameter(torch.zeros(cfg.n_heads))

    def project(self, x, cos, sin):
        """q [B, T, n_heads, D], k and v [B, T, n_kv_heads, D]; q and k rotated."""
        cfg, weight = self.cfg, torch.cat((self.q, self.k, self.v))
        qkv = F.linear(x, weight.to(x.dtype), self.qkv_bias.to(x.dtype)).unflatten(-1, (-1, cfg.head_dim))
        q, k, v = qkv.split((cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads), -2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def attend(self, q, k, v, mask):
        """mask [B, 1, T, S] says which keys a query sees."""
        cfg = self.cfg
        B, T = q.shape[:2]
        group = cfg.n_heads // cfg.n_kv_heads
        q = q.view(B, T, cfg.n_kv_heads, group, cfg.head_dim).permute(0, 2, 3, 1, 4)
        q = q.reshape(B * cfg.n_kv_heads, group * T, cfg.head_dim)
        k, v = (t.transpose(1, 2).reshape(B * cfg.n_kv_heads, -1, cfg.head_dim) for t in (k, v))
        scores = torch.bmm(q, k.transpose(1, 2)).view(B, cfg.n_heads, T, -1).float()
        scores = (scores * cfg.head_dim**-0.5).masked_fill(~mask, -1e30)
        sink = self.sinks.float().view(1, -1, 1, 1)
        top = torch.maximum(scores.amax(-1, keepdim=True), sink).detach()
        e = torch.exp(scores - top)
        p = (e / (e.sum(-1, keepdim=True) + torch.exp(sink - top))).to(v.dtype)
        out = torch.bmm(p.view(B * cfg.n_kv_heads, group * T, -1), v)
        out = out.view(B, cfg.n_kv_heads, group, T, cfg.head_dim).permute(0, 3, 1, 2, 4)
        return F.linear(out.reshape(B, T, -1), self.o.to(v.dtype), self.o_bias.to(v.dtype))


class Experts(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        E, H, I = cfg.n_experts, cfg.hidden_size, cfg.intermediate_size
        self.router = init_weight(E, H)
        self.router_bias = nn.Parameter(torch.zeros(E))
        self.gate_up = init_weight(E, 2 * I, H)
        self.gate_up_bias = nn.Parameter(torch.zeros(E, 2 * I))
        self.down = nn.Parameter(init_weight(E, H, I).data * 0.1)
        self.down_bias = nn.Parameter(torch.zeros(E, H))

    def forward(self, x):
        """The weighted expert outputs, and the load-balancing loss."""
        cfg, dtype = self.cfg, x.dtype
        # In float32: bf16 logits tie often, and a tie would let in a fifth expert.
        router, bias = self.router.to(dtype).float(), self.router_bias.to(dtype).float()
        logits = F.linear(x.float(), router, bias)
        chosen = logits >= logits.topk(cfg.top_k, -1).values[..., -1:]
        weight = logits.masked_fill(~chosen, -1e30).softmax(-1).to(dtype)
        share = chosen.float().flatten(0, -2).mean(0) / cfg.top_k
        balance = cfg.n_experts * (share * logits.softmax(-1).flatten(0, -2).mean(0)).sum()

        gate_up_w = mxfp4.fake_quantize(self.gate_up).to(dtype).flatten(0, 1)
        h = F.linear(x, gate_up_w, self.gate_up_bias.to(dtype).flatten())
        h = h.unflatten(-1, (cfg.n_experts, cfg.intermediate_size, 2)).float()
        gate = h[..., 0].clamp(max=cfg.swiglu_limit)
        up = h[..., 1].clamp(-cfg.swiglu_limit, cfg.swiglu_limit)
        h = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        # The router's weight goes in before the down projection: one product sums over experts.
        h = (h * weight.unsqueeze(-1).float()).to(dtype).flatten(-2)
        down_w = mxfp4.fake_quantize(self.down).to(dtype).permute(1, 0, 2).flatten(1)
        return F.linear(h, down_w) + weight @ self.down_bias.to(dtype), balance


class Block(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(cfg), Attention(cfg)
        self.mlp_norm, self.mlp = RMSNorm(cfg), Experts(cfg)

    def forward(self, x, cos, sin, mask, dtype):
        q, k, v = self.attn.project(self.attn_norm(x).to(dtype), cos, sin)
        x = x + self.attn.attend(q, k, v, mask).float()
        out, balance = self.mlp(self.mlp_norm(x).to(dtype))
        return x + out.float(), balance


class GptOss(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Parameter(torch.randn(cfg.vocab_size, cfg.hidden_size) * 0.5)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg)
        self.head = nn.Parameter(torch.zeros(cfg.vocab_size, cfg.hidden_size))

    def logits(self, x, dtype):
        return F.linear(self.norm(x).to(dtype), self.head.to(dtype)).float()

    def hidden(self, ids, doc, dtype, blocks=None):
        """Final hidden states [B, T, H] of rows packed with documents, and the mean balance loss.

        `blocks` stands in for the model's own, where they are compiled.
        """
        T = ids.shape[1]
        cos, sin = (t[:, None] for t in rope_tables(self.cfg, T, ids.device))
        at = torch.arange(T, device=ids.device)
        back = at[:, None] - at
        full = ((back >= 0) & (doc[:, :, None] == doc[:, None])).unsqueeze(1)
        window = full & (back < self.cfg.sliding_window)
        x, balance = F.embedding(ids, self.embed.to(dtype)).float(), 0.0
        for i, block in enumerate(blocks or self.blocks):
            x, b = block(x, cos, sin, window if self.cfg.is_sliding(i) else full, dtype)
            balance = balance + b / self.cfg.n_layers
        return x, balance

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], stop: set[int], max_new: int, dtype) -> list[list[int]]:
        """Greedy continuations; a row ends at a stop token, which is left out, or at max_new."""
        cfg, device = self.cfg, self.embed.device
        B, longest = len(prompts), max(map(len, prompts))
        ids = torch.zeros(B, longest, dtype=torch.long)
        for row, p in zip(ids, prompts):
            row[: len(p)] = torch.tensor(p)
        ids, length = ids.to(device), torch.tensor([len(p) for p in prompts], device=device)
        S = longest + max_new
        cos, sin = (t[:, None] for t in rope_tables(cfg, S, device))
        shape = (cfg.n_layers, B, S, cfg.n_kv_heads, cfg.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        rows, slots = torch.arange(B, device=device)[:, None], torch.arange(S, device=device)

        def forward(tokens, pos):
            """Hidden states of tokens [B, T] at positions pos [B, T]; the cache grows by them."""
            x = F.embedding(tokens, self.embed.to(dtype)).float()
            back = pos[:, :, None] - slots
            full = (back >= 0).unsqueeze(1)
            window = full & (back < cfg.sliding_window).unsqueeze(1)
            for i, block in enumerate(self.blocks):
                normed = block.attn_norm(x).to(dtype)
                q, k, v = block.attn.project(normed, cos[pos], sin[pos])
                keys[i, rows, pos], values[i, rows, pos] = k, v
                mask = window if cfg.is_sliding(i) else full
                x = x + block.attn.attend(q, keys[i], values[i], mask).float()
                x = x + block.mlp(block.mlp_norm(x).to(dtype))[0].float()
            return x

        # A short prompt's padding writes keys past its end; decoding overwrites them in time.
        x = forward(ids, slots[:longest].expand(B, -1))
        x = x[rows[:, 0], length - 1]
        stops = torch.tensor(sorted(stop), device=device)
        out, done = [], torch.zeros(B, dtype=torch.bool, device=device)
        for step in range(max_new):
            token = self.logits(x, dtype).argmax(-1)
            done |= torch.isin(token, stops)
            out.append(token.masked_fill(done, -1))
            if step % 8 == 7 and bool(done.all()):
                break
            x = forward(token[:, None], (length + step)[:, None])[:, 0]
        return [[t for t in row if t >= 0] for row in torch.stack(out, 1).tolist()]
