"""Measures a knowledge distribution: ablates a group or unit at a time, evaluates the model, and keeps the results."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.calibration import check_finite
from prunekit.checks import Count, FilePath, Model, Tokenizer, checked
from prunekit.digests import digest_of
from prunekit.discovery.groups import CoupledGroup
from prunekit.errors import PrunekitError
from prunekit.evaluation.sequence_scores import require_finite
from prunekit.evaluation.standard_tasks import Tasks
from prunekit.importance.ablation import ablated
from prunekit.importance.scoring import groups_of_model
from prunekit.knowledge.measurement_files import plain
from prunekit.knowledge.question_spans import EvaluationSet, Runner, Texts, make_evaluation_set
from prunekit.knowledge.result import KnowledgeDistribution
from prunekit.models import evaluating
from prunekit.processes import check_alike, check_same_model, is_first, n_sharing, of_first, own_share, summed
from prunekit.pruning.plan_options import check_scores

POSITIONS = 1024  # per forward pass; more is slower on a CPU, since less fits into its cache
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
        self._questions, self._path = questions, None if path is None else Path(path)
        self._fingerprint, self._saved = mark, 0
        self._told: dict[str, Any] = {}  # of the dense model, and how the model is run: fields of the result
        if self._path is not None:
            if self._path.suffix != ".safetensors" or not self._path.parent.is_dir():
                raise PrunekitError(f"path={str(path)!r}; give a .safetensors file in an existing folder")
            if self._path.exists():
                self._read(self._path)

    def missing(self) -> list[PlannedAblation]:
        """Ablations that are not measured yet."""
        return [row for row in self.plan if row.key not in self.measured]

    def begin(self, dense: Outcomes, runner: Runner) -> None:
        """Store the dense model's measurement, unless an earlier run has, and how the model is run."""
        how = {"packed": runner.packed, "resumed": runner.resumed}
        self._told = {"dense_hit": dense[0], "dense_loss": dense[1]} | self._told | how

    def result(self) -> KnowledgeDistribution:
        """The result of all measured rows."""
        rows = [row for row in self.plan if row.key in self.measured]
        columns = [*self.plan[0].told, "units"]
        ablations = pd.DataFrame([{**row.told, "units": [*row.units]} for row in rows], columns=columns)
        empty = np.empty((0, len(self._questions.table)))
        hit, loss = (np.stack([self.measured[row.key][i] for row in rows]) if rows else empty for i in (0, 1))
        return KnowledgeDistribution(
            ablations, self._questions.table, hit.astype(bool), loss, **self._told,
            unfinished=len(self.plan) - len(rows), fingerprint=self._fingerprint,
        )  # fmt: skip

    def save(self) -> None:
        """Write the file if a path is given and there are new measurements."""
        if self._path is not None and is_first() and len(self.measured) > self._saved:
            self.result().save(self._path)
            self._saved = len(self.measured)

    def _read(self, path: Path) -> None:
        before = KnowledgeDistribution.load(path)
        if before.fingerprint != self._fingerprint:
            raise PrunekitError(
                f"{str(path)!r} belongs to another run (different model, ablations or questions); give another path, "
                "or delete the file to start again"
            )
        if len(before.dense_hit) != len(self._questions.table):
            raise PrunekitError(f"{str(path)!r} has measurements of other questions; delete the file to start again")
        keys = zip(before.ablations["group"], before.ablations["units"], strict=True)
        self.measured = {(name, (*units,)): (before.hit[i], before.loss[i]) for i, (name, units) in enumerate(keys)}
        self._told = {name: getattr(before, name) for name in ("dense_hit", "dense_loss", "packed", "resumed")}
        self._saved = len(self.measured)


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


