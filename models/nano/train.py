#!/usr/bin/env python3
"""Train nano: a GPT-OSS model whose experts are MXFP4 from the first step.

    python3 models/nano/train.py --minutes 9 --out target/nano
    python3 models/nano/train.py --minutes 6 --out target/nano2 --resume target/nano

Uses CUDA when it is there, else the CPU, in bf16 either way. The learning rate follows the share of
the run that has passed, by steps or by the clock, whichever is further on. About every minute the model
answers held-out questions; the best weights so far are exported to OUT in the released layout, and
OUT also gets a training checkpoint to resume from.
"""

import argparse
import copy
import json
import threading
import time
from pathlib import Path
from queue import Queue

import torch
import torch.nn.functional as F

import batches
import data
import evaluate
import export
from model import Config, GptOss
from muon import Muon

DTYPE = torch.bfloat16
LENGTH = 384
BALANCE_WEIGHT = 0.01


def optimizers(model: GptOss, lr: float):
    """Muon for the matrices inside the blocks, AdamW for all else."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        inside = name.startswith("blocks.") and p.ndim >= 2
        (matrices if inside and "bias" not in name and "router" not in name else others).append(p)
    muon = Muon(matrices, lr=lr, weight_decay=0.05)
    fused = others[0].is_cuda
    adam = torch.optim.AdamW(others, lr=lr / 8, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
    for opt in (muon, adam):
        for group in opt.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def rate(progress: float, step: int, decay: float) -> float:
    """Share of the peak learning rate: 100 steps of warm-up, a plateau, a linear fall to zero."""
    return min(1.0, (step + 1) / 100, max(0.0, 1.0 - progress) / decay)


def feed(queue, device) -> Queue:
    """A short queue of batches already on the device, filled by a thread."""
    ready = Queue(maxsize=3)

    def pump():
        while True:
            b = queue.get()
            tensors = [torch.from_numpy(a.astype("int64")) for a in (b.ids, b.doc, b.target)]
            if device == "cuda":
                tensors = [t.pin_memory().to(device, non_blocking=True) for t in tensors]
            ready.put((tensors, b.n_tokens))

    threading.Thread(target=pump, daemon=True).start()
    return ready


def held_out_accuracy(model, encoder, rows) -> dict[str, float]:
    right = evaluate.right_answers(model, encoder, rows, "medium", DTYPE)
    n = len(rows) // len(data.FAMILIES)
    return {f: sum(right[i * n : (i + 1) * n]) / n for i, f in enumerate(data.FAMILIES)}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--minutes", type=float, default=9.0, help="wall-clock limit of the training loop")
    ap.add_argument("--steps", type=int, default=10**9, help="stop after so many steps")
    ap.add_argument("--resume", type=Path, help="a folder with a training checkpoint")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--rows", type=int, default=192, help="packed rows of 384 tokens a step")
    ap.add_argument("--lr", type=float, default=0.02, help="peak rate of Muon; AdamW takes an eighth")
    ap.add_argument("--decay", type=float, default=0.5, help="share of the run with a falling rate")
    ap.add_argument("--workers", type=int, default=13, help="processes that make batches")
    ap.add_argument("--eval-rows", type=int, default=64, help="held-out questions a family")
    ap.add_argument("--eval-seconds", type=float, default=60.0)
    args = ap.parse_args()

    queue, workers = batches.start(args.seed, args.workers, args.rows, LENGTH)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    meta = {"step": 0, "tokens": 0, "minutes": 0.0, "seeds": []}
    if args.resume:
        model, meta = export.load_training(args.resume)
    else:
        model = GptOss(Config())
    model.to(device)
    opts = optimizers(model, args.lr)
    encoder = batches.Encoder()
    rows = [data.to_row("", item) for item in data.held_out(args.eval_rows)]

    def loss_of(x, target):
        logits = model.logits(x, DTYPE)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1)

    # Training runs compiled blocks; evaluation runs the plain modules behind them.
    blocks = list(model.blocks)
    if device == "cuda":
        blocks, loss_of = [torch.compile(b) for b in blocks], torch.compile(loss_of)

    ready = feed(queue, device)
    best, best_mean = None, -1.0
    start = last_eval = time.time()
    step, tokens = 0, 0
    running, running_steps = torch.zeros(2, device=device), 0
    while True:
        elapsed = time.time() - start
        progress = max(elapsed / (60 * args.minutes), step / args.steps)
        done = progress >= 1
        if done or time.time() - last_eval > args.eval_seconds:
            accuracy = held_out_accuracy(model, encoder, rows)
            mean = sum(accuracy.values()) / len(accuracy)
            if mean >= best_mean:
                best, best_mean = copy.deepcopy(model.state_dict()), mean
            loss, balance = (running / max(1, running_steps)).tolist()
            running.zero_()
            running_steps, last_eval = 0, time.time()
            shown = " ".join(f"{f}={a:.2f}" for f, a in accuracy.items())
            print(
                f"{elapsed:5.0f}s step {step} tokens {tokens / 1e6:.0f}M loss {loss:.4f} "
                f"balance {balance:.3f} waiting {ready.qsize()} mean {mean:.3f} {shown}",
                flush=True,
            )
        if done:
            break
        (ids, doc, target), n_tokens = ready.get()
        share = rate(progress, step, args.decay)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * share
        x, balance = model.hidden(ids, doc, DTYPE, blocks)
        loss = loss_of(x, target)
        (loss + BALANCE_WEIGHT * balance).backward()
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        running += torch.stack((loss.detach(), balance.detach()))
        running_steps, step, tokens = running_steps + 1, step + 1, tokens + n_tokens
        if step == 3:
            print(f"3 steps after {time.time() - start:.0f} s", flush=True)

    for w in workers:
        w.terminate()
    model.load_state_dict(best)
    meta["step"] += step
    meta["tokens"] += tokens
    meta["minutes"] += round((time.time() - start) / 60, 2)
    meta["seeds"] = meta["seeds"] + [args.seed]
    export.save_training(model, args.out, meta)
    export.export(model, args.out)
    print(json.dumps(meta | {"best_mean": best_mean}))


if __name__ == "__main__":
    main()
