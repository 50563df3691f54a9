"""Planned and measured ablations, kept in a file so that an interrupted run can resume."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from prunekit.digests import digest_of
from prunekit.discovery.groups import CoupledGroup
from prunekit.errors import PrunekitError
from prunekit.knowledge.measurement_files import plain
from prunekit.knowledge.question_spans import EvaluationSet, Runner
from prunekit.knowledge.result import KnowledgeDistribution

Outcomes = tuple[np.ndarray, np.ndarray]  # correctness and loss, (n_questions,) each
Key = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class PlannedAblation:
    """Units of a group to ablate, and their row in the table."""

    group: CoupledGroup
    units: tuple[int, ...]
    told: dict[str, Any]

    @property
    def key(self) -> Key:
        """Equal for rows that share one measurement."""
        return self.group.name, self.units


class Record:
    """The measurements of all ablations so far.

    Attributes:
        plan: one per row of the result; rows with the same units share a measurement.
        measured: the measurements so far.
    """

    def __init__(
        self, plan: Sequence[PlannedAblation], questions: EvaluationSet, path: str | Path | None, mark: str
    ) -> None:
        """Resumes from the file, if it exists.

        Raises:
            PrunekitError: the file belongs to another run or is of another kind, or it cannot be written.
        """
        self.plan, self.measured = plan, dict[Key, Outcomes]()
        self._questions, self._path, self._fingerprint, self._saved = (
            questions,
            None if path is None else Path(path),
            mark,
            0,
        )
        self._dense: Outcomes | None = None
        self._packed = self._resumed = False
        if self._path is not None:
            _check_path(self._path)
            if self._path.exists():
                self._read(self._path)

    def missing(self) -> list[PlannedAblation]:
        """Ablations that are not measured yet."""
        return [row for row in self.plan if row.key not in self.measured]

    def begin(self, dense: Outcomes, runner: Runner) -> None:
        """Store the dense model's measurement, unless an earlier run has, and how the model is run."""
        self._dense = self._dense or dense
        self._packed, self._resumed = runner.packed, runner.resumed

    def result(self) -> KnowledgeDistribution:
        """The result of all measured rows."""
        rows = [row for row in self.plan if row.key in self.measured]
        assert self._dense is not None  # measured first
        ablations = pd.DataFrame([{**row.told, "units": [*row.units]} for row in rows], columns=self._columns())
        empty = np.empty((0, len(self._questions.table)))
        hit, loss = (np.stack([self.measured[row.key][i] for row in rows]) if rows else empty for i in (0, 1))
        return KnowledgeDistribution(
            ablations, self._questions.table, hit.astype(bool), loss, *self._dense, self._packed, self._resumed,
            len(self.plan) - len(rows), self._fingerprint,
        )  # fmt: skip

    def save(self) -> None:
        """Write the file if a path is given and there are new measurements."""
        if self._path is not None and len(self.measured) > self._saved:
            self.result().save(self._path)
            self._saved = len(self.measured)

    def _columns(self) -> list[str]:
        return [*self.plan[0].told, "units"]

    def _read(self, path: Path) -> None:
        before = KnowledgeDistribution.load(path)
        if before.fingerprint != self._fingerprint:
            raise PrunekitError(
                f"{str(path)!r} belongs to another run (different model, ablations or questions); give another path, "
                "or "
                "delete the file to start again"
            )
        if len(before.dense_hit) != len(self._questions.table):
            raise PrunekitError(f"{str(path)!r} has measurements of other questions; delete the file to start again")
        keys = zip(before.ablations["group"], before.ablations["units"], strict=True)
        self.measured = {(name, (*units,)): (before.hit[i], before.loss[i]) for i, (name, units) in enumerate(keys)}
        self._dense, self._saved = (before.dense_hit, before.dense_loss), len(self.measured)
        self._packed, self._resumed = before.packed, before.resumed


def _check_path(path: Path) -> None:
    if path.suffix != ".safetensors" or not path.parent.is_dir():
        raise PrunekitError(f"path={str(path)!r}; give a .safetensors file in an existing folder")


def fingerprint(model: nn.Module, questions: EvaluationSet, plan: Sequence[PlannedAblation]) -> str:
    """A digest of the weights, questions and ablations."""
    found = digest_of(model)
    asked: dict[str, Any] = {
        "spans": [(span.start, span.tokens) for span in questions.spans],
        "questions": plain(questions.table),
        "places": questions.places.tolist(),
        "lengths": questions.lengths.tolist(),
        "answers": questions.answers.tolist(),
        "plan": [(row.told, row.units) for row in plan],
    }
    found.update(json.dumps(asked).encode())
    return found.hexdigest()
