"""Where a mask can lie: the linear weights of a Hugging Face decoder's layers.

Sites are found in the model's own modules, never by model type: the list of decoder layers, and inside each
layer the `nn.Linear`s whose names stand in `_ROLES`. A further family is a further row of that table. A model
on the meta device will do, so sites are known before any weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mft_core.errors import ConfigError
from mft_core.layers import format_layers
from mft_core.recipes import Modules

SiteClass = Literal["attention", "mlp"]

_ROLES: dict[str, tuple[str, SiteClass]] = {
    # Llama, Mistral, Qwen, Gemma, OLMo, SmolLM ...
    "q_proj": ("q", "attention"),
    "k_proj": ("k", "attention"),
    "v_proj": ("v", "attention"),
    "o_proj": ("o", "attention"),
    "gate_proj": ("gate", "mlp"),
    "up_proj": ("up", "mlp"),
    "down_proj": ("down", "mlp"),
    # OPT
    "out_proj": ("o", "attention"),
    "fc1": ("up", "mlp"),
    "fc2": ("down", "mlp"),
    # GPT-NeoX, Pythia: q, k and v are one matrix, and are masked as one
    "query_key_value": ("qkv", "attention"),
    "attention.dense": ("o", "attention"),
    "dense_h_to_4h": ("up", "mlp"),
    "dense_4h_to_h": ("down", "mlp"),
}


@dataclass(frozen=True)
class Site:
    """One maskable matrix.

    Attributes:
        name: unique; the parameter's, with `[i]` behind it for matrix i of a parameter that holds several.
        layer: index of the decoder layer.
        role: what the matrix computes: q, k, v, o, gate, up, down; qkv where a family fuses them.
        kind: 'attention' or 'mlp'.
        module: name of the module inside its layer, as PEFT's `target_modules` would name it.
        parameter: name of the parameter that holds the matrix.
        index: of the matrix in a parameter of shape (matrices, out, in); None where the parameter is the matrix.
        transposed: the matrix is stored (in, out), as GPT-2's `Conv1D` does.
    """

    name: str
    layer: int
    role: str
    kind: SiteClass
    module: str
    parameter: str
    index: int | None = None
    transposed: bool = False

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the matrix, a view into its parameter."""
        whole = parameters[self.parameter]
        return whole if self.index is None else whole[self.index]


def find_sites(model: nn.Module) -> list[Site]:
    """List the maskable matrices of a decoder, by layer and then in the model's own order.

    Raises:
        ConfigError: not a decoder, quantised, weights shared among sites, or no matrix with a known name.
    """
    prefix, layers = _decoder_layers(model)
    sites = []
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            role = _role(name)
            if role is None:
                continue
            parameter = f"{prefix}.{index}.{name}.weight"
            site = Site(parameter, index, *role, name.rsplit(".", 1)[-1], parameter)
            _check_linear(site, module)
            sites.append(site)
    if not sites:
        raise ConfigError(
            f"{type(model).__name__}: no maskable layer matched; known matrix names are {', '.join(_ROLES)}."
        )
    _check_untied(model, sites)
    return sites


def choose_sites(sites: Iterable[Site], layers: Iterable[int], modules: Modules) -> list[Site]:
    """Return the sites in these layers and of this class, keeping their order.

    Raises:
        ConfigError: a class that was asked for has no site in some of the layers.
    """
    wanted = {"attention", "mlp"} if modules == "both" else {modules}
    layers = set(layers)
    chosen = [site for site in sites if site.layer in layers and site.kind in wanted]
    for kind in sorted(wanted):
        bare = layers - {site.layer for site in chosen if site.kind == kind}
        if bare:
            raise ConfigError(
                f"modules = '{modules}': no maskable layer matched: no known {kind} matrix in layers "
                f"{format_layers(tuple(bare))} of this model; known names are {', '.join(_ROLES)}."
            )
    return chosen


def n_layers(model: nn.Module) -> int:
    """Return the number of decoder layers."""
    return len(_decoder_layers(model)[1])


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the decoder's layer list and its name: the one ModuleList as long as the configuration says."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{type(model).__name__} is not a decoder; give a causal language model.")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{type(model).__name__} is quantised; masks need the plain checkpoint it was made from.")
    expected = config.get_text_config(decoder=True).num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == expected and name.count(".layers.") == 0
    ]
    if len(found) != 1:
        raise ConfigError(
            f"{type(model).__name__} is not a decoder that masks know: {len(found)} lists of {expected} layers, "
            "where exactly one is expected."
        )
    return found[0]


def _role(name: str) -> tuple[str, SiteClass] | None:
    parts = name.split(".")
    return _ROLES.get(".".join(parts[-2:])) or _ROLES.get(parts[-1])


def _check_linear(site: Site, module: nn.Module) -> None:
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or weight is None or not weight.dtype.is_floating_point:
        kind = f"{type(module).__name__} of {weight.dtype}" if weight is not None else type(module).__name__
        raise ConfigError(f"{site.name}: {kind} is not a plain linear layer (quantised?); load the plain checkpoint.")


def _check_untied(model: nn.Module, sites: list[Site]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners = Counter(id(parameter) for parameter in parameters.values())
    for site in sites:
        if owners[id(parameters[site.name])] > 1:
            raise ConfigError(f"{site.name} is tied: other layers share this weight, a mask would reach them too.")