@checked
def knowledge_distribution(
    model: Model,
    tokenizer: Tokenizer | None,
    groups: Iterable[CoupledGroup],
    scores: Mapping[str, Tensor],
    *,
    ratios: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    tasks: Tasks | None = None,
    text: Texts | None = None,
    limit: Count | None = None,
    data_dir: FilePath | None = None,
    path: FilePath | None = None,
    tokens_a_batch: Count = POSITIONS,
) -> KnowledgeDistribution:
    """Measures how each task and text domain changes when each group is ablated alone, at several ratios.

    The units with the lowest scores are ablated first. Layers below the ablated one are not run again, and shared
    prefixes are run once, if a test shows that this model then gives the same likelihoods.

    Args:
        model: a causal LM of `transformers`; it is unchanged afterwards, also when interrupted.
        tokenizer: the model's own tokenizer.
        groups: groups discovered in this model.
        scores: group name → (n_units,), as `score` returns them. Groups of one unit (blocks, layers) need none.
        ratios: fractions of a group's units, in (0, 1]; at least one unit is ablated. Groups of one unit are
            ablated once, at ratio 1.
        tasks: tasks or names of published ones, as for `zero_shot` (MMLU's domains are its subjects); where no
            text is given either, by default the embedded world's, for its tokenizer.
        text: anything that `measure_perplexity` takes, or name of a domain → such a text. It is cut into windows of
            128 tokens (or what the model takes) that do not overlap, BOS first in each where the tokenizer adds it.
        limit: number of questions of each task.
        data_dir: the folder from which published tasks are read, as for `zero_shot`; by default from the hub.
        path: a .safetensors file, written after each group; a run with the same model, ablations and questions resumes
            from it.
        tokens_a_batch: approximate number of positions per forward pass; it does not change the result.

    Returns:
        A `KnowledgeDistribution`. If an ablation leaves no finite likelihood, the loss is infinite and the
        answer counts as wrong.

    Raises:
        PrunekitError: no groups, or groups of another model; ratios out of range; scores that miss a group, are not
            finite or not one per unit; no tasks or text; weights that are NaN or infinite; a file at `path` of another
            run; processes that share the work (`split_work`) and have other models, ablations or questions.

    Source: LoRAShear (Chen et al. 2023, arXiv 2310.18356), Alg. 3, which measures perplexity on one set. Here each
    question and window is kept, so that changes can be read by domain.
    """
    chosen = check_groups(model, groups)
    if not len(ratios) or not all(0 < ratio <= 1 for ratio in ratios):
        raise PrunekitError(f"ratios={ratios!r}; give fractions of a group's units above 0 and at most 1, one or more")
    plan = [row for group in chosen for row in _shares(group, scores, ratios)]
    options: Any = {"tasks": tasks, "text": text, "limit": limit, "data_dir": data_dir}
    return _measure(model, tokenizer, plan, path, tokens_a_batch, **options)


@checked
def knowledge_of_units(
    model: Model,
    tokenizer: Tokenizer | None,
    groups: Iterable[CoupledGroup],
    *,
    tasks: Tasks | None = None,
    text: Texts | None = None,
    limit: Count | None = None,
    data_dir: FilePath | None = None,
    path: FilePath | None = None,
    tokens_a_batch: Count = POSITIONS,
) -> KnowledgeDistribution:
    """Measures how each domain changes when one unit (a head or a channel) is ablated alone.

    Args:
        model: the dense model; it is unchanged afterwards.
        tokenizer: its tokenizer.
        groups: the groups whose units are ablated one by one.
        tasks: tasks, as `knowledge_distribution` takes them.
        text: texts, as `knowledge_distribution` takes them.
        limit: number of questions of each task; None is all.
        data_dir: a folder with the files of published tasks; by default from the hub.
        path: a file that keeps the measurements, so that an interrupted run resumes; None writes none.
        tokens_a_batch: tokens per forward pass.

    Returns:
        A distribution whose table has one row per unit and domain, with a column `unit`.

    Raises:
        PrunekitError: what `knowledge_distribution` raises.
    """
    chosen = check_groups(model, groups)
    plan = [
        PlannedAblation(group, (unit,), {**_told(group), "ratio": 1 / group.n_units, "n_ablated": 1, "unit": unit})
        for group in chosen
        for unit in range(group.n_units)
    ]
    options: Any = {"tasks": tasks, "text": text, "limit": limit, "data_dir": data_dir}
    return _measure(model, tokenizer, plan, path, tokens_a_batch, **options)


