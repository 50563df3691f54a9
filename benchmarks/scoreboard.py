"""The scoreboard of all recipes and the ledger of the papers' claims, made from the tables in `results` in seconds.

`scoreboard.csv`: each recipe and the package's default, on SmolLM2 and on the world, as cut and after recovery. Where
there are seeds, figures are means, with the lowest and highest perplexity beside them, and seconds are those of the
fastest run. `dense` is the perplexity of the dense model by the same table, `control` that of the dense model after the
same recovery: `…_times_dense` and `…_times_control` divide by them. An empty cell was not measured.

`ledger.csv`: each headline claim of the five papers (`claims.py`), with the same comparison here. `…_claimed` is the
figure that the paper says is better, `…_beside` the other one, as means over seeds. `…_direction` says whether the
claim's direction holds, and `…_agree` in how many of the seeds that both have. All of it is computed here.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from claims import CLAIMS, At, Claim
from machine import RESULTS

MODELS = ("smollm2", "world")
NOT_MEASURED = "not measured"
STAGE = ("perplexity", "low", "high", "seeds", "ptb", "tasks", "tasks_of", "seconds")
COLUMNS = [
    *("model", "recipe", "kept", "kept_of", "text", "dense", "control", "cut_times_dense", "recovered_times_control"),
    *(f"{stage}_{name}" for stage in ("cut", "recovered") for name in STAGE),
    *("training", "peak_mb", "files"),
]


class Source(NamedTuple):
    """How a table is read: our columns → its own, its dense row, and what its figures belong to."""

    columns: dict[str, str]
    dense: dict[str, Any]
    kept_of: str = "all parameters"
    tasks_of: str = ""
    training: str = ""
    control: At | None = None  # perplexity of the dense model after the same recovery


SAME = {name: name for name in ("perplexity", "ptb", "kept", "tasks", "seconds", "peak_mb", "parameters")}
REAL = {**SAME, "perplexity": "wikitext2"}
WORLD = {**SAME, "tasks": "seven"}
QUALITY, UNTUNED = {**SAME, "tasks": "mean_accuracy", "removed": "removed"}, {"method": "dense", "stage": "untuned"}
ELEVEN = "eleven tasks, 60 questions each"
QUARTER = "seven tasks, every fourth question"
TRAINED = At("recipes_smollm2.csv", "wikitext2", {"recipe": "dense", "stage": "recovered"})
SOURCES = {
    "recipes_smollm2.csv": Source(
        REAL, {"recipe": "dense", "stage": "pruned"}, "all parameters, not zero", "seven tasks, 100 questions each",
        "LoRA, 41,000 tokens", TRAINED,
    ),
    "real_smollm2.csv": Source(REAL, {"way": "dense"}),
    "recovery_smollm2.csv": Source(
        REAL, {"model": "uncut", "way": "untrained"}, "", "seven tasks, 200 questions each",
        "LoRA, 41,000 tokens", TRAINED,
    ),
    "quality_world.csv": Source(QUALITY, UNTUNED, "all parameters", ELEVEN, "LoRA, 60 steps"),
    "default_world.csv": Source(
        QUALITY, UNTUNED, "all parameters", ELEVEN, "LoRA, 60 steps",
        At("default_world.csv", "perplexity", {"method": "dense", "stage": "recovered"}),
    ),
    "predictor_world.csv": Source(  # its seconds leave out what several methods share
        {**WORLD, "seconds": ""}, {"method": "dense"}, "all parameters", QUARTER
    ),
    "lorashear_world.csv": Source(WORLD, {"method": "dense"}, "all parameters", "seven tasks", "LoRA, 400 steps"),
    "sparsity_world.csv": Source(
        {**WORLD, "removed": "sparsity", "seconds": "cpu_seconds"},
        {"method": "dense"}, "weights of linear layers, not zero", QUARTER,
    ),
}  # fmt: skip


class Entry(NamedTuple):
    """A line of the scoreboard: where it stands, as cut and after recovery; the first place with a figure gives it."""

    model: str
    recipe: str
    cut: tuple[At, ...] = ()
    recovered: tuple[At, ...] = ()


def rows(file: str, **values: Any) -> At:
    return At(file, "perplexity", values)


def entries() -> list[Entry]:
    """All lines, in the order of the table."""
    recipes = ("dense", "LLM-Pruner", "HyWIA", "LoRAShear", "SparseLLM, 50%", "SparseLLM, 70%", "predictor")
    found = [
        Entry("SmolLM2", name, *((rows("recipes_smollm2.csv", recipe=name, stage=s),) for s in ("pruned", "recovered")))
        for name in recipes
    ]
    cut = {0.2: rows("recovery_smollm2.csv", model="cut", way="untrained")}
    trained = {0.2: (rows("recovery_smollm2.csv", model="cut", way="LoRA(r=8)"),)}
    for ratio in (0.1, 0.2, 0.3):
        at = rows("real_smollm2.csv", way="default (curvature, re-fit)", ratio=ratio)
        more = (cut[ratio],) if ratio in cut else ()
        found.append(Entry("SmolLM2", f"default, {ratio:.0%}", (at, *more), trained.get(ratio, ())))
    found.append(Entry("world", "dense", *quality("dense", 0.0, "default")))
    for ratio in (0.2, 0.5):
        rule, found_by = (
            rows("predictor_world.csv", method=method, ratio=ratio) for method in ("LLM-Pruner's layers", "predictor")
        )
        trained_after, sheared = (
            rows("lorashear_world.csv", method=method, ratio=ratio) for method in ("LLM-Pruner + LoRA", "LoRAShear")
        )
        found += [
            Entry("world", f"LLM-Pruner, {ratio:.0%}", (rule,), (trained_after,)),
            Entry("world", f"HyWIA, {ratio:.0%}", *quality("HyWIA attention", ratio)),
            Entry("world", f"LoRAShear, {ratio:.0%}", (), (sheared,)),
            Entry("world", f"predictor, {ratio:.0%}", (found_by,)),
            Entry("world", f"default, {ratio:.0%}", *quality("default", ratio, "default")),
        ]
    zeros = {"method": "sparsellm", "allocation": "uniform"}
    targets = ("50%", "70%", "80%", "90%")
    return found + [
        Entry("world", f"SparseLLM, {t}", (rows("sparsity_world.csv", target=t, **zeros),)) for t in targets
    ]


def quality(method: str, ratio: float, table: str = "quality") -> list[tuple[At]]:
    stages = ("untuned", "recovered")
    return [(rows(f"{table}_world.csv", method=method, ratio=ratio, stage=stage),) for stage in stages]


class Results:
    """A folder of tables."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tables = folder, {}

    def table(self, file: str) -> pd.DataFrame:
        """The table, empty where there is no such file."""
        if file not in self.tables:
            path = self.folder / file
            self.tables[file] = pd.read_csv(path) if path.is_file() else pd.DataFrame()
        return self.tables[file]

    def figures(self, at: At) -> pd.Series:
        """Seed → figure, a mean where a seed has several rows; empty where nothing was measured."""
        table = self.table(at.file)
        if not {at.column, *at.rows} <= {*table.columns}:
            return pd.Series(dtype=float)
        for column, value in at.rows.items():
            table = table[table[column].isin(value if isinstance(value, tuple) else [value])]
        seeds = table["seed"] if "seed" in table else pd.Series(0, index=table.index)
        return table[at.column].dropna().groupby(seeds).mean()

    def first(self, places: tuple[At, ...], column: str) -> tuple[pd.Series, At | None]:
        """The figures in one of our columns, from the first table that has them, and where they stand."""
        for at in places:
            own = SOURCES[at.file].columns.get(column)
            found = self.figures(at._replace(column=own)) if own else pd.Series(dtype=float)
            if len(found):
                return found, at
        return pd.Series(dtype=float), None

    def kept(self, places: tuple[At, ...]) -> float | None:
        """The share that is left: as it stands, as what is not gone, or as parameters beside the dense model's."""
        for column, share in (("kept", lambda found, _: found), ("removed", lambda found, _: 1 - found),
                              ("parameters", lambda found, dense: found / dense)):  # fmt: skip
            found, at = self.first(places, column)
            if at is not None:
                dense, _ = self.first((rows(at.file, **SOURCES[at.file].dense),), column)
                return mean(share(found, mean(dense, 9)), 4)
        return None


