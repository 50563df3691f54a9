"""Evaluation reports of one model, comparisons of several, and the Pareto front of a comparison."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import pandas as pd

from prunekit.annotations import readable
from prunekit.checks import Count, Model, Tokenizer, checked
from prunekit.documents import TextSource
from prunekit.errors import PrunekitError, reason
from prunekit.evaluation.footprint import Cost, cost
from prunekit.evaluation.language_modelling import PerplexityResult, measure_perplexity
from prunekit.evaluation.multiple_choice import ZeroShotResult, zero_shot
from prunekit.evaluation.standard_tasks import Tasks
from prunekit.files import read_text, write_text, writing

PARTS: dict[str, Any] = {"perplexity": PerplexityResult, "zero_shot": ZeroShotResult, "cost": Cost}
METRICS = tuple(PARTS)
FORMAT = "prunekit report 1"
HINTS = {  # argument → what to give
    "text": "text=, a text or a file (in a shell: --data), or leave perplexity out of metrics (--metrics)",
    "tasks": "tasks=, such as ['boolq', 'piqa'] (in a shell: --tasks), or leave zero_shot out of metrics (--metrics)",
}


@dataclass(frozen=True, eq=False)
class Report:
    """Evaluation results of one model.

    `report["perplexity"]` and the other names of `headline()` give the headline figures.

    Attributes:
        perplexity: with its protocol; None where not measured.
        zero_shot: one row per question; None where not measured.
        cost: parameters, MACs, memory, latency; None where not measured.
    """

    perplexity: PerplexityResult | None = None
    zero_shot: ZeroShotResult | None = None
    cost: Cost | None = None

    def headline(self) -> dict[str, float]:
        """The headline figures of a report, in this order.

        Returns:
            perplexity; the accuracy of each task under its name, in [0, 1]; mean_accuracy; parameters; macs;
            weight_bytes; peak_bytes; prefill_ms and decode_ms (medians). What was not measured is left out.
        """
        return {**self._quality(), **self._cost()}

    def _quality(self) -> dict[str, float]:
        found = {} if self.perplexity is None else {"perplexity": self.perplexity.value}
        if self.zero_shot is None:
            return found
        tasks = {str(name): float(value) for name, value in self.zero_shot.accuracy().items()}
        return {**found, **tasks, "mean_accuracy": self.zero_shot.mean}

    def _cost(self) -> dict[str, float]:
        if self.cost is None:
            return {}
        return {
            "parameters": self.cost.n_parameters,
            "macs": self.cost.macs,
            "weight_bytes": self.cost.weight_bytes,
            "peak_bytes": self.cost.peak_bytes,
            "prefill_ms": self.cost.prefill.median,
            "decode_ms": self.cost.decode.median,
        }

    def __getitem__(self, name: str) -> float:
        """One headline figure.

        Raises:
            PrunekitError: the figure was not measured or is unknown.
        """
        figures = self.headline()
        if name not in figures:
            raise PrunekitError(f"this report has no {name!r}; it has {', '.join(figures) or 'nothing'}")
        return figures[name]

    def table(self) -> pd.DataFrame:
        """One row per headline figure: metric, value, note (protocol, standard error and chance, or spread)."""
        rows = [(name, value, self._note(name)) for name, value in self.headline().items()]
        return pd.DataFrame(rows, columns=["metric", "value", "note"])

    def _note(self, name: str) -> str:
        if name == "perplexity" and self.perplexity is not None:
            return f"{self.perplexity.n_tokens:,} tokens; {self.perplexity.description}"
        if self.zero_shot is not None and name in self.zero_shot.accuracy():
            row = self.zero_shot.by("task").loc[name]
            return f"± {row['stderr']:.3f}, chance {row['chance']:.3f}, {row['n']:.0f} questions"
        if self.cost is None:
            return ""
        run = f"{self.cost.batch_size} × {self.cost.seq_len} tokens"
        notes = {"macs": run, "peak_bytes": self.cost.peak_measured}
        for key, latency in (("prefill_ms", self.cost.prefill), ("decode_ms", self.cost.decode)):
            notes[key] = f"p10 {latency.p10:.3g}, p90 {latency.p90:.3g}; {run}; {self.cost.device}"
        return notes.get(name, "")

    def to_json(self) -> str:
        """The whole report, each question's answer included, as JSON."""
        parts = {name: getattr(self, name) for name in METRICS}
        plain = {name: None if part is None else part.to_dict() for name, part in parts.items()}
        return json.dumps({"format": FORMAT, **plain}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report from the text that `to_json` wrote.

        Raises:
            PrunekitError: the text is no report.
        """
        try:
            fields = json.loads(text)
            if not isinstance(fields, dict) or set(fields) != {"format", *METRICS}:
                raise ValueError("it must have a format, and perplexity, zero_shot and cost, or null in their place")
            if fields.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            return cls(**{name: None if part is None else PARTS[name].from_dict(part) for name, part in fields.items()})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PrunekitError(
                f"this is not a prunekit report ({reason(error)}); give a file that Report.save wrote"
            ) from error

    def save(self, path: str | Path) -> Path:
        """Writes the report as JSON and replaces an old one only when complete."""
        path = Path(path)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.to_json())
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Reads a report that `save` wrote.

        Raises:
            PrunekitError: the file is missing, or it is no report.
        """
        return cls.from_json(read_text(path, "Report.save"))

    def __repr__(self) -> str:
        return "Report\n" + self._readable().to_string(index=False, header=False, justify="left")

    def _repr_html_(self) -> str:
        return self._readable().to_html(index=False)

    def _readable(self) -> pd.DataFrame:
        return self.table().assign(value=lambda table: table["value"].map(readable))


@checked
def evaluate(
    model: Model,
    tokenizer: Tokenizer | None,
    metrics: str | Iterable[str] = METRICS,
    *,
    text: TextSource | None = None,
    tasks: Tasks | None = None,
    batch_size: Count = 16,
    perplexity_options: Mapping[str, Any] | None = None,
    zero_shot_options: Mapping[str, Any] | None = None,
    cost_options: Mapping[str, Any] | None = None,
) -> Report:
    """Measures a model's perplexity, zero-shot accuracy and cost, and returns a report.

    Args:
        model: a causal language model of `transformers`.
        tokenizer: the model's own tokenizer.
        metrics: any of `"perplexity" "zero_shot" "cost"`.
        text: what perplexity is measured on: a text, a path, or another source of `read_documents`. None is the
            embedded world's validation text, for its tokenizer only.
        tasks: tasks, or names of published ones, as `zero_shot` takes them. None is the embedded world's tasks, for its
            tokenizer only.
        batch_size: rows of about 128 tokens a forward pass for perplexity and zero-shot; it does not change the result.
        perplexity_options: keyword arguments of `measure_perplexity`, such as `{"protocol": "documents"}`.
        zero_shot_options: keyword arguments of `zero_shot`, such as `{"limit": 200, "data_dir": "data"}`.
        cost_options: keyword arguments of `cost`, such as `{"seq_len": 128}`.

    Returns:
        A `Report`.

    Raises:
        PrunekitError: a metric is unknown, text or tasks are missing, or an error of the metric.
    """
    wanted = check_metrics(metrics)
    _check_names("perplexity_options", perplexity_options, measure_perplexity)
    _check_names("zero_shot_options", zero_shot_options, zero_shot)
    _check_names("cost_options", cost_options, cost)
    found: dict[str, Any] = {}
    if "perplexity" in wanted:
        text = world_default(tokenizer, "validation_text", "text") if text is None else text
    if "zero_shot" in wanted:
        tasks = world_default(tokenizer, "tasks", "tasks") if tasks is None else tasks
    size: dict[str, Any] = {"batch_size": batch_size}
    if "perplexity" in wanted and text is not None:
        found["perplexity"] = measure_perplexity(model, tokenizer, text, **{**size, **(perplexity_options or {})})
    if "zero_shot" in wanted and tasks is not None:
        found["zero_shot"] = zero_shot(model, tokenizer, tasks, **{**size, **(zero_shot_options or {})})
    if "cost" in wanted:
        found["cost"] = cost(model, **(cost_options or {}))
    return Report(**found)


def _check_names(name: str, options: Mapping[str, Any] | None, function: Callable[..., Any]) -> None:
    """Raise an error for options that a function does not have, also where it is not called."""
    known = [each.name for each in signature(function).parameters.values() if each.kind is each.KEYWORD_ONLY]
    for option in options or ():
        if option not in known:
            raise PrunekitError(f"{name} has the unknown option {option!r}; allowed are {', '.join(known)}")


def check_metrics(metrics: str | Iterable[str]) -> tuple[str, ...]:
    """The metrics as a checked tuple."""
    wanted = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    unknown = [name for name in wanted if name not in METRICS]
    if unknown or not wanted:
        shown = ", ".join(map(repr, unknown)) or "none"
        raise PrunekitError(f"metrics: {shown}; give at least one of {', '.join(map(repr, METRICS))}")
    return wanted


def world_default(tokenizer: Any, maker: str, argument: str) -> Any:
    """Default text or tasks: the embedded world's, for its own tokenizer."""
    world: Any = import_module("prunekit.world")
    if not world.is_world_tokenizer(tokenizer):
        raise PrunekitError(
            f"{argument}=None stands for the embedded world's, and this tokenizer is not its own; "
            f"give {HINTS[argument]}"
        )
    return getattr(world, maker)()


@checked
def compare(reports: Mapping[str, Report]) -> pd.DataFrame:
    """Reports side by side.

    Args:
        reports: name of the model → its report, such as `{"dense": …, "cut": …, "recovered": …}`.

    Returns:
        One row per model (index `model`), one column per headline figure; NaN if not measured.

    Raises:
        PrunekitError: there is no report.
    """
    check_reports(reports)
    quality = dict.fromkeys(name for report in reports.values() for name in report._quality())
    costs = dict.fromkeys(name for report in reports.values() for name in report._cost())
    rows = [report.headline() for report in reports.values()]
    return pd.DataFrame(rows, index=pd.Index(list(reports), name="model"), columns=[*quality, *costs])


@checked
def compare_accuracy(reports: Mapping[str, Report], by: str = "task") -> pd.DataFrame:
    """Zero-shot accuracies of several models, one row per model and group: what `plot_accuracy` draws.

    Args:
        reports: name of the model → its report, with zero-shot answers.
        by: `"task"`, `"form"`, `"domain"`, `"tier"` or `"hops"`.

    Returns:
        Columns model, `by`, n, accuracy, stderr, acc, acc_norm, chance.

    Raises:
        PrunekitError: there is no report, or one has no zero-shot answers.
    """
    check_reports(reports)
    without = [name for name, report in reports.items() if report.zero_shot is None]
    if without:
        raise PrunekitError(f"{', '.join(without)}: no zero-shot answers; evaluate with metrics=('zero_shot',)")
    tables = {name: report.zero_shot.by(by) for name, report in reports.items() if report.zero_shot is not None}
    return pd.concat(tables, names=["model"]).reset_index()


def check_reports(reports: Mapping[str, Report]) -> None:
    """Raises an error for an empty comparison."""
    if not reports:
        raise PrunekitError("no report to compare; give a dictionary, name → Report")


def unbeaten(table: pd.DataFrame, cost: str, value: str) -> pd.DataFrame:
    """The Pareto front of a table: rows that no other row beats in two columns that are to be low, cheapest first."""
    order = table.sort_values([cost, value])
    return order[~(order[value] >= order[value].cummin().shift())]
