"""The whole forward pass in NumPy float64, written from the model's description alone.

    python reference_numpy.py [--golden FOLDER]

Reads each case's checkpoint by itself (no safetensors, no torch), computes the
logits at every position and prints how far they lie from transformers' float32
logits, in tolerances: a second opinion on the goldens, and the error that float32
itself has. Exits with 1 where that is more than half a tolerance.
"""

import argparse
import json
import math
import pathlib
import struct
import sys

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def tensors(path):
    raw = path.read_bytes()
    (size,) = struct.unpack_from("<Q", raw)
    for name, info in json.loads(raw[8:8 + size]).items():
        if name == "__metadata__":
            continue
        data = raw[8 + size + info["data_offsets"][0]:8 + size + info["data_offsets"][1]]
        if info["dtype"] == "BF16":
            value = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            value = np.frombuffer(data, {"F32": "<f4", "U8": "u1", "I32": "<i4"}[info["dtype"]])
        yield name, value.reshape(info["shape"])


def mxfp4(blocks, scales):
    codes = np.stack([blocks % 16, blocks // 16], -1).reshape(*scales.shape, 32)
    values = np.where(codes >= 8, -1.0, 1.0) * E2M1[codes % 8]
    values = values * 2.0 ** (scales.astype(int) - 127)[..., None]
    return values.reshape(*scales.shape[:-1], -1)


class Model:
    """One checkpoint, under whichever names, as float64 arrays with one set of names."""

    def __init__(self, folder):
        config = json.loads((folder / "config.json").read_text())
        raw = {}
        for path in sorted(folder.glob("model*.safetensors")):
            raw.update(tensors(path))
        self.original = "embedding.weight" in raw
        rope = config.get("rope_parameters") or config.get("rope_scaling")
        if self.original:
            rope = {"factor": config["rope_scaling_factor"], "beta_fast": config["rope_ntk_beta"],
                    "beta_slow": config["rope_ntk_alpha"],
                    "original_max_position_embeddings": config["initial_context_length"]}
        self.theta = rope.get("rope_theta", config.get("rope_theta"))
        self.rope, self.window, self.limit = rope, config["sliding_window"], config["swiglu_limit"]
        self.heads, self.kv = config["num_attention_heads"], config["num_key_value_heads"]
        self.d, self.eps = config["head_dim"], config.get("rms_norm_eps", 1e-5)
        self.top = config.get("num_experts_per_tok", config.get("experts_per_token"))
        hf, own = "model.layers.{}.", "block.{}."
        both = lambda a, b: raw[b if self.original else a].astype(np.float64)
        self.embed = both("model.embed_tokens.weight", "embedding.weight")
        self.unembed = both("lm_head.weight", "unembedding.weight")
        self.norm = both("model.norm.weight", "norm.scale")
        self.layers = []
        for n in range(config["num_hidden_layers"]):
            x = lambda a, b: both((hf + a).format(n), (own + b).format(n))
            part = {"norm1": x("input_layernorm.weight", "attn.norm.scale"),
                    "norm2": x("post_attention_layernorm.weight", "mlp.norm.scale"),
                    "sinks": x("self_attn.sinks", "attn.sinks"),
                    "router": x("mlp.router.weight", "mlp.gate.weight"),
                    "router_bias": x("mlp.router.bias", "mlp.gate.bias"),
                    "out": x("self_attn.o_proj.weight", "attn.out.weight"),
                    "out_bias": x("self_attn.o_proj.bias", "attn.out.bias"),
                    "up_bias": x("mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias"),
                    "down_bias": x("mlp.experts.down_proj_bias", "mlp.mlp2_bias")}
            for kind in ("weight", "bias"):
                name = (hf + "self_attn.{}_proj." + kind).format
                part["qkv" if kind == "weight" else "qkv_bias"] = (
                    x("", f"attn.qkv.{kind}") if self.original
                    else np.concatenate([raw[name(n, c)] for c in "qkv"]).astype(np.float64))
            for ours, a, b in (("up", "gate_up_proj", "mlp1_weight"),
                               ("down", "down_proj", "mlp2_weight")):
                plain = (hf + "mlp.experts." + a).format(n)
                if plain in raw:  # bf16, input dimension first
                    part[ours] = raw[plain].astype(np.float64).swapaxes(1, 2)
                else:
                    stem = (own + "mlp." + b + ".").format(n) if self.original else plain + "_"
                    part[ours] = mxfp4(raw[stem + "blocks"], raw[stem + "scales"])
            self.layers.append(part)

    def rms(self, x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * weight

    def angles(self, count):
        half, r = self.d // 2, self.rope
        plain = self.theta ** (-np.arange(half) / half)
        ends = [half * math.log(r["original_max_position_embeddings"] / (beta * 2 * math.pi))
                / math.log(self.theta) for beta in (r["beta_fast"], r["beta_slow"])]
        low, high = max(ends[0], 0), ends[1]
        ramp = np.clip((np.arange(half) - low) / (high - low), 0, 1)
        angle = np.arange(count)[:, None] * (plain * (1 - ramp) + plain / r["factor"] * ramp)
        concentration = 0.1 * math.log(r["factor"]) + 1
        return np.cos(angle) * concentration, np.sin(angle) * concentration

    def turn(self, x, cos, sin):
        a, b = np.split(x, 2, -1)
        cos, sin = cos[:, None], sin[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(self, x, part, window):
        n, d = len(x), self.d
        qkv = x @ part["qkv"].T + part["qkv_bias"]
        q, k, v = np.split(qkv, [self.heads * d, (self.heads + self.kv) * d], -1)
        cos, sin = self.angles(n)
        q = self.turn(q.reshape(n, self.heads, d), cos, sin)
        k = self.turn(k.reshape(n, self.kv, d), cos, sin)
        v, group = v.reshape(n, self.kv, d), self.heads // self.kv
        back = np.arange(n)[:, None] - np.arange(n)
        seen = (back >= 0) & (back < window)
        out = np.empty((n, self.heads, d))
        for h in range(self.heads):
            score = np.where(seen, q[:, h] @ k[:, h // group].T / math.sqrt(d), -np.inf)
            top = np.maximum(score.max(-1), part["sinks"][h])[:, None]
            weight = np.exp(score - top)
            total = weight.sum(-1, keepdims=True) + np.exp(part["sinks"][h] - top)
            out[:, h] = weight / total @ v[:, h // group]
        return out.reshape(n, -1) @ part["out"].T + part["out_bias"]

    def experts(self, x, part):
        logits = x @ part["router"].T + part["router_bias"]
        out = np.zeros_like(x)
        for row, (value, score) in enumerate(zip(x, logits)):
            chosen = np.argsort(-score, kind="stable")[:self.top]
            weight = np.exp(score[chosen] - score[chosen].max())
            for e, w in zip(chosen, weight / weight.sum()):
                pair = part["up"][e] @ value + part["up_bias"][e]
                gate = np.minimum(pair[0::2], self.limit)
                up = np.clip(pair[1::2], -self.limit, self.limit)
                inner = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
                out[row] += w * (part["down"][e] @ inner + part["down_bias"][e])
        return out

    def logits(self, tokens):
        x = self.embed[tokens]
        for n, part in enumerate(self.layers):
            window = self.window if n % 2 == 0 else len(x)
            x = x + self.attention(self.rms(x, part["norm1"]), part, window)
            x = x + self.experts(self.rms(x, part["norm2"]), part)
        return self.rms(x, self.norm) @ self.unembed.T


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--golden", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    args = parser.parse_args()
    worst = 0.0
    for folder in sorted((args.golden / "logits").iterdir()):
        model, expected = Model(folder), dict(tensors(folder / "expected.safetensors"))
        tolerance = json.loads((folder / "meta.json").read_text())["tolerance"]
        error = 0.0
        for line in (folder / "input.jsonl").read_text().splitlines():
            case = json.loads(line)
            greedy = expected[case["prompt"] + ".greedy"].tolist()
            logits = model.logits(case["tokens"] + greedy[:-1])
            assert logits[len(case["tokens"]) - 1:].argmax(-1).tolist() == greedy
            error = max(error, np.abs(logits - expected[case["prompt"] + ".logits"]).max())
        print(f"{folder.name:12} largest error {error:.2e} = {error / tolerance:.3f} of the tolerance")
        worst = max(worst, error / tolerance)
    sys.exit(int(worst > 0.5))


if __name__ == "__main__":
    main()
