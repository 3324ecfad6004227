"""Where a mask comes from, a file each; all behind one call, `choose(job) -> Choice`.

| selector | score of a weight | source |
|---|---|---|
| learned | trained through the hard mask, straight-through | Mask Fine-Tuning, arXiv 2503.22764, section 3 |
| soft | trained through sigmoid gates that harden | Savarese et al. 2020, Continuous Sparsification |
| rewind | as learned, where masked entries go back to the base's values | arXiv 2509.16596 restores updates too |
| random | a uniform draw | control |
| matched | a draw within the deciles of abs(W) and abs(ΔW), as many as a learned mask removes there | control |
| dare | a uniform draw, rewound, and what is kept rescaled | Yu et al. 2024, DARE |
| delta_magnitude | abs(ΔW), rewound | TIES' trimming, Yadav et al. 2023 |
| magnitude | abs(W) | Han et al. 2015; the paper's L1 control |
| wanda | abs(W) · norm of the input feature | Sun et al. 2024, Wanda |
| movement | −W · dL/dW | Sanh et al. 2020, Movement Pruning; here at frozen weights |

A further selector is a further file, and the row of its method in `mft_core.methods`, which has the file's name. The
recipe's scope (`mft_core.masks.selection`) then says among which weights the least scores go.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

from mft_core import methods
from mft_core.selectors.job import Choice, Job

SELECTORS: Mapping[str, Callable[[Job], Choice]] = {
    name: importlib.import_module(f"mft_core.selectors.{name}").choose for name in methods.SELECTORS
}
