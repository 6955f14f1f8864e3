"""Muon: momentum whose matrices are orthogonalized by a Newton-Schulz iteration (Jordan et al. 2024).

Parameters may be matrices or stacks of matrices (experts); those of one shape go through the
iteration as one batch.
"""

from collections import defaultdict

import torch


def orthogonalize(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """[n, rows, cols] to nearly orthogonal matrices, in bfloat16."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape[-2:]].append(p)
            for (rows, cols), params in by_shape.items():
                updates = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    m = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(m, group["momentum"]).reshape(-1, rows, cols))
                flat = orthogonalize(torch.cat(updates))
                scale = max(1.0, rows / cols) ** 0.5
                for p, u in zip(params, flat.split([u.shape[0] for u in updates])):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u.reshape(p.shape).to(p.dtype), alpha=-group["lr"] * scale)
