"""Movement masks: the weights go that training was about to move towards zero.

Movement pruning (Sanh et al. 2020, "Movement Pruning", section 3) sums −W · dL/dW over fine-tuning and keeps the
highest scores. Mask fine-tuning freezes the weights, so the sum over the calibration rows is taken at the fine-tuned
weights; W comes out of the sum, and one gradient gives all. −W · dL/dW is also, to first order, what removing the
weight adds to the loss: the lowest scores are those whose removal would lower it most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mft_core.selectors.job import Choice, Job
from mft_core.stage import Progress
from mft_core.training.loss import LossHead


def choose(job: Job) -> Choice:
    """Remove the lowest −W · dL/dW (signed), L being the mean loss over the recipe's calibration rows."""
    model = job.model()
    parameters = dict(model.named_parameters())
    weights = {site.parameter: parameters[site.parameter] for site in job.sites}
    for weight in weights.values():
        weight.requires_grad_(True)
        weight.grad_dtype = torch.float32  # a sum over micro-batches in bfloat16 would lose the small ones
    calibration = job.calibration()
    with LossHead(model) as head:
        for done, batch in enumerate(calibration.batches, start=1):
            loss = head.summed_loss(batch, model.device) / calibration.loss_tokens
            loss.backward()
            job.context.report(Progress(done, len(calibration.batches), unit="batch"))
    return job.choice((_score(weights[site.parameter], site.index) for site in job.sites), signed=True)


@torch.no_grad()
def _score(weight: Tensor, index: int | None) -> Tensor:
    gradient = torch.zeros_like(weight, dtype=torch.float32) if weight.grad is None else weight.grad
    whole = (weight, gradient) if index is None else (weight[index], gradient[index])
    return -whole[0].float() * whole[1]
