"""Mask Fine-Tuning: learn which weights of a fine-tuned model to remove, merge the mask, measure what it changed.

    import mft_core as mft

    tuner = mft.MaskTuner(model, sparsity=0.1, layers="last:4", lr=1e-3)   # any Hugging Face decoder
    for batch in loader:
        model(**batch).loss.backward()
        tuner.step()
    mft.save_mask(tuner.mask(), "mask")
    mft.merge("ft", "mask", "merged")                                      # an ordinary checkpoint
    print(mft.compare(mft.evaluate("merged", "gsm8k"), mft.evaluate("ft", "gsm8k")))

What stands in `__all__` is for everybody; the rooms below it are the science, and know neither Prefect nor MLflow.
Importing this package imports neither torch nor transformers: a name brings its module when it is first used.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mft_core.errors import ConfigError, StageError
    from mft_core.evaluation.checkpoints import compare, evaluate
    from mft_core.evaluation.outcomes import Evaluation
    from mft_core.masks.mask_callback import MaskCallback
    from mft_core.masks.mask_figures import where_it_cuts
    from mft_core.masks.mask_file import Mask, load_mask, save_mask
    from mft_core.masks.masking import MaskTuner
    from mft_core.masks.merge import merge, unmerge
    from mft_core.recipes import Runtime
    from mft_core.statistics.comparison import Comparison

__all__ = [
    "Comparison", "ConfigError", "Evaluation", "Mask", "MaskCallback", "MaskTuner", "Runtime", "StageError", "compare",
    "evaluate", "load_mask", "merge", "save_mask", "unmerge", "where_it_cuts",
]  # fmt: skip
_HOMES = {
    "errors": ("ConfigError", "StageError"),
    "evaluation.checkpoints": ("compare", "evaluate"),
    "evaluation.outcomes": ("Evaluation",),
    "masks.mask_callback": ("MaskCallback",),
    "masks.mask_figures": ("where_it_cuts",),
    "masks.mask_file": ("Mask", "load_mask", "save_mask"),
    "masks.masking": ("MaskTuner",),
    "masks.merge": ("merge", "unmerge"),
    "recipes": ("Runtime",),
    "statistics.comparison": ("Comparison",),
}

for _name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which warns of what it does not need
    logging.getLogger(_name).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"mft_core.{module}"), name)
    raise AttributeError(f"module 'mft_core' has no attribute '{name}'; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
