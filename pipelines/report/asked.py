"""What was asked for, as the user wrote it: study, profile, overrides, seeds. Makes its plans and the command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mft_core.store.artifacts import ArtifactStore
from pipelines.config.profile import load_profile
from pipelines.config.study import load_studies
from pipelines.plan.plan import Plan, make_plans
from pipelines.plan.preflight import checked_plans


@dataclass(frozen=True)
class Asked:
    """The arguments of a run or a report."""

    study: str
    """name or YAML file"""
    profile: str
    overrides: Sequence[str] = ()
    seeds: Sequence[int] | None = None
    replicates: int | None = None
    looks: Sequence[int] = ()
    """numbers of replicates at which it is declared to be read; this is one of them"""
    started_by: str | None = None
    """the command, where it is not `mft run`"""

    def plans(self, store: ArtifactStore, *, unpinned: bool = False) -> list[Plan]:
        """Plan it; `unpinned`: to be looked at, not run."""
        design = self.seeds, self.replicates, self.looks
        return make_plans(
            load_studies(self.study), load_profile(self.profile), store, self.overrides, *design, unpinned=unpinned
        )

    def checked_plans(self, rerun: Sequence[str] = ()) -> tuple[list[Plan], ArtifactStore]:
        """Plan it, and refuse all that can be known to fail before a server or a model is started."""
        design = self.seeds, rerun, self.replicates, self.looks
        return checked_plans(load_studies(self.study), load_profile(self.profile), self.overrides, *design)

    @property
    def command(self) -> str:
        """The command line that answers the same question."""
        if self.started_by:
            return self.started_by
        words = ["mft", "run", self.study, "--profile", self.profile]
        for text in self.overrides:
            words += ["--set", text]
        if self.seeds is not None:
            words += ["--seeds", ",".join(map(str, self.seeds))]
        if self.looks:
            words += ["--until", "decided", "--replicates", str(self.looks[-1])]
        elif self.replicates is not None:
            words += ["--replicates", str(self.replicates)]
        return shlex.join(words)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of a flow that does it."""
        return {
            "study": self.study,
            "profile": self.profile,
            "overrides": list(self.overrides),
            "seeds": self.seeds,
            "replicates": self.replicates,
        }

    def directory(self, store: ArtifactStore) -> Path:
        """Return where the pages lie unless the user says otherwise."""
        return store.home / "reports" / f"{Path(self.study).stem}-{Path(self.profile).stem}"
