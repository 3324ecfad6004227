"""The table of methods: what a study can compare, a row each, and all that is to be known of a method by its name.

Names, labels, looks in figures, the settings that a method uses, and who chooses its mask all derive from here; a
method that masks has its selector as a file of that name in `mft_core.selectors`. Anybody may import this, planning
too: no torch. How to add a row: CONTRIBUTING.md, "Add a method".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

Role = Literal["reference", "control", "treatment"]
_OF_ALL = frozenset({"precision", "engine", "engine_version", "judge", "model", "benchmarks"})
"""the sections of a setup that every method uses"""


@dataclass(frozen=True)
class Method:
    """One method. Settings and sections are those of `pipelines.config.setup.Setup`."""

    name: str
    label: str
    """in tables and figures"""
    role: Role
    """'reference': no figure of gains draws it, since the gain of FFT is zero and the base's is not the question;
    'control': stands beside what is under study, the treatments"""
    sections: frozenset[str]
    """besides those that all use"""
    seeded: bool = True
    starts_from: Literal["base", "fft"] = "fft"
    """the model that it changes: the base, or the one that `fine_tune` makes of it"""
    color: str = "#6E6E6E"
    marker: str = "d"
    selector: str | None = None
    """who chooses its mask, a file of `mft_core.selectors`; None: it does not mask"""
    trained: bool = False
    """the selector trains scores, by `mask.training` from `mask.score_init`"""
    observes: Literal["inputs", "gradients"] | None = None
    """what the selector looks at in the model while it reads `mask.calibration_rows` sequences"""
    scopes: frozenset[str] = frozenset({"local", "global"})
    """of `mask.scope`, those that the selector can have"""
    granular: bool = False
    """it can remove whole rows or columns (`mask.granularity`)"""
    rewinds: bool = False
    """masked entries go back to the base model's values, instead of to zero"""
    rescales: bool = False
    """of one that rewinds: kept entries are moved away from the base by as much as makes up for the others"""
    matches: str | None = None
    """the method that makes, of the same settings, the mask that the selector is given as the input `mask`"""

    @property
    def sees_base(self) -> bool:
        """Whether the base model is needed beside the fine-tuned one, as the input `base` of what makes it."""
        return self.rewinds or self.matches is not None or "interpolation" in self.sections

    @property
    def needs_base(self) -> bool:
        """Whether it cannot be had where nothing is known but the fine-tuned model."""
        return self.sees_base or (self.starts_from == "base" and self.name != "fft")

    @property
    def needs_fine_tuning(self) -> bool:
        """Whether it is made of states of the fine-tuning, and cannot be had of a model that is fine-tuned already."""
        return "averaged" in self.sections


_DATA = frozenset({"data", "fine_tune"})
_LORA = _DATA | {"lora"}
_MASK = _DATA | {"mask"}
_LEARNED = frozenset({"local", "global", "global-threshold"})
_ROWS = (
    Method("base", "base", "reference", frozenset(), seeded=False, starts_from="base"),
    Method("fft", "FFT", "reference", _DATA, seeded=False, starts_from="base"),
    Method("existing", "existing", "treatment", _DATA | {"existing"}, seeded=False, color="#117733", marker="X"),
    Method("wise-ft", "WiSE-FT", "treatment", _DATA | {"interpolation"}, seeded=False, color="#332288", marker="d"),
    Method(
        "checkpoint-average", "average of checkpoints", "treatment", _DATA | {"averaged"}, seeded=False,
        color="#6699CC", marker="1",
    ),
    Method(
        "fft-again", "FFT, measured again", "control", _DATA | {"answered_together"}, seeded=False, color="#BBBBBB",
        marker="2",
    ),
    Method("continued-fft", "continued FFT", "treatment", _DATA | {"continued"}, color="#CC79A7", marker=">"),
    Method("lora", "LoRA", "treatment", _LORA, starts_from="base", marker="h"),  # `fine_tune` is what it stands beside
    Method("shira", "SHiRA", "treatment", _LORA, starts_from="base", color="#117799", marker="+"),
    Method("continued-lora", "LoRA on FFT", "treatment", _LORA, color="#9A9A9A", marker="p"),
    Method(
        "mft", "MFT", "treatment", _MASK, color="#0072B2", marker="o", selector="learned", trained=True, scopes=_LEARNED
    ),
    Method("mft-soft", "MFT, soft", "treatment", _MASK, color="#000000", marker="<", selector="soft", trained=True),
    Method(
        "rewind", "MFT, rewound", "treatment", _MASK, color="#8C510A", marker="P", selector="rewind", trained=True,
        scopes=_LEARNED, rewinds=True,
    ),
    Method(
        "mft-base", "MFT of the base", "treatment", _MASK, starts_from="base", color="#999933", marker="x",
        selector="learned", trained=True, scopes=_LEARNED,
    ),
    Method("random", "random mask", "control", _MASK, color="#E69F00", marker="s", selector="random", granular=True),
    Method(
        "magnitude", "magnitude mask", "control", _MASK, color="#009E73", marker="^", selector="magnitude",
        seeded=False, granular=True,
    ),
    Method(
        "matched-random", "matched random mask", "control", _MASK, color="#F0C040", marker="8", selector="matched",
        scopes=_LEARNED, matches="mft",
    ),
    Method(
        "delta-magnitude", "smallest updates undone", "control", _MASK, color="#882255", marker="*",
        selector="delta_magnitude", seeded=False, rewinds=True,
    ),
    Method(
        "dare", "DARE", "control", _MASK, color="#AA4499", marker="H", selector="dare", scopes=frozenset({"local"}),
        rewinds=True, rescales=True,
    ),
    Method(
        "wanda", "Wanda mask", "control", _MASK, color="#D55E00", marker="D", selector="wanda", observes="inputs",
        scopes=frozenset({"local"}),
    ),
    Method(
        "movement", "movement mask", "control", _MASK, color="#56B4E9", marker="v", selector="movement",
        observes="gradients",
    ),
)  # fmt: skip
METHODS: Mapping[str, Method] = {row.name: row for row in _ROWS}
SELECTORS: Mapping[str, Method] = {row.selector: row for row in _ROWS if row.selector and row.starts_from == "fft"}
"""the method of each selector; what masks the base has the selector of one that masks the fine-tuned model"""
TRAINED = frozenset(name for name, row in SELECTORS.items() if row.trained)
"""selectors that train scores, and so have `training` and `score_init`"""
CALIBRATED = frozenset(name for name, row in SELECTORS.items() if row.observes)
"""selectors that look at some training sequences, and so have `calibration_rows`"""
REFERENCES = frozenset(row.name for row in _ROWS if row.role == "reference")
CONTROLS = frozenset(row.name for row in _ROWS if row.role == "control")
if TYPE_CHECKING:
    MethodName = str
    TrainedMethodName = str
    Selector = str
