"""Wanda masks: a weight counts by its magnitude times the norm of the input that it meets (Sun et al. 2024, "A Simple
and Effective Pruning Approach for Large Language Models", section 3).

S_ij = |W_ij| · ‖x_j‖, the norm of input feature j over all tokens of the calibration rows; weights are compared within
each output row, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mft_core.errors import ConfigError
from mft_core.masks.selection import Rows
from mft_core.masks.sites import Site
from mft_core.selectors.job import Choice, Job


def choose(job: Job) -> Choice:
    """Remove the least |W| · ‖x‖ of every output row.

    Raises:
        ConfigError: a matrix of experts is to be masked: what each expert is given cannot be observed.
    """
    check_inputs(job.sites)
    model = job.model()
    norms = _input_norms(job, model)
    scores = (_by_output(site, weight).abs().float() * norms[site.name] for site, weight in job.weights())
    masks = Rows(job.recipe.sparsity).masks(scores)
    return Choice(
        {site.name: _by_output(site, mask) for site, mask in zip(job.sites, masks, strict=True)}, scope="rows"
    )


def check_inputs(sites: Sequence[Site]) -> None:
    """Raise a ConfigError for matrices of experts: what each of them is given cannot be observed."""
    experts = [site.name for site in sites if site.index is not None]
    if experts:
        raise ConfigError(
            f"selector 'wanda': {experts[0]} belongs to experts whose inputs cannot be observed; choose modules "
            "without experts (e.g. 'attention'), or another selector."
        )


def _by_output(site: Site, matrix: Tensor) -> Tensor:
    """Turn a stored matrix into one with a row per output, or back."""
    return matrix.t().contiguous() if site.transposed else matrix


@torch.no_grad()
def _input_norms(job: Job, model: PreTrainedModel) -> dict[str, Tensor]:
    """Return ‖x_j‖ of every site's input features over the calibration tokens, float32 on the CPU."""
    squares: dict[str, Tensor] = {}
    attended = torch.empty(0)

    def observer(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def observe(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            tokens = inputs[0].reshape(*attended.shape, -1)[attended]
            total = tokens.double().square().sum(0)
            squares[name] = squares[name] + total if name in squares else total

        return observe

    hooks = [
        model.get_submodule(site.parameter.removesuffix(".weight")).register_forward_pre_hook(observer(site.name))
        for site in job.sites
    ]
    try:
        for batch in job.reported(job.calibration()):
            attended = batch["attention_mask"].bool().to(model.device)
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total.sqrt().float().cpu() for name, total in squares.items()}
