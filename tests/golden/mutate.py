"""Proves that the goldens can fail: one mistake at a time, each must break one.

    python mutate.py [--golden FOLDER] [--out FILE]

Each mistake is built into transformers' model (a changed number, weight or
function), which then runs over the golden prompts and continuations. A mistake is
caught where the largest error of some case's logits is at least 10 tolerances.
Writes the table and exits with 1 where a mistake is not caught.
"""

import argparse
import contextlib
import io
import json
import pathlib
import sys

import safetensors.torch
import torch
import transformers
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

import make_logits

DEMAND = 10.0  # tolerances


def norms(model):
    return [m for m in model.modules() if isinstance(m, gpt_oss.GptOssRMSNorm)]


def mlps(model):
    return [layer.mlp for layer in model.model.layers]


def attentions(model):
    return [layer.self_attn for layer in model.model.layers]


@contextlib.contextmanager
def patched(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# ---- mistakes in numbers and weights: each changes a freshly loaded model --------------------------


def epsilon(model):
    for norm in norms(model):
        norm.variance_epsilon = 1e-6


def window(by):
    def change(model):
        model.config.sliding_window += by
    return change


def rope(change_parameters):
    def change(model):
        change_parameters(model.config.rope_parameters)
        model.model.rotary_emb = gpt_oss.GptOssRotaryEmbedding(model.config)
    return change


def rounded_ends(parameters):
    parameters["truncate"] = True


def no_yarn(parameters):
    parameters["rope_type"] = "default"


def swapped_betas(parameters):
    parameters["beta_fast"], parameters["beta_slow"] = parameters["beta_slow"], parameters["beta_fast"]


def no_concentration(model):
    model.model.rotary_emb.attention_scaling = 1.0


def concentration_once(model):
    model.model.rotary_emb.attention_scaling **= 0.5


def sink_scaled(model):
    for a in attentions(model):
        a.sinks.data /= 8


def sink_absent(model):
    for a in attentions(model):
        a.sinks.data -= 1e4


def odd_layers_windowed(model):
    model.config.layer_types = model.config.layer_types[1:] + model.config.layer_types[:1]


def all_layers_full(model):
    model.config.layer_types = ["full_attention"] * len(model.config.layer_types)


def heads_tiled(model):
    """Query head h reads key-value head h mod kv instead of h div group."""
    for a in attentions(model):
        kv, group, d = a.config.num_key_value_heads, a.num_key_value_groups, a.head_dim
        for w in (a.q_proj.weight, a.q_proj.bias):
            w.data = w.data.view(group, kv, d, -1).transpose(0, 1).reshape(w.shape)
        a.sinks.data = a.sinks.data.view(group, kv).T.reshape(-1)
        o = a.o_proj.weight
        o.data = o.data.view(-1, group, kv, d).transpose(1, 2).reshape(o.shape)


def qkv_bias_absent(model):
    for a in attentions(model):
        for p in (a.q_proj, a.k_proj, a.v_proj):
            p.bias.data.zero_()


def out_bias_absent(model):
    for a in attentions(model):
        a.o_proj.bias.data.zero_()


def scale_absent(model):
    for a in attentions(model):
        a.scaling = 1.0


def router_bias_absent(model):
    for m in mlps(model):
        m.router.bias.data.zero_()


def gate_up_swapped(model):
    for m in mlps(model):
        e = m.experts
        for p in (e.gate_up_proj, e.gate_up_proj_bias):
            p.data = p.data.unflatten(-1, (-1, 2)).flip(-1).flatten(-2).contiguous()


def gate_up_halves(model):
    """Gate rows first, then up rows, instead of interleaved."""
    for m in mlps(model):
        e = m.experts
        for p in (e.gate_up_proj, e.gate_up_proj_bias):
            p.data = p.data.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2).contiguous()


def nibbles_swapped(model):
    for m in mlps(model):
        for p in (m.experts.gate_up_proj, m.experts.down_proj):
            p.data = p.data.unflatten(1, (-1, 2)).flip(2).flatten(1, 2).contiguous()


def nibbles_as_halves(model):
    """Low nibbles as elements 0 to 15 of a block, high nibbles as 16 to 31."""
    for m in mlps(model):
        for p in (m.experts.gate_up_proj, m.experts.down_proj):
            p.data = p.data.unflatten(1, (-1, 16, 2)).transpose(2, 3).flatten(1, 3).contiguous()