def mean(found: pd.Series, digits: int = 3) -> float | None:
    return round(float(found.mean()), digits) if len(found) else None


def divided(figure: float | None, by: float | None) -> float | None:
    return round(figure / by, 3) if figure and by else None


def stage(results: Results, places: tuple[At, ...], name: str) -> tuple[dict[str, Any], list[At]]:
    """The cells of one stage, `cut` or `recovered`, and where they stand: perplexity, its spread, and the others."""
    names = ("perplexity", "ptb", "tasks", "seconds", "peak_mb")
    found = {column: results.first(places, column) for column in names}
    told = {f"{name}_{column}": mean(figures) for column, (figures, _) in found.items()}
    perplexity, seconds = found["perplexity"][0], found["seconds"][0]
    if len(perplexity):
        told |= {f"{name}_low": round(perplexity.min(), 3), f"{name}_high": round(perplexity.max(), 3)}
    told |= {f"{name}_seeds": len(perplexity), f"{name}_seconds": seconds.min() if len(seconds) else None}
    asked = found["tasks"][1]
    return told | {f"{name}_tasks_of": SOURCES[asked.file].tasks_of if asked else None}, [
        at for _, at in found.values() if at
    ]


def scored(results: Results, entry: Entry) -> dict[str, Any]:
    """A row of the scoreboard."""
    (cut, here), (recovered, there) = (
        stage(results, places, name) for places, name in ((entry.cut, "cut"), (entry.recovered, "recovered"))
    )
    told = {"model": entry.model, "recipe": entry.recipe, "kept": results.kept(entry.cut + entry.recovered)}
    told |= {"text": "WikiText-2" if entry.model == "SmolLM2" else "world"} | cut | recovered
    if not here and not there:
        return told
    first, training = SOURCES[(here + there)[0].file], SOURCES[there[0].file] if there else None
    dense = mean(results.first((rows((here + there)[0].file, **first.dense),), "perplexity")[0])
    control = mean(results.figures(training.control)) if training and training.control else None
    peaks = [told[f"{name}_peak_mb"] for name in ("cut", "recovered") if told[f"{name}_peak_mb"] is not None]
    return told | {
        "kept_of": first.kept_of,
        "dense": dense,
        "control": control,
        "cut_times_dense": divided(told["cut_perplexity"], dense),
        "recovered_times_control": divided(told["recovered_perplexity"], control),
        "training": training.training if training else None,
        "peak_mb": max(peaks, default=None),
        "files": " ".join(dict.fromkeys(at.file for at in here + there)),
    }


