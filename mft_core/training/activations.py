"""Recomputing activations in the backward pass instead of keeping them, for models that would not fit otherwise.

Of every layer only the input is kept; the time is that of one more forward pass; no number changes. Used by the stages
that train, where `Runtime.gradient_checkpointing` says so.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from mft_core.errors import ConfigError


def recompute_activations(model: PreTrainedModel, *, noise: bool) -> None:
    """Have the layers of a model recompute their activations while it is in training mode.

    Layers below the lowest trained one keep nothing and are not computed again.

    Args:
        noise: the layers draw random numbers (dropout), and have to draw the same ones again. Without it torch's
            generators, which other threads may be using, are left alone.

    Raises:
        ConfigError: transformers cannot do it for this family.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"gradient_checkpointing = true: {type(model).__name__} has no such mode; set it to false.")
    model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": noise})
    model.disable_input_require_grads()  # else transformers has frozen lower layers take part in the backward pass
