"""Muon in float32, with matrices of one shape orthogonalised together.

Design note. `torch.optim.Muon` iterates in bfloat16, which CPUs without bfloat16 units emulate at a fraction
of the speed; for this profile's matrices that would cost more than the forward and backward pass. Same update
otherwise: Nesterov momentum, five quintic Newton-Schulz iterations, decoupled weight decay, rate times
sqrt(max(1, rows/columns)).
"""

from collections import defaultdict

import torch

COEFFICIENTS = (3.4445, -4.775, 2.0315)


def orthogonalise(batch: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Bring the singular values of each matrix in `batch` (n, rows <= columns) close to one."""
    a, b, c = COEFFICIENTS
    x = batch / batch.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Muon for the 2-D weights of hidden layers."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[tuple(sorted(p.shape))].append((p, self._direction(p, group["momentum"])))
            for members in by_shape.values():
                flip = [p.shape[0] > p.shape[1] for p, _ in members]
                stacked = torch.stack([g.mT if f else g for (_, g), f in zip(members, flip, strict=True)])
                for (p, _), f, update in zip(members, flip, orthogonalise(stacked), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                    p.add_(update.mT if f else update, alpha=-group["lr"] * scale)

    def _direction(self, p: torch.Tensor, momentum: float) -> torch.Tensor:
        buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)