else:  # so pydantic refuses other names, and JSON schemas show a choice
    MethodName, Selector = Literal[tuple(METHODS)], Literal[tuple(SELECTORS)]
    TrainedMethodName = Literal[tuple(row.name for row in _ROWS if row.trained)]
OTHER = Method("", "", "treatment", frozenset())
"""how a method is drawn that is no longer in the table"""


def uses(method: str, key: str) -> bool:
    """Whether a setting, written as `section.name`, makes a difference to the variants of a method."""
    row = METHODS[method]
    section, _, name = key.partition(".")
    if section == "seed":
        return row.seeded
    if section == "mask" and row.matches:
        return uses(row.matches, key)
    if section == "mask" and row.selector:
        looked_at = {
            **dict.fromkeys(("training", "score_init"), row.trained),
            "calibration_rows": row.observes is not None,
            **dict.fromkeys(("domain", "data", "fraction"), row.trained or row.observes is not None),
            **dict.fromkeys(("scope", "min_kept"), len(row.scopes) > 1),
            "granularity": row.granular,
        }
        return looked_at.get(name.split(".")[0], True)
    if method == "shira" and section == "lora":
        return name not in ("alpha", "dropout")  # which belong to low-rank factors
    return section in row.sections | _OF_ALL


@dataclass(frozen=True)
class Contrast:
    """A treatment and what it is compared with, as a study declares them: `mft - magnitude`.

    Each side is a method's name; further words, as they stand in a variant's name (`mft sparsity=0.1`), choose among
    several variants of it.
    """

    treatment: tuple[str, ...]
    control: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Contrast:
        """Read `treatment - control`.

        Raises:
            ValueError: it is not of that form.
        """
        sides = [tuple(side.split()) for side in text.split(" - ")]
        if len(sides) != 2 or not all(sides) or sides[0] == sides[1]:
            raise ValueError(f"contrast '{text}': write treatment - control, such as mft - fft")
        return cls(sides[0], sides[1])

    def pairs(self, treated: Mapping[str, Any], control: Mapping[str, Any]) -> bool:
        """Whether two variants, given by their columns, are its sides, alike but for the method and what both name."""
        for side, columns in ((self.treatment, treated), (self.control, control)):
            if columns["method"] != side[0] or not set(side[1:]) <= set(columns["variant"].split()):
                return False
        named = set.intersection(
            *({word.partition("=")[0] for word in side} for side in (self.treatment, self.control))
        )
        apart = {"variant", "method", "seed", "replicate", *named}
        shared = [key for key in treated if key in control and key not in apart and key.split(".")[-1] not in named]
        return all(treated[key] == control[key] or None in (treated[key], control[key]) for key in shared)

    def __str__(self) -> str:
        return f"{' '.join(self.treatment)} - {' '.join(self.control)}"
