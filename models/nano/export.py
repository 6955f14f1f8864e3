#!/usr/bin/env python3
"""Between the training model and the released Hugging Face gpt-oss layout.

    python3 models/nano/export.py SOURCE OUT           experts packed as MXFP4
    python3 models/nano/export.py SOURCE OUT --bf16    the bf16 master: experts [E, in, out], unpacked

SOURCE is a folder with a training checkpoint (then the master holds the weights behind the 4-bit
codes) or an exported folder such as models/nano itself (then it holds the dequantized codes).
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import mxfp4
import tokenizer
from model import Config, GptOss

HERE = Path(__file__).resolve().parent
PART_BYTES = 15_000_000


def config_json(cfg: Config, packed: bool) -> dict:
    tok = tokenizer.load()
    config = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": tok.token_to_id("<|return|>"),
        "experts_per_token": cfg.top_k,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "initial_context_length": cfg.rope_original_length,
        "initializer_range": 0.02,
        "intermediate_size": cfg.intermediate_size,
        "layer_types": [
            "sliding_attention" if cfg.is_sliding(i) else "full_attention"
            for i in range(cfg.n_layers)
        ],
        "max_position_embeddings": int(cfg.rope_original_length * cfg.rope_factor),
        "model_type": "gpt_oss",
        "num_attention_heads": cfg.n_heads,
        "num_experts_per_tok": cfg.top_k,
        "num_hidden_layers": cfg.n_layers,
        "num_key_value_heads": cfg.n_kv_heads,
        "num_local_experts": cfg.n_experts,
        "output_router_logits": False,
        "pad_token_id": tok.token_to_id("<|endoftext|>"),
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_scaling": {
            "beta_fast": cfg.beta_fast,
            "beta_slow": cfg.beta_slow,
            "factor": cfg.rope_factor,
            "original_max_position_embeddings": cfg.rope_original_length,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": int(cfg.rope_theta),
        "router_aux_loss_coef": 0.9,
        "sliding_window": cfg.sliding_window,
        "swiglu_limit": cfg.swiglu_limit,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": cfg.vocab_size,
    }
    if not packed:
        del config["quantization_config"]
    return config


def config_from_json(c: dict) -> Config:
    rope = c["rope_scaling"]
    return Config(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        n_layers=c["num_hidden_layers"],
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        n_experts=c["num_local_experts"],
        top_k=c["num_experts_per_tok"],
        intermediate_size=c["intermediate_size"],
        sliding_window=c["sliding_window"],
        swiglu_limit=c["swiglu_limit"],
        rms_norm_eps=c["rms_norm_eps"],
        rope_theta=float(c["rope_theta"]),
        rope_factor=rope["factor"],
        rope_original_length=rope["original_max_position_embeddings"],
        beta_fast=rope["beta_fast"],
        beta_slow=rope["beta_slow"],
    )


def dense_names(cfg: Config):
    """(name here, name in the release) of every tensor that is stored as it is."""
    yield "embed", "model.embed_tokens.weight"
    yield "norm.weight", "model.norm.weight"
    yield "head", "lm_head.weight"
    for i in range(cfg.n_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        yield f"{ours}.attn_norm.weight", f"{theirs}.input_layernorm.weight"
        yield f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight"
        for p in "qkvo":
            yield f"{ours}.attn.{p}", f"{theirs}.self_attn.{p}_proj.weight"
        yield f"{ours}.attn.o_bias", f"{theirs}.self_attn.o_proj.bias"
        yield f"{ours}.attn.sinks", f"{theirs}.self_attn.sinks"
        yield f"{ours}.mlp.router", f"{theirs}.mlp.router.weight"
        yield f"{ours}.mlp.router_bias", f"{theirs}.mlp.router.bias"
        yield f"{ours}.mlp.gate_up_bias", f"{theirs}.mlp.experts.gate_up_proj_bias"
        yield f"{ours}.mlp.down_bias", f"{theirs}.mlp.experts.down_proj_bias"


def to_release(model: GptOss, packed: bool) -> dict[str, torch.Tensor]:
    cfg, state = model.cfg, {k: v.detach().cpu() for k, v in model.state_dict().items()}
    out = {theirs: state[ours].bfloat16() for ours, theirs in dense_names(cfg)}
    sizes = [n * cfg.head_dim for n in (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)]
    for i in range(cfg.n_layers):
        attn, experts = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp.experts"
        for p, bias in zip("qkv", state[f"blocks.{i}.attn.qkv_bias"].split(sizes)):
            out[f"{attn}.{p}_proj.bias"] = bias.bfloat16()
        for name in ("gate_up", "down"):
            w = state[f"blocks.{i}.mlp.{name}"]
            if packed:
                blocks, scales = mxfp4.pack(w)
                out[f"{experts}.{name}_proj_blocks"], out[f"{experts}.{name}_proj_scales"] = blocks, scales
            else:
                out[f"{experts}.{name}_proj"] = w.bfloat16().mT
    return {k: v.contiguous() for k, v in sorted(out.items())}


def from_release(folder: Path) -> GptOss:
    cfg = config_from_json(json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "model.safetensors")
    state = {ours: tensors[theirs].float() for ours, theirs in dense_names(cfg)}
    for i in range(cfg.n_layers):
        attn, experts = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp.experts"
        bias = torch.cat([tensors[f"{attn}.{p}_proj.bias"].float() for p in "qkv"])
        state[f"blocks.{i}.attn.qkv_bias"] = bias
        for name in ("gate_up", "down"):
            key = f"{experts}.{name}_proj"
            if f"{key}_blocks" in tensors:
                w = mxfp4.unpack(tensors[f"{key}_blocks"], tensors[f"{key}_scales"])
            else:
                w = tensors[key].float().mT
            state[f"blocks.{i}.mlp.{name}"] = w.contiguous()
    model = GptOss(cfg)
    model.load_state_dict(state)
    return model


def export(model: GptOss, folder: Path, packed: bool = True) -> None:
    """A folder that transformers and podium load as it stands."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_release(model, packed), folder / "model.safetensors", metadata={"format": "pt"})
    tok = tokenizer.load()
    generation = {
        "bos_token_id": tok.token_to_id("<|startoftext|>"),
        "do_sample": False,
        "eos_token_id": [tok.token_to_id(s) for s in ("<|return|>", "<|endoftext|>", "<|call|>")],
        "pad_token_id": tok.token_to_id("<|endoftext|>"),
    }
    write = lambda name, value: (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    write("config.json", config_json(model.cfg, packed))
    write("generation_config.json", generation)
    if folder.resolve() != HERE:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(HERE / name, folder / name)


def save_training(model: GptOss, folder: Path, meta: dict) -> None:
    """The weights behind the 4-bit codes in bf16, in parts of at most 15 MB, without optimizer state."""
    folder.mkdir(parents=True, exist_ok=True)
    parts, size = [{}], 0
    for name, w in model.state_dict().items():
        w = w.detach().cpu().bfloat16().contiguous()
        if size + w.nbytes > PART_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = w
        size += w.nbytes
    for old in folder.glob("train-*.safetensors"):
        old.unlink()
    for i, part in enumerate(parts):
        save_file(part, folder / f"train-{i}.safetensors")
    (folder / "train.json").write_text(json.dumps(meta | {"config": vars(model.cfg)}, indent=2) + "\n")


def load_training(folder: Path) -> tuple[GptOss, dict]:
    meta = json.loads((folder / "train.json").read_text())
    model, state = GptOss(Config(**meta["config"])), {}
    for part in sorted(folder.glob("train-*.safetensors")):
        state |= {k: v.float() for k, v in load_file(part).items()}
    model.load_state_dict(state)
    return model, meta


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("source", type=Path)
    ap.add_argument("out", type=Path)
    ap.add_argument("--bf16", action="store_true", help="write the bf16 master")
    args = ap.parse_args()
    if (args.source / "train.json").exists():
        model, _ = load_training(args.source)
    else:
        model = from_release(args.source)
    export(model, args.out, packed=not args.bf16)


if __name__ == "__main__":
    main()