def scale_bias_128(model):
    for m in mlps(model):
        for p in (m.experts.gate_up_proj, m.experts.down_proj):
            p.data = p.data / 2


def down_transposed(model):
    for m in mlps(model):
        p = m.experts.down_proj
        if p.shape[1] == p.shape[2]:
            p.data = p.data.transpose(1, 2).contiguous()


# ---- mistakes in the steps: each is (owner, name, replacement) ------------------------------------


def router(scores):
    def forward(self, hidden_states):
        logits = torch.nn.functional.linear(hidden_states, self.weight, self.bias)
        values, indices = torch.topk(logits, self.top_k, dim=-1)
        return logits, scores(self, logits, values, indices), indices
    return forward


def softmax_first(self, logits, values, indices):
    return logits.softmax(-1).gather(1, indices)


def softmax_first_renormalised(self, logits, values, indices):
    weights = logits.softmax(-1).gather(1, indices)
    return weights / weights.sum(-1, keepdim=True)


def sigmoid_scores(self, logits, values, indices):
    weights = values.sigmoid()
    return weights / weights.sum(-1, keepdim=True)


def gate(limit=True, plus=1.0, alpha=1.702, gate_limit=True, up_limit=True, lower_only=False):
    def apply_gate(self, gate_up):
        g, u = gate_up[..., ::2], gate_up[..., 1::2]
        if limit and gate_limit:
            g = g.clamp(max=self.limit)
        if limit and up_limit:
            u = u.clamp(max=self.limit) if lower_only else u.clamp(-self.limit, self.limit)
        return (u + plus) * g * torch.sigmoid(alpha * g)
    return apply_gate


def biased_after(self, hidden_states, router_indices=None, routing_weights=None):
    out = torch.zeros_like(hidden_states)
    for rank in range(router_indices.shape[1]):
        for row, e in enumerate(router_indices[:, rank].tolist()):
            inner = self._apply_gate(hidden_states[row] @ self.gate_up_proj[e] + self.gate_up_proj_bias[e])
            out[row] += routing_weights[row, rank] * (inner @ self.down_proj[e]) + self.down_proj_bias[e]
    return out


def neighbours(x, cos, sin):
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def rope_backwards(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)


def bf16_angles(x, cos, sin):
    cos, sin = cos.bfloat16().float(), sin.bfloat16().float()
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


EXPERTS, ROUTER = gpt_oss.GptOssExperts, gpt_oss.GptOssTopKRouter

# (what, change of the loaded model or None, patch or None, whether it must be caught)
MISTAKES = [
    ("nothing changed", None, None, False),
    ("epsilon 1e-6", epsilon, None, True),
    ("window + 1", window(1), None, True),
    ("window - 1", window(-1), None, True),
    ("window on odd layers instead of even", odd_layers_windowed, None, True),
    ("no window at all", all_layers_full, None, True),
    ("YaRN ends rounded", rope(rounded_ends), None, True),
    ("YaRN betas swapped", rope(swapped_betas), None, True),
    ("no YaRN", rope(no_yarn), None, True),
    ("no concentration", no_concentration, None, True),
    ("concentration on q alone", concentration_once, None, True),
    ("RoPE on neighbours", None, (gpt_oss, "_apply_rotary_emb", neighbours), True),
    ("RoPE turned backwards", None, (gpt_oss, "_apply_rotary_emb", rope_backwards), True),
    ("cos and sin rounded to bf16", None, (gpt_oss, "_apply_rotary_emb", bf16_angles), True),
    ("sink scaled by 1/8", sink_scaled, None, True),
    ("no sink", sink_absent, None, True),
    ("scores not scaled by 1/sqrt(head_dim)", scale_absent, None, True),
    ("query heads tiled over key-value heads", heads_tiled, None, True),
    ("no q, k, v bias", qkv_bias_absent, None, True),
    ("no attention output bias", out_bias_absent, None, True),
    ("no router bias", router_bias_absent, None, True),
    ("softmax before top-k, not renormalised", None, (ROUTER, "forward", router(softmax_first)), True),
    ("softmax before top-k, renormalised", None,
     (ROUTER, "forward", router(softmax_first_renormalised)), False),
    ("sigmoid instead of softmax over the chosen", None, (ROUTER, "forward", router(sigmoid_scores)), True),
    ("gate and up swapped", gate_up_swapped, None, True),
    ("gate and up as halves, not interleaved", gate_up_halves, None, True),
    ("nibbles swapped", nibbles_swapped, None, True),
    ("low nibbles as the first half of a block", nibbles_as_halves, None, True),
    ("scale exponent less 128, not 127", scale_bias_128, None, True),
    ("square down projection transposed", down_transposed, None, True),
    ("up without + 1", None, (EXPERTS, "_apply_gate", gate(plus=0.0)), True),
    ("no clamp", None, (EXPERTS, "_apply_gate", gate(limit=False)), True),
    ("gate not clamped", None, (EXPERTS, "_apply_gate", gate(gate_limit=False)), True),
    ("up not clamped", None, (EXPERTS, "_apply_gate", gate(up_limit=False)), True),
    ("up clamped from above only", None, (EXPERTS, "_apply_gate", gate(lower_only=True)), True),
    ("sigmoid(gate) instead of sigmoid(1.702 gate)", None, (EXPERTS, "_apply_gate", gate(alpha=1.0)), True),
    ("down bias after the router weight", None, (EXPERTS, "forward", biased_after), True),
]
PACKED_ONLY = {nibbles_swapped, nibbles_as_halves, scale_bias_128}


