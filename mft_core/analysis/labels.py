"""What the masks of one analysis are called in its tables and figures: the method and what tells the variants apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mft_core.statistics.tables import method_label, plain, settings

Row = Mapping[str, Any]


class Labels:
    """Short names, of masks or of variants (all seeds of one), from the columns that describe them."""

    def __init__(self, described: Sequence[Row]) -> None:
        """Take the columns of all masks: only what varies among them is in a name, and the sparsity."""
        self.described = described
        columns = ("domain", "layers", "modules", *settings(described))
        self._varied = [key for key in columns if len({one.get(key) for one in described}) > 1]

    def setting(self, row: Row) -> str:
        """Return what tells variants of one method apart, e.g. '10%' or '10% layers 4-7'."""
        words = [plain("sparsity", row["sparsity"])]
        for key in self._varied:
            value = row.get(key)
            if value is not None:
                short = "" if key in ("domain", "modules") else key.rsplit(".", 1)[-1].replace("_", " ") + " "
                words.append(short + plain(key, value))
        return " ".join(words)

    def variant(self, row: Row) -> str:
        """Return e.g. 'MFT 10%'."""
        return f"{method_label(row['method'])} {self.setting(row)}"

    def mask(self, row: Row) -> str:
        """Return e.g. 'MFT 10% seed 0'."""
        seed = row.get("seed")
        return self.variant(row) + ("" if seed is None else f" seed {seed}")
