"""`prunekit discover`, `evaluate` and `knowledge`: groups, evaluation and knowledge distribution of a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib

import prunekit as pk
from prunekit.annotations import readable
from prunekit.checkpoint.loading import load_structure
from prunekit.checkpoint.streaming import candidates
from prunekit.cli.console import Answer, Of, flag, say, text_table
from prunekit.cli.inputs import Drawing, Loading, check_drawing, drawn, named_texts, text_for
from prunekit.errors import PrunekitError, similar
from prunekit.evaluation import harness
from prunekit.evaluation.language_modelling import measure_perplexity
from prunekit.evaluation.report import check_metrics
from prunekit.evaluation.standard_tasks import TASKS, is_standard, named_tasks
from prunekit.evaluation.windows import TEXTS, standard_text
from prunekit.files import new_folder
from prunekit.importance import IMPORTANCES, default_importance, importance_from_name
from prunekit.plot_style import check_picture
from prunekit.plotting import plot_groups, plot_knowledge, save_picture
from prunekit.processes import is_first
from prunekit.world import is_world_tokenizer

matplotlib.use("agg")  # a shell has no window to draw in

COMMON = ("perplexity", "macs", "peak_bytes")  # their notes hold for all models alike


def discover(model: str, *, plot: str | None = None, layer: int | None = None) -> Answer:
    """Show which parts of a model can be cut, and what is locked.

    A unit is the smallest thing that can be removed: an attention head with all its
    rows and columns, a channel of a feed-forward layer, a whole layer. A coupled
    group holds the interchangeable units of one place. Exact groups can be cut so
    that the smaller model computes what the full one does with those units at zero.

    Example:
        prunekit discover world
        prunekit discover path/to/checkpoint --json
        prunekit discover path/to/checkpoint --plot layer.png --layer 3

    Args:
        model: a checkpoint folder, a .gguf file, a hub id, "world" or "smollm2".
        plot: FILE.png: draw one layer's groups, as png, pdf or svg.
        layer: which to draw, by default the first with groups.
    """
    if plot is None and layer is not None:
        raise PrunekitError(f"--layer {layer} says which layer to draw; give --plot FILE.png too")
    if plot is not None:
        check_picture(plot)  # before anything that takes time
    groups = pk.discover(load_structure(model))
    drawn = {} if plot is None else {"plot": plot}
    if plot is not None:
        save_picture(plot_groups(groups, layer=layer), plot)
    kinds = groups.summary().reset_index().replace({"exact": {True: "yes", False: "no"}})
    rows = text_table([(*kinds,), *kinds.itertuples(index=False, name=None)])
    lines = [f"{model}: {groups.n_parameters:,} parameters", "", rows, ""]
    lines += ["locked, so never cut:" if groups.locked else "nothing is locked"]
    lines += [f"  {what}: {why}" for what, why in groups.locked.items()]
    lines += ["", f"drawn: {plot}"] if plot else []
    return Answer({"model": model, **groups.to_dict(), **drawn}, "\n".join(lines))


def evaluate(
    models: Annotated[Sequence[str], {"nargs": "+", "type": str, "metavar": "MODEL"}],
    *,
    data: Annotated[str | None, {"flags": ("--text",)}] = None,
    tasks: tuple[str, ...] = (),
    metrics: tuple[str, ...] | None = None,
    asking: Annotated[dict[str, Any], Of(named_tasks, "limit", "shots", "data_dir")],
    reading: Annotated[dict[str, Any], Of(measure_perplexity, "protocol", "window", "stride", "separator")],
    loading: Loading,
) -> Answer:
    r"""Measure models, side by side.

    Measures perplexity on a text (lower is better), accuracy in multiple-choice
    questions, and cost (parameters, multiply-accumulates, memory, time). Several
    models stand side by side. The model "world" and what was cut from it bring text
    and questions of their own.

    tasks: boolq, piqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa,
    mmlu, mmlu_<subject>, lambada; any other name is one of lm-evaluation-harness's,
    where that is installed. Texts: a file, wikitext2, ptb, c4 or world. Both are read
    from --data-dir, else from the hub.

    Example:
        prunekit evaluate world small/ recovered/
        prunekit evaluate dense/ small/ --data test.txt --metrics perplexity,cost
        prunekit evaluate dense/ --tasks boolq,piqa --limit 200 --data wikitext2 \
            --data-dir data/
        prunekit evaluate dense/ --data stories.txt --protocol documents \
            --separator '<|endoftext|>'

    Args:
        models: checkpoint folders, .gguf files, hub ids, "world" or "smollm2".
        data: text for perplexity, a file, wikitext2, ptb, c4 or "world".
        tasks: tasks to answer, with commas, such as boolq,piqa,mmlu_anatomy.
        metrics: with commas, of perplexity, zero_shot and cost (by default all that the model allows).
        asking: options of the tasks.
        reading: options of `measure_perplexity`.
        loading: options of `load`.
    """
    if metrics is not None:
        check_metrics(metrics)
    names, folder = _short_names(models), asking.get("data_dir")
    others = tuple(name for name in tasks if not is_standard(name))
    if others:  # before models are loaded, which takes long
        why = f"{', '.join(map(repr, others))}: no task of prunekit's own{similar(others[0], TASKS)}. "
        harness.make_manager(harness.import_harness(why), None, list(others))
    _check_asking(asking, tasks, data)
    text = standard_text(data, data_dir=folder) if data in TEXTS else data
    ours = [name for name in tasks if name not in others]
    questions = named_tasks(ours, **asking) if ours else None
    reports, said = {}, {}
    for name, source in names.items():
        model, tokenizer = pk.load(source, **loading)
        of_world = is_world_tokenizer(tokenizer)
        able = {"perplexity": of_world or text is not None, "zero_shot": of_world or questions is not None}
        if not tasks and not able["perplexity"] and "perplexity" in (metrics or able):
            raise PrunekitError(
                f"{source!r} has no default text; give --data with a text file, --tasks, or other --metrics"
            )
        wanted = metrics or tuple(name for name in ("perplexity", "zero_shot", "cost") if able.get(name, True))
        if reading and "perplexity" not in wanted:
            option = flag(next(iter(reading)))
            raise PrunekitError(f"{option} is of perplexity, which is not measured; give --data, or leave it out")
        limits: Any = {"limit": asking.get("limit"), "shots": asking.get("shots") or None}
        said[name] = harness.run_harness(model, tokenizer, others, **limits).headline() if others else {}
        given: dict[str, Any] = {"text": text, "tasks": questions, "perplexity_options": reading}
        reports[name] = pk.evaluate(model, tokenizer, wanted, **given)
    without = [name for name, report in reports.items() if metrics is None and not report.zero_shot and not said[name]]
    if without:
        say(f"no zero_shot for {', '.join(without)}: give --tasks, such as boolq,piqa")
    values = {name: _headline(report) | said[name] for name, report in reports.items()}
    return Answer(values, _side_by_side(reports, said))


def _check_asking(asking: dict[str, Any], tasks: Sequence[str], data: str | None) -> None:
    """Raise an error for options of tasks without any, and for a folder from which nothing is read.

    Raises:
        PrunekitError: names the option.
    """
    unread = [name for name in ("limit", "shots") if asking.get(name) and not tasks]
    if asking.get("data_dir") and data not in TEXTS and not any(map(is_standard, tasks)):
        unread.append("data_dir")
    if unread:
        raise PrunekitError(
            f"{flag(unread[0])} is of named tasks{' and texts' * (unread[0] == 'data_dir')}, and none is given; "
            "give --tasks, such as boolq,piqa, or leave it out"
        )


def _short_names(sources: Sequence[str]) -> dict[str, str]:
    """Table name → model: the last part of its path if that is unique.

    Raises:
        PrunekitError: the same model twice.
    """
    if twice := [source for source in sources if sources.count(source) > 1]:
        raise PrunekitError(f"{twice[0]!r} is named twice; name each model once")
    short = [Path(source).name or source for source in sources]
    return dict(zip(short if len(set(short)) == len(short) else sources, sources, strict=True))


def _headline(report: pk.Report) -> dict[str, Any]:
    """The headline figures, and how perplexity was measured."""
    measured = report.perplexity
    return {**report.headline(), "protocol": measured and {**measured.to_dict(), "description": measured.description}}


def _side_by_side(reports: dict[str, pk.Report], said: dict[str, Any]) -> str:
    """One row per metric, those of the harness too, then what holds for all models alike."""
    table, first = pk.compare(reports), next(iter(reports.values()))
    errors = {name: report.zero_shot.by("task")["stderr"] for name, report in reports.items() if report.zero_shot}

    def told(metric: str, name: str) -> str:
        error = errors[name].get(metric) if name in errors else None
        return readable(table.loc[name, metric]) + (f" ± {error:.3f}" if error is not None else "")

    rows = [(metric, *(told(metric, name) for name in reports)) for metric in table]
    keys = dict.fromkeys((task, each) for tasks in said.values() for task, metrics in tasks.items() for each in metrics)
    rows += [(f"{task} {each}", *(str(tasks[task][each]) for tasks in said.values())) for task, each in keys]
    notes = first.table().set_index("metric")["note"]
    lines = [text_table([("", *reports), *rows]), ""]
    lines += [f"{metric}: {notes[metric]}" for metric in COMMON if metric in notes]
    lines += [f"{name}: {report.zero_shot.summary}" for name, report in reports.items() if report.zero_shot]
    return "\n".join(lines)


def knowledge(
    model: str,
    *,
    out: str,
    text: str | None = None,
    importance: Annotated[str | None, {"choices": tuple(IMPORTANCES)}] = None,
    kinds: tuple[str, ...] | None = None,
    measuring: Annotated[dict[str, Any], Of(pk.knowledge_distribution, "tasks", "ratios", "limit", "data_dir", "path")],
    calibration: str | None = None,
    drawing: Drawing,
    loading: Loading,
) -> Answer:
    """Show how each text domain changes without each group of units.

    Each group alone is ablated, at several ratios, and these are evaluated again: the
    questions of --tasks, the windows of --text. OUT gets knowledge.csv (a row a group,
    share and domain), knowledge.png, and knowledge.safetensors, which
    prunekit.KnowledgeDistribution.load reads. OUT is complete or not written; with --path
    an interrupted run goes on.

    Example:
        prunekit knowledge world --ratios 0.5,1 --out map/
        prunekit knowledge MODEL --text wiki=wiki.txt,code=code.txt --calibration text.txt --out map/
        prunekit knowledge MODEL --tasks mmlu --limit 20 --data-dir data/ --calibration text.txt --out map/

    Args:
        model: a checkpoint folder, a .gguf file, a hub id, "world" or "smollm2".
        out: folder to write; it may not exist yet.
        text: what is read, name=file, with commas; each name is a domain.
        importance: by which units go first, by default as in prune.
        kinds: of groups, with commas, by default those that prune cuts.
        measuring: options of `knowledge_distribution`.
        calibration: text file for all importances but l1, l2 and random, or "world" (the default where MODEL is world).
        drawing: options of `calibration_set`.
        loading: options of `load`.
    """
    method = None if importance is None else importance_from_name(importance)
    reads = method is None or method.needs_calibration
    source = text_for(model, calibration, f"importance {importance or 'curvature'!r}" if reads else None)
    check_drawing(source, drawing)
    dense, tokenizer = pk.load(model, **loading)
    units = candidates(pk.discover(dense), kinds)
    calib = pk.calibration_set(source, tokenizer, **drawn(drawing, dense.config)) if source else None
    scores = pk.score(dense, units, method or default_importance(dense, units), calib)
    known = pk.knowledge_distribution(dense, tokenizer, units, scores, text=named_texts(text) or None, **measuring)
    table = known.table()
    if is_first():
        with new_folder(out) as folder:
            table.to_csv(folder / "knowledge.csv", index=False)
            known.save(folder / "knowledge.safetensors")
            save_picture(plot_knowledge(table), folder / "knowledge.png")
    domains = known.worst()
    rows = [[f"{cell:.3g}" if isinstance(cell, float) else cell for cell in row] for row in domains.to_numpy()]
    values = {"model": model, "out": out, "domains": domains.to_dict("records")}
    return Answer(values, text_table([[*domains], *rows]))