def compared(results: Results, claim: Claim, model: str) -> dict[str, Any]:
    """Four cells of the ledger: both figures, whether the direction holds, and in how many seeds."""
    pair = getattr(claim, model)
    claimed, beside = map(results.figures, pair) if pair else (pd.Series(dtype=float),) * 2
    names = [f"{model}_{name}" for name in ("claimed", "beside", "direction", "agree", "files")]
    if claimed.empty or beside.empty:
        return dict(zip(names, (None, None, NOT_MEASURED, None, None), strict=True))
    beside = beside * claim.share

    def better(one: Any, other: Any) -> Any:
        return one < other if claim.better == "lower" else one > other

    direction = "holds" if better(claimed.mean(), beside.mean()) else "does not hold"
    both = claimed.index.intersection(beside.index)
    agree = f"{int(better(claimed[both], beside[both]).sum())} of {len(both)}"
    files = " ".join(dict.fromkeys(at.file for at in pair))
    return dict(zip(names, (mean(claimed, 4), mean(beside, 4), direction, agree, files), strict=True))


def ledger(results: Results) -> pd.DataFrame:
    told = ("paper", "claim", "paper_figure", "paper_model", "measure", "better")
    return pd.DataFrame(
        {name: getattr(claim, name) for name in told}
        | {name: cell for model in MODELS for name, cell in compared(results, claim, model).items()}
        | {"why": claim.why}
        for claim in CLAIMS
    )


def scoreboard(results: Results) -> pd.DataFrame:
    return pd.DataFrame([scored(results, entry) for entry in entries()], columns=COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables that are read")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for scoreboard.csv and ledger.csv")
    args = parser.parse_args()
    results = Results(args.results)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, table in (("scoreboard", scoreboard(results)), ("ledger", ledger(results))):
        table.to_csv(args.out / f"{name}.csv", index=False)
    directions = pd.DataFrame({model: table[f"{model}_direction"].value_counts() for model in MODELS})
    print(directions.fillna(0).astype(int).to_string())


if __name__ == "__main__":
    main()
