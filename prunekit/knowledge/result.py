"""The result of a knowledge distribution, and its tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from prunekit.checks import Part, check_choice, check_value
from prunekit.errors import PrunekitError
from prunekit.escaping import html_paragraph
from prunekit.knowledge.measurement_files import read_measurements, write_measurements

BY = ("domain", "task", "tier", "hops")
MEASURES = ("accuracy", "loss")
RATIOS = (0.25, 0.5)  # our choice of LoRAShear's set P


@dataclass(frozen=True, eq=False)
class KnowledgeDistribution:
    """Measurements of each question and text window under each ablation.

    Attributes:
        ablations: one row per measurement: group, kind, layer, ratio, n_ablated, units (a list), and where single
            units were ablated, unit.
        questions: one row per question or window of text: task, domain, tier, hops, context, right (the text of the
            right choice, or of the window), n_tokens (scored ones of it), chance (NaN for a window).
        hit: bool (n_ablations, n_questions), whether the answer was correct; False for windows.
        loss: float64 (n_ablations, n_questions). For a question −log of the right choice's share of the likelihood
            of all choices, in nats; for a window nats per token. Infinite where the ablated model gives no finite
            likelihood.
        dense_hit: bool (n_questions,), of the dense model.
        dense_loss: float64 (n_questions,), of the dense model.
        packed: whether sequences shared rows of a batch.
        resumed: whether layers below the ablated one were skipped.
        unfinished: number of ablations that an interrupted run has not measured.
        fingerprint: digest of the weights, questions and ablations; "" if nothing was saved.
    """

    ablations: pd.DataFrame
    questions: pd.DataFrame
    hit: np.ndarray
    loss: np.ndarray
    dense_hit: np.ndarray
    dense_loss: np.ndarray
    packed: bool
    resumed: bool
    unfinished: int = 0
    fingerprint: str = ""

    def table(self, by: str = "domain", measure: str | None = None) -> pd.DataFrame:
        """The change of a measure, one row per ablation and domain (task, tier, number of hops).

        Args:
            by: one of `"domain" "task" "tier" "hops"`; questions without that label are left out.
            measure: `"accuracy"` in [0, 1], of questions alone, or `"loss"`, in nats per question, or nats per token of
                a text, weighted by tokens. None is accuracy if there are questions.

        Returns:
            Columns group, kind, layer, ratio, n_ablated, unit (where single units were ablated), `by`, measure, n
            (questions, or windows), dense, value, change (value − dense: worse is below 0 for accuracy, above 0 for
            loss).

        Raises:
            PrunekitError: an unknown label or measure, or no question has that label.
        """
        if measure is None:
            measure = "accuracy" if self.questions["chance"].notna().any() else "loss"
        check_choice("by", by, BY)
        check_choice("measure", measure, MEASURES)
        if measure == "accuracy" and self.questions["chance"].isna().all():
            raise PrunekitError("only text was evaluated, which has no accuracy; give measure='loss'")
        named = self.ablations.drop(columns="units")
        values, dense = (self.hit, self.dense_hit) if measure == "accuracy" else (self.loss, self.dense_loss)
        parts = []
        for key, rows in rows_by(self.questions, by, measure).items():
            weights = weights_of(self.questions.iloc[rows])
            before, value = np.average(dense[rows], weights=weights), np.average(values[:, rows], 1, weights)
            told = {by: key, "measure": measure, "n": len(rows)}
            parts.append(named.assign(**told, dense=before, value=value, change=value - before))
        return pd.concat(parts).sort_index(kind="stable").reset_index(drop=True)

    def worst(self, by: str = "domain", measure: str | None = None) -> pd.DataFrame:
        """The worst ablation for each domain (task, tier, number of hops), and its change.

        Args:
            by: as for `table`.
            measure: as for `table`.

        Returns:
            One row per domain: `by`, measure, n, dense, value, change, group, ratio.

        Raises:
            PrunekitError: as `table`.
        """
        table = self.table(by, measure)
        worse = _worse(table, str(table["measure"].iloc[0]))["worse"]
        rows = table.loc[worse.groupby(table[by], sort=False).idxmax()]
        return rows[[by, "measure", "n", "dense", "value", "change", "group", "ratio"]].reset_index(drop=True)

    def damage(self, measure: str = "loss", ratios: Sequence[float] = RATIOS) -> pd.DataFrame:
        """Mean damage of each group's ablation, over ratios and domains with equal weight.

        At each ratio the lowest-scoring units are ablated. So this measures the cost of a cut by these scores, not all
        that the group stores: a vital unit with a high score stays.

        Args:
            measure: `"loss"`, or the fall of `"accuracy"`.
            ratios: the ratios to average. Whole blocks and layers are ablated at ratio 1 alone, and are left
                out if 1 is not among these.

        Returns:
            One row per group: group, kind, layer, damage (above 0: worse).

        Raises:
            PrunekitError: single units were ablated, or a ratio was not measured.

        Source: LoRAShear (arXiv 2310.18356), Alg. 3, whose measure is perplexity.
        Reconstructed: the mean change of log-perplexity over P = {.25, .5}; the paper does not give P.
        """
        table = _worse(self.table("domain", measure), measure)
        if "unit" in table:
            raise PrunekitError("single units were ablated here, not shares of groups; read table(), or agreement()")
        chosen = np.isclose(table["ratio"].to_numpy()[:, None], np.asarray(ratios, dtype=float)).any(1)
        missing = [r for r in ratios if not np.isclose(table["ratio"].to_numpy(), r).any()]
        if missing or not len(ratios):
            had = ", ".join(f"{ratio:g}" for ratio in sorted(table["ratio"].unique()))
            raise PrunekitError(f"ratios={ratios!r} were not all measured; give some of {had}")
        found = table[chosen].groupby("group", sort=False).agg(
            kind=("kind", "first"), layer=("layer", "first"), damage=("worse", "mean")
        )  # fmt: skip
        return found.reset_index()

    def unprunable(self, gamma: float = 0.1, measure: str = "loss", ratios: Sequence[float] = RATIOS) -> list[str]:
        """Names of the groups with the most damage, worst first: the ones to protect from pruning.

        Args:
            gamma: fraction of the groups, in [0, 1], rounded up.
            measure: as for `damage`.
            ratios: as for `damage`.

        Raises:
            PrunekitError: gamma is out of range, or what `damage` raises.

        Source: LoRAShear (arXiv 2310.18356), Alg. 3. Reconstructed: γ = .1; the paper does not give it.
        """
        check_value("gamma", gamma, Part)
        found = self.damage(measure, ratios).sort_values("damage", ascending=False, kind="stable")
        n = math.ceil(round(gamma * len(found), 9))
        return found["group"].tolist()[:n]

    def died(self, group: str, *, ratio: float | None = None, unit: int | None = None) -> pd.DataFrame:
        """Questions that only the dense model answers correctly, for one ablation.

        Args:
            group: name of a group that was ablated.
            ratio: the ablated share; None if there is only one.
            unit: the ablated unit, if single units were ablated.

        Returns:
            Rows of `questions`, with dense and loss: nats before and after.

        Raises:
            PrunekitError: this ablation was not measured.
        """
        rows = self.ablations[self.ablations["group"] == group]
        if rows.empty:
            raise PrunekitError(f"no group {group!r} was ablated; one of {', '.join(self.ablations['group'].unique())}")
        if unit is None and "unit" in rows:
            raise PrunekitError(f"single units of {group!r} were ablated; give unit=, one of {rows['unit'].tolist()}")
        column, value = ("ratio", ratio) if unit is None else ("unit", unit)
        known = rows[column] if column in rows else pd.Series(dtype=float)
        fits = known.index[np.isclose(known.to_numpy(dtype=float), value)] if value is not None else rows.index
        if len(fits) != 1:
            shown = ", ".join(f"{v:g}" for v in known) or f"shares of it: give ratio=, of {rows['ratio'].tolist()}"
            raise PrunekitError(f"{column}={value} of {group!r} was not measured; there is {shown}")
        gone = self.dense_hit & ~self.hit[fits[0]]
        return self.questions[gone].assign(dense=self.dense_loss[gone], loss=self.loss[fits[0]][gone])

    def agreement(
        self,
        scores_by_name: Mapping[str, Mapping[str, Tensor]],
        by: str = "domain",
        measure: str = "loss",
        ratio: float | None = None,
    ) -> pd.DataFrame:
        """Rank correlation between scores and measured damage, for each kind of group.

        Args:
            scores_by_name: name → scores of the same groups; their sum over the ablated units is compared.
            by: as for `table`.
            measure: as for `table`; higher damage is worse.
            ratio: use this ratio only; None uses all, which favours scores that only count units.

        Returns:
            Columns score, kind (`"all"` for all kinds together), `by`, spearman (NaN if all values are equal), n
            (number of ablations with that score).

        Raises:
            PrunekitError: no scores, scores of other groups, or a ratio that was not measured.
        """
        if not isinstance(scores_by_name, Mapping) or not all(isinstance(s, Mapping) for s in scores_by_name.values()):
            raise PrunekitError("give name → scores, such as agreement({'taylor': scores})")
        table = _worse(self.table(by, measure), measure)
        n_keys = len(table) // len(self.ablations)
        table = table.assign(number=np.repeat(np.arange(len(self.ablations)), n_keys))
        table = table if ratio is None else table[np.isclose(table["ratio"], ratio)]
        if table.empty or not scores_by_name:
            raise PrunekitError(
                f"no ablation at ratio={ratio} to compare with {len(scores_by_name)} scores; give a measured ratio "
                "and scores"
            )
        rows = []
        for name, scores in scores_by_name.items():
            sums = self._summed(name, scores)
            scored = table.assign(score=sums[table["number"]]).dropna(subset="score")
            for kind in [*scored["kind"].unique(), "all"]:
                for key, part in scored[(scored["kind"] == kind) | (kind == "all")].groupby(by, sort=False):
                    rows.append((name, kind, key, _spearman(part["score"], part["worse"]), len(part)))
        return pd.DataFrame(rows, columns=["score", "kind", by, "spearman", "n"])

    def _summed(self, name: str, scores: Mapping[str, Tensor]) -> np.ndarray:
        """Summed score of the ablated units of each row; NaN for a group without scores."""
        found = np.full(len(self.ablations), np.nan)
        for row, (group, units) in enumerate(zip(self.ablations["group"], self.ablations["units"], strict=True)):
            if group in scores:
                values = torch.as_tensor(scores[group]).double()
                if max(units) >= len(values):
                    raise PrunekitError(
                        f"{name!r} has {len(values)} scores of {group!r}, which has more units; score it again"
                    )
                found[row] = float(values[units].sum())
        if np.isnan(found).all():
            raise PrunekitError(f"{name!r} scores none of these groups, such as {self.ablations['group'][0]!r}")
        return found

    def save(self, path: str | Path) -> Path:
        """Write to one safetensors file, replacing an old one only when it is complete.

        Raises:
            PrunekitError: the folder does not exist, or cannot be written to.
        """
        return write_measurements(Path(path), vars(self))

    @classmethod
    def load(cls, path: str | Path) -> "KnowledgeDistribution":
        """Read a file of `save`, or the partial result of a run with this `path`.

        Raises:
            PrunekitError: the file is missing, or it holds something else.
        """
        return cls(**read_measurements(path))

    def __repr__(self) -> str:
        n_windows = int(self.questions["chance"].isna().sum())
        asked = f"{len(self.questions) - n_windows:,} questions" + (f", {n_windows:,} windows" if n_windows else "")
        left = f", {self.unfinished} more to measure" if self.unfinished else ""
        how = (
            f"{'packed' if self.packed else 'plain'} rows, {'resumed at' if self.resumed else 'run through all'} layers"
        )
        n_groups = self.ablations["group"].nunique()
        return f"KnowledgeDistribution({len(self.ablations)} ablations of {n_groups} groups{left}; {asked}; {how})"

    def _repr_html_(self) -> str:
        if self.ablations.empty:
            return html_paragraph(self)
        mean = self.table("domain", "loss").pivot_table(
            index="kind", columns="domain", values="change", aggfunc="mean", sort=False
        )  # fmt: skip
        return f"{html_paragraph(self)}<p>mean change of the loss</p>{mean.to_html(float_format='{:+.3f}'.format)}"


def rows_by(questions: pd.DataFrame, by: str, measure: str) -> dict[Any, np.ndarray]:
    """Label → its rows of a table of questions, at least one label; windows of text have no accuracy."""
    labels = questions[by].where(questions["chance"].notna() | (measure == "loss"))
    if labels.isna().all():
        raise PrunekitError(f"no question or window with {measure} has a {by}; give another of {', '.join(BY)}")
    return {key: np.flatnonzero(labels == key) for key in labels.dropna().unique()}


def weights_of(questions: pd.DataFrame) -> np.ndarray:
    """Weight of each question in a mean, 1; a window of text counts as many times as it has tokens."""
    return np.where(questions["chance"].isna(), questions["n_tokens"], 1).astype(float)


def _worse(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The table with a column of damage, positive if worse, for either measure."""
    return table.assign(worse=table["change"] * (1 if measure == "loss" else -1))


def _spearman(a: pd.Series, b: pd.Series) -> float:
    """Spearman correlation with mean ranks for ties; NaN if one side is constant."""
    one_sided = a.nunique() < 2 or b.nunique() < 2
    return math.nan if one_sided else float(a.rank().corr(b.rank()))
