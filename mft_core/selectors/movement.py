"""Movement masks: the weights go that training was about to move towards zero.

Movement pruning (Sanh et al. 2020, "Movement Pruning", section 3) sums −W · dL/dW over fine-tuning and keeps the
highest scores. Mask fine-tuning freezes the weights, so the sum over the calibration rows is taken at the fine-tuned
weights; W comes out of the sum, and one gradient gives all. −W · dL/dW is also, to first order, what removing the
weight adds to the loss: the lowest scores are those whose removal would lower it most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mft_core.masks.sites import Site
from mft_core.selectors.job import Choice, Job
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
        for batch in job.reported(calibration):
            loss = head.summed_loss(batch, model.device) / calibration.loss_tokens
            loss.backward()
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}

    def score(site: Site) -> Tensor:
        weight = site.of(weights).detach().float()
        return -weight * site.of(gradients) if site.parameter in gradients else torch.zeros_like(weight)

    return job.choice(map(score, job.sites), signed=True)