@torch.no_grad()
def error(folder, layout, change, patch):
    """Largest error of the case's logits in tolerances; None where the mistake does not apply."""
    if change in PACKED_ONLY and layout == "hf-bf16":
        return None
    model = make_logits.load(folder, layout)
    if change:
        change(model)
    expected = safetensors.torch.load_file(folder / "expected.safetensors")
    tolerance = json.loads((folder / "meta.json").read_text())["tolerance"]
    worst = 0.0
    with patched(*patch) if patch else contextlib.nullcontext():
        for line in (folder / "input.jsonl").read_text().splitlines():
            case = json.loads(line)
            tokens = case["tokens"] + expected[case["prompt"] + ".greedy"].tolist()[:-1]
            logits = make_logits.logits_of(model, tokens)
            worst = max(worst, (logits - expected[case["prompt"] + ".logits"]).abs().max().item())
    return worst / tolerance


def main():
    parser = argparse.ArgumentParser()
    here = pathlib.Path(__file__).parent
    parser.add_argument("--golden", type=pathlib.Path, default=here)
    parser.add_argument("--out", type=pathlib.Path, default=here / "mutations.md")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out, missed = io.StringIO(), []
    out.write("# Mistakes and the goldens that catch them\n\n"
              "Written by `mutate.py`: largest error of a case's logits, in tolerances; at least "
              f"{DEMAND:.0f} counts as caught.\n`original` holds the weights of `plain` and is left out. "
              "The two rows marked (=) are no mistakes and must stay within one tolerance.\n\n"
              "| mistake | worst case | error / tolerance | caught by |\n| --- | --- | ---: | --- |\n")
    cases = [c for c in make_logits.CASES if make_logits.spec_of(c)["layout"] != "original"]
    for what, change, patch, wanted in MISTAKES:
        errors = {}
        for case in cases:
            value = error(args.golden / "logits" / case, make_logits.spec_of(case)["layout"], change, patch)
            if value is not None:
                errors[case] = value
        worst = max(errors, key=errors.get)
        caught = [c for c in errors if errors[c] >= DEMAND]
        good = bool(caught) if wanted else errors[worst] < 1
        missed += [] if good else [what]
        out.write(f"| {what}{'' if wanted else ' (=)'} | {worst} | {errors[worst]:,.{0 if errors[worst] > 10 else 2}f} "
                  f"| {'all' if len(caught) == len(errors) else ', '.join(caught) or 'none'} |\n")
        print(f"{what}: {worst} {errors[worst]:.3g}, caught by {len(caught)} of {len(errors)}", flush=True)
    args.out.write_text(out.getvalue())
    if missed:
        sys.exit("not caught: " + "; ".join(missed))


if __name__ == "__main__":
    main()
