"""Where a mask can lie: the linear weights of a Hugging Face decoder's layers.

Sites are found in the model's own modules, never by model type: the list of decoder layers, and inside each layer the
matrices whose names `_ROLES` knows. A further family is at most a further word in that table. Routers, norms and
whatever else has another name are never masked. A model on the meta device will do, so sites are known before any
weight is read. Used by the stage `learn-mask`, and before compute to refuse what cannot be masked."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mft_core.errors import ConfigError, did_you_mean
from mft_core.layers import format_layers
from mft_core.recipes import CLASSES, Modules, SiteClass

_PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ATTENTION = r"(?:self_attn|self_attention|attention|attn|attn\.attention)\."
_MLP = r"(?:(?:mlp|mlp_block|feed_forward|ffn)\.(?:shared_experts?\.)?)?"
_EXPERTS = r"(?:mlp|feed_forward|block_sparse_moe)\.experts\."
_ROLES: dict[str, tuple[SiteClass, str, str]] = {
    "q": ("attention", _ATTENTION, "q_proj"),
    "k": ("attention", _ATTENTION, "k_proj"),
    "v": ("attention", _ATTENTION, "v_proj"),
    "o": ("attention", _ATTENTION, "o_proj|out_proj|dense|c_proj"),
    "qkv": ("attention", _ATTENTION, "qkv_proj|query_key_value|c_attn|Wqkv"),  # fused, and masked as one matrix
    # latent attention (DeepSeek): down to the latent, up to the heads
    "q-down": ("attention", _ATTENTION, "q_a_proj"),
    "q-up": ("attention", _ATTENTION, "q_b_proj"),
    "kv-down": ("attention", _ATTENTION, "kv_a_proj_with_mqa"),
    "kv-up": ("attention", _ATTENTION, "kv_b_proj"),
    "gate": ("mlp", _MLP, "gate_proj|w1"),
    "up": ("mlp", _MLP, "up_proj|fc1|c_fc|dense_h_to_4h|fc_in|w3"),
    "down": ("mlp", _MLP, "down_proj|fc2|c_proj|dense_4h_to_h|fc_out|w2"),
    "gate-up": ("mlp", _MLP, "gate_up_proj"),
    "expert-gate-up": ("mlp", _EXPERTS, "gate_up_proj"),
    "expert-gate": ("mlp", _EXPERTS, "gate_proj"),
    "expert-up": ("mlp", _EXPERTS, "up_proj"),
    "expert-down": ("mlp", _EXPERTS, "down_proj"),
}
"""by role: class, the block inside a layer, and the names that matrices have there"""
_PATTERNS: tuple[tuple[re.Pattern[str], str, SiteClass], ...] = tuple(
    (re.compile(f"{block}(?:{names})"), role, kind) for role, (kind, block, names) in _ROLES.items()
)
_KNOWN = tuple(dict.fromkeys(name for _, _, names in _ROLES.values() for name in names.split("|")))


@dataclass(frozen=True)
class Site:
    """One maskable matrix.

    Attributes:
        name: unique; the parameter's, with `[i]` behind it for matrix i of a parameter that holds several.
        layer: index of the decoder layer.
        role: what the matrix computes: q, k, v, o, gate, up, down; qkv and gate-up where a family fuses them; expert-…
            for one expert of a mixture.
        kind: 'attention' or 'mlp'.
        module: name of the module inside its layer, as PEFT's `target_modules` would name it: the last part, or all of
            it where the last part alone would name other matrices too (GPT-2's `attn.c_proj` and `mlp.c_proj`).
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

    @property
    def path(self) -> str:
        """Name of the matrix inside its layer, such as `self_attn.q_proj`; all experts of a layer share one."""
        return self.parameter.split(f".{self.layer}.", 1)[1].removesuffix(".weight")

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
    sites = [site for index, layer in enumerate(layers) for site in _layer_sites(f"{prefix}.{index}.", index, layer)]
    if not sites:
        raise ConfigError(
            f"{type(model).__name__}: no maskable layer matched; known matrix names are {', '.join(_KNOWN)}."
        )
    _check_untied(model, sites)
    return _unambiguous(sites)


def choose_sites(sites: Iterable[Site], layers: Iterable[int], modules: Modules) -> list[Site]:
    """Return the sites in these layers that `modules` names, keeping their order.

    Args:
        modules: 'attention', 'mlp', 'both', or shell patterns of `Site.path` separated by commas (`mlp.*`); a pattern
            without a dot means the last part of the path (`q_proj`).

    Raises:
        ConfigError: a class that was asked for has no site in some of the layers, or a pattern matches none.
    """
    layers = set(layers)
    there = [site for site in sites if site.layer in layers]
    if modules in CLASSES:
        wanted = {"attention", "mlp"} if modules == "both" else {modules}
        for kind in sorted(wanted):
            bare = layers - {site.layer for site in there if site.kind == kind}
            if bare:
                raise ConfigError(
                    f"modules = '{modules}': no maskable layer matched: no known {kind} matrix in layers "
                    f"{format_layers(tuple(bare))} of this model; known names are {', '.join(_KNOWN)}."
                )
        return [site for site in there if site.kind in wanted]
    patterns = [part.strip() for part in modules.split(",")]
    for pattern in patterns:
        if not any(_matches(site, pattern) for site in there):
            paths = list(dict.fromkeys(site.path for site in there))
            near = did_you_mean(pattern, [*paths, *(path.rsplit(".", 1)[-1] for path in paths)])
            raise ConfigError(
                f"modules = '{modules}': no matrix in layers {format_layers(tuple(layers))} matches '{pattern}'.{near} "
                f"Valid: attention, mlp, both, or patterns of {', '.join(paths)}."
            )
    return [site for site in there if any(_matches(site, pattern) for pattern in patterns)]


def n_layers(model: nn.Module) -> int:
    """Return the number of decoder layers."""
    return len(_decoder_layers(model)[1])


def layers_below(model: nn.Module, sites: Iterable[Site]) -> list[nn.Module]:
    """Return the decoder layers below all of these matrices: whatever is put there, they compute the same."""
    return list(_decoder_layers(model)[1])[: min(site.layer for site in sites)]


def _matches(site: Site, pattern: str) -> bool:
    path = site.path if "." in pattern else site.path.rsplit(".", 1)[-1]
    return fnmatchcase(path, pattern)


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the decoder's layer list and its name: the one ModuleList as long as the configuration says.

    Looks in the language decoder alone, where a model has towers for images or sound beside it."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False) or not hasattr(model, "get_decoder"):
        raise ConfigError(f"{type(model).__name__} is not a decoder; give a causal language model.")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{type(model).__name__} is quantised; masks need the plain checkpoint it was made from.")
    expected = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]  # has it, see above
    prefix = next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")
    lists = [
        (prefix + name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == expected
    ]
    found = [entry for entry in lists if not any(entry[0].startswith(f"{name}.") for name, _ in lists)]
    if len(found) != 1:
        raise ConfigError(
            f"{type(model).__name__} is not a decoder that masks know: {len(found)} lists of {expected} layers, "
            "where exactly one is expected."
        )
    return found[0]


def _layer_sites(prefix: str, index: int, layer: nn.Module) -> Iterator[Site]:
    """Yield the sites of one layer: linear layers, and experts that lie in one parameter (experts, out, in)."""
    for name, module in layer.named_modules():
        if known := _role(name):
            parameter = f"{prefix}{name}.weight"
            _check_linear(parameter, module)
            last = name.rsplit(".", 1)[-1]
            yield Site(parameter, index, *known, last, parameter, transposed=isinstance(module, Conv1D))
            continue
        for last, weights in module.named_parameters(recurse=False):
            known = _role(f"{name}.{last}")
            if known and weights.ndim == 3:
                parameter = f"{prefix}{name}.{last}"
                _check_dtype(parameter, module, weights)
                whole = Site(parameter, index, *known, last, parameter, transposed=_experts_transposed(module))
                yield from (replace(whole, name=f"{parameter}[{i}]", index=i) for i in range(len(weights)))


def _role(name: str) -> tuple[str, SiteClass] | None:
    return next(((role, kind) for pattern, role, kind in _PATTERNS if pattern.fullmatch(name)), None)


def _experts_transposed(experts: nn.Module) -> bool:
    """Whether experts are stored (in, out): as their class declares, or by the width of what goes in."""
    declared = getattr(experts, "is_transposed", None)
    if declared is not None:
        return bool(declared)
    return experts.get_parameter("gate_up_proj").shape[1] == experts.hidden_size


def _check_linear(name: str, module: nn.Module) -> None:
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear | Conv1D) or not isinstance(weight, Tensor):
        raise ConfigError(
            f"{name}: {type(module).__name__} is not a plain linear layer (quantised?); load the plain checkpoint."
        )
    _check_dtype(name, module, weight)


def _check_dtype(name: str, module: nn.Module, weight: Tensor) -> None:
    """Refuse quantised weights: by their type, or by the tensor class that hides it (bitsandbytes, torchao)."""
    if weight.dtype not in _PLAIN or type(weight) is not nn.Parameter:
        raise ConfigError(
            f"{name}: {type(module).__name__} of {weight.dtype} is not a plain linear layer (quantised?); "
            "load the plain checkpoint."
        )


def _check_untied(model: nn.Module, sites: Sequence[Site]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners = Counter(id(parameter) for parameter in parameters.values())
    for site in sites:
        if owners[id(parameters[site.parameter])] > 1:
            raise ConfigError(f"{site.name} is tied: other layers share this weight, a mask would reach them too.")


def _unambiguous(sites: Sequence[Site]) -> list[Site]:
    """Give the whole path as `module` to sites whose last part names several matrices of one layer."""
    paths: dict[tuple[int, str], set[str]] = defaultdict(set)
    for site in sites:
        paths[site.layer, site.module].add(site.path)
    shared = {module for (_, module), names in paths.items() if len(names) > 1}
    return [replace(site, module=site.path) if site.module in shared else site for site in sites]
