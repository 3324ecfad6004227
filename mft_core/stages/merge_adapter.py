"""Stage `merge-adapter`: an adapter that `peft` saved, added to the weights of its base, as an ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from mft_core.checkpoints.files import check_written, copy_files, load_model, read_config, save_model
from mft_core.errors import ConfigError, first_line
from mft_core.recipes import MergeAdapter
from mft_core.stage import StageContext
from mft_core.store.sources import parts


def run(recipe: MergeAdapter, inputs: Mapping[str, Path], out: Path, context: StageContext) -> dict[str, Any]:
    """Write `out/model`: the checkpoint `model` with `adapter` merged, in its dtype; the adapter's own tokenizer wins.

    Raises:
        ConfigError: the adapter does not fit the model, or is of a kind that cannot be merged.
        StageError: the merged checkpoint cannot be loaded.
    """
    base, adapter = inputs["model"], inputs["adapter"]
    dtype = read_config(base).dtype or torch.float32
    try:
        adapted: Any = PeftModel.from_pretrained(
            load_model(base, dtype, torch.device("cpu")), adapter, autocast_adapter_dtype=False, local_files_only=True
        )
        kind = str(adapted.peft_config[adapted.active_adapter].peft_type.value)
        merged = adapted.merge_and_unload(safe_merge=True)
    except ConfigError:
        raise
    except Exception as error:  # peft raises whatever its readers raise
        raise ConfigError(
            f"model = {adapter}: the adapter cannot be merged into {base} ({first_line(error)}). Is that the "
            "model that it was trained on? `base:` of the profile names another."
        ) from error
    save_model(merged, out / "model", dtype, base)
    copy_files(adapter, out / "model", parts("tokenizer", adapter))
    check_written(out / "model")
    return {"adapter": kind}