def _told(group: CoupledGroup) -> dict[str, Any]:
    return {"group": group.name, "kind": group.kind, "layer": group.layer}


def check_groups(model: nn.Module, groups: Iterable[CoupledGroup]) -> list[CoupledGroup]:
    """The groups, without repeats, checked against the model."""
    return list({group.name: group for group in groups_of_model(model, groups, "ablate")}.values())


def _shares(group: CoupledGroup, scores: Mapping[str, Tensor], ratios: Sequence[float]) -> Iterator[PlannedAblation]:
    """The ablations of a group: its lowest-scoring units at each ratio; a group of one unit needs no scores."""
    if group.n_units > 1 or group.name in scores:
        check_scores(group, scores)
    order = of_first(scores[group.name]).argsort(stable=True).tolist() if group.n_units > 1 else [0]
    for ratio in dict.fromkeys(ratios) if group.n_units > 1 else (1.0,):
        units = tuple(sorted(order[: max(1, round(ratio * group.n_units))]))
        yield PlannedAblation(group, units, {**_told(group), "ratio": float(ratio), "n_ablated": len(units)})


def _measure(
    model: nn.Module,
    tokenizer: Any,
    plan: list[PlannedAblation],
    path: str | Path | None,
    tokens_a_batch: int,
    **asked: Any,
) -> KnowledgeDistribution:
    """All ablations, lowest layer first; `asked` is what `make_evaluation_set` takes."""
    check_finite(model)
    check_same_model(model)
    questions = make_evaluation_set(model, tokenizer, **asked)
    mark = fingerprint(model, questions, plan) if path is not None or n_sharing() > 1 else ""
    record = Record(plan, questions, path, mark)
    check_alike(int(mark[:15] or "0", 16), "models, ablations or questions")
    check_alike(len(record.measured), f"measurements at path={str(path)!r}, which all must see")
    if record.missing():
        with evaluating(model), torch.no_grad():
            _run(model, questions, record, tokens_a_batch)
        check_alike(len(record.measured), "results")  # all wait here until the first has written the file
    return record.result()


def _run(model: nn.Module, questions: EvaluationSet, record: Record, tokens_a_batch: int) -> None:
    """Measure the missing ablations; the file keeps the finished ones even after an interrupt."""
    runner = Runner(model, questions.spans, tokens_a_batch)
    missing = record.missing()
    layers = {row.group.name: runner.layers_of(row.group) for row in missing}
    rows = [*{row.key: row for row in sorted(missing, key=lambda row: layers[row.group.name])}.values()]
    done, n = len(record.measured), n_sharing()
    silent = {"unit": "ablation", "leave": False, "delay": 1, "disable": not is_first()}
    bar: Any = tqdm(desc="knowledge", total=done + len(rows), initial=done, **silent)
    dense = runner.sums(min(layers.values())[:1])
    require_finite(dense, model)
    record.begin(questions.outcomes(dense), runner)
    with bar:
        try:
            for first in range(0, len(rows), n):
                together = rows[first : first + n]  # one a process
                found = torch.zeros(len(together), 2, len(questions.table), dtype=torch.float64)
                for row, place in own_share(zip(together, found, strict=True)):
                    with ablated(model, row.group, row.units):
                        outcomes = questions.outcomes(runner.sums(layers[row.group.name]))
                    place[:] = torch.from_numpy(np.array(outcomes))
                for row, (hit, loss) in zip(together, summed(found).numpy(), strict=True):
                    record.measured[row.key] = (hit > 0, loss)
                bar.update(len(together))
                if _group_ends(rows, first + n):
                    record.save()
        finally:
            record.save()


def _group_ends(rows: Sequence[PlannedAblation], at: int) -> bool:
    """Whether another group begins at a row."""
    return at < len(rows) and rows[at].group is not rows[at - 1].group
