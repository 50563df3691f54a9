"""A model of models: gradient-boosted trees that foretell from an architecture what is measured of it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prunekit.checks import check_integers, check_reals
from prunekit.errors import PrunekitError
from prunekit.files import write_text
from prunekit.fingerprint import digest_of_text
from prunekit.search.space import Point, Space

_FORMAT = "prunekit.predictor/1"
BETTER = 0.05  # of the way from the best to the median, by which the best could be better
FEWEST = 10  # pairs, below which nothing is learned


@dataclass(frozen=True)
class Trees:
    """How the trees are grown.

    Attributes:
        n_models: boosted sequences of trees, each learning from pairs drawn with replacement; their mean is what is
            expected. 1 learns from all pairs at once, as the papers do.
        n_trees: of each, one after the other.
        n_leaves: of each tree, at most.
        learning_rate: what part of each tree's correction is taken.
        min_pairs: in a leaf.
        seed: of what chance there is.

    Source: GBDT-NAS (Luo et al. 2020): 100 trees of 31 leaves at .05, with LightGBM's default of 20 pairs a leaf, of
        thousands; here pairs are hundreds. Several models, and thresholds drawn at random (extremely randomized trees,
        Geurts et al. 2006), are ours: trees that place each threshold where it fits best expect the same of all points
        in a leaf, and cannot tell the best of them from each other.
    """

    n_models: int = 10
    n_trees: int = 200
    n_leaves: int = 31
    learning_rate: float = 0.05
    min_pairs: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"n_models": 1, "n_trees": 1, "n_leaves": 2, "min_pairs": 1, "seed": 0}.items():
            check_integers(**{name: (getattr(self, name), least)})
        check_reals(learning_rate=(self.learning_rate, 1e-6, 1 + 1e-9))


class AccuracyPredictor:
    """Learns from measured points what a point will measure, lower being better.

    Trees, and LightGBM's: hundreds of pairs of shares and choices are what boosted trees are good at; its models are
    plain text, so that no pickle is read or written; and it computes exact SHAP values itself.

    What the trees learn is the logarithm of how much worse a point is than a little better than the best: most points
    that are drawn are far from good, and squares of plain differences would teach how bad they are, and no more.

    Source: Ji et al. (arXiv 2309.09507), a gradient-boosted-tree regressor. Reconstructed: its features and settings,
        for which see `Trees`; the logarithm is ours.
    """

    def __init__(self, space: Space, trees: Trees | None = None) -> None:
        """A predictor that has not learned yet.

        Args:
            space: whose points it reads.
            trees: how the trees are grown; None is `Trees()`.
        """
        self.space, self.trees = space, trees or Trees()
        self._models: list[Any] = []
        self._floor = 0.0

    def fit(self, points: Sequence[Point], values: Sequence[float] | np.ndarray) -> "AccuracyPredictor":
        """Learn from points and what was measured of them, lower being better.

        Raises:
            PrunekitError: fewer than 10 pairs, or values that are not finite.
        """
        import lightgbm  # takes a second, which who only prunes need not wait for

        features, wanted = self.space.features(points), np.asarray(values, dtype=float)
        if len(features) != len(wanted) or len(wanted) < FEWEST or not np.isfinite(wanted).all():
            raise PrunekitError(
                f"{len(features)} points and {len(wanted)} values, {int((~np.isfinite(wanted)).sum())} of them not "
                f"finite; give at least {FEWEST} points with a finite value each"
            )
        least = float(wanted.min())
        self._floor = least - max(BETTER * (float(np.median(wanted)) - least), 1e-9 * max(1.0, abs(least)))
        self._models = []
        for number in range(self.trees.n_models):
            rows = self._drawn(len(wanted), number)
            data = lightgbm.Dataset(features[rows], np.log(wanted[rows] - self._floor))
            self._models.append(lightgbm.train(self._settings(number), data, self.trees.n_trees))
        return self

    def predict(self, points: Sequence[Point]) -> np.ndarray:
        """What is expected of points, float (n,).

        Raises:
            PrunekitError: nothing was learned yet.
        """
        return self._floor + np.exp(self._mean(points))

    def shap(self, points: Sequence[Point]) -> pd.DataFrame:
        """How much each feature of each point moves what is expected of it, one row a point, one column a feature.

        Exact SHAP values of the trees, added up over features the logarithm of how much worse than the best a point is:
        .1 is a tenth more of that, and below 0 is to the good.

        Raises:
            PrunekitError: nothing was learned yet.

        Source: Lundberg et al. (2018), TreeSHAP, as LightGBM computes it.
        """
        return pd.DataFrame(self._mean(points, pred_contrib=True)[:, :-1], columns=self.space.feature_names())

    def save(self, path: str | Path) -> Path:
        """Write the trees as text, in JSON; the file is complete or not there.

        Raises:
            PrunekitError: nothing was learned yet, or the folder cannot be written to.
        """
        self._check_fitted()
        models = [model.model_to_string() for model in self._models]
        content = {
            "format": _FORMAT, "trees": asdict(self.trees), "features": self.space.feature_names(),
            "floor": self._floor, "digest": digest_of_text("".join(models)), "models": models,
        }  # fmt: skip
        write_text(Path(path), json.dumps(content, indent=1))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, space: Space) -> "AccuracyPredictor":
        """Read what `save` wrote.

        Raises:
            PrunekitError: there is no such file, it holds no predictor, or that of a space with other features.
        """
        import lightgbm

        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != _FORMAT or content["digest"] != digest_of_text("".join(content["models"])):
                raise ValueError("it is damaged, or no predictor")  # LightGBM may abort on half a text
            found = cls(space, Trees(**content["trees"]))
            found._floor = float(content["floor"])
            found._models = [lightgbm.Booster(model_str=text) for text in content["models"]]
        except (OSError, ValueError, LookupError, TypeError, lightgbm.basic.LightGBMError) as error:
            raise PrunekitError(f"no predictor in {str(path)!r} ({error}); give a file that save wrote") from None
        if content["features"] != space.feature_names():
            raise PrunekitError(f"the predictor in {str(path)!r} is of a space with other knobs; give that space")
        return found

    def __repr__(self) -> str:
        state = "has learned" if self._models else "has learned nothing yet"
        return f"AccuracyPredictor({len(self.space.knobs)} knobs, {self.trees.n_models} models; {state})"

    def _mean(self, points: Sequence[Point], **options: bool) -> np.ndarray:
        self._check_fitted()
        features = self.space.features(points)
        return np.mean([model.predict(features, num_threads=1, **options) for model in self._models], axis=0)

    def _check_fitted(self) -> None:
        if not self._models:
            raise PrunekitError("this predictor has learned nothing yet; call fit(points, values) first")

    def _drawn(self, n: int, number: int) -> np.ndarray:
        """The pairs that one of several models learns from, as many as there are."""
        if self.trees.n_models == 1:
            return np.arange(n)
        return np.random.default_rng([self.trees.seed, number]).integers(n, size=n)

    def _settings(self, number: int) -> dict[str, Any]:
        return {
            "objective": "regression",
            "num_leaves": self.trees.n_leaves,
            "learning_rate": self.trees.learning_rate,
            "min_data_in_leaf": self.trees.min_pairs,
            "extra_trees": True,
            "seed": self.trees.seed + number,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": 1,
            "verbosity": -1,
        }
