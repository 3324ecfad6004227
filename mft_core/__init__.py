"""The science of Mask Fine-Tuning: masks, training, merging, evaluation, statistics, artifacts.

Knows neither Prefect nor MLflow and is pleasant in a notebook on its own. Importing this package is cheap:
torch and transformers are imported by the modules that compute, never here.
"""

import logging

for _name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which warns of what it does not need
    logging.getLogger(_name).setLevel(logging.ERROR)
