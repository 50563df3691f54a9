"""`prunekit sparsify`, `recover`, `recipe` and `export`."""

import json
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

from transformers import AutoConfig

import prunekit as pk
from prunekit import recipes
from prunekit.cli import inputs
from prunekit.cli.console import Answer, Of, flag, text_table
from prunekit.cli.inputs import Drawing, Loading, Writing, drawn, measured_loss, text_for
from prunekit.errors import PrunekitError
from prunekit.escaping import in_code, in_markdown
from prunekit.files import read_text
from prunekit.models import count_parameters, empty_model, fitting_length
from prunekit.names import GGUF
from prunekit.processes import this_process
from prunekit.recovery.data import hold_out, training_windows
from prunekit.recovery.log import RecoveryLog
from prunekit.sparsity.patterns import pattern_of

METHODS = {"lora": pk.LoRA, "full": pk.FullTuning}
RECIPES = {name.replace("_", "-"): getattr(recipes, name) for name in recipes.__all__}
WINDOWS = {"n_samples": 16, "seq_len": 64}  # default size of the calibration set
SETTINGS = ("r", "alpha", "dropout", "learning_rate", "batch_size", "epochs", "max_steps", "warmup")


def sparsify(
    model: str,
    *,
    out: str,
    zeros: Annotated[dict[str, Any], Of(pk.sparsify, "sparsity", "pattern", "method", "allocation", "layers")],
    calibration: str | None = None,
    drawing: Drawing,
    writing: Writing,
    loading: Loading,
) -> Answer:
    r"""Zero the least important weights of a model.

    Zeroes weights of the matrices in the model's layers, layer after layer, and saves
    the result to OUT, with what was done to each matrix in sparsity.json. Shapes stay:
    a dense engine takes as long as before. OUT is complete or not written.

    Example:
        prunekit sparsify world --sparsity 0.7 --out sparse/
        prunekit sparsify path/to/checkpoint --pattern 2:4 --method sparsegpt \
            --calibration text.txt --n-samples 128 --seq-len 2048 --out sparse/

    Args:
        model: a checkpoint folder, a .gguf file, a hub id, "world" or "smollm2".
        out: folder to write; it may not exist yet.
        zeros: options of `sparsify`.
        calibration: text file, or "world"; magnitude needs none.
        drawing: options of `calibration_set`.
        writing: options of `save`.
        loading: options of `load`.
    """
    if pattern_of(zeros.get("sparsity"), zeros.get("pattern")).sparsity == 0:  # before anything heavy
        raise PrunekitError(
            "nothing would be set to zero; give --sparsity above 0, such as 0.5, or --pattern, such as 2:4"
        )
    reads: str | None = f"--method {zeros.get('method', 'sparsellm')}"  # the option that needs calibration text
    if zeros.get("method") == "magnitude":
        reads = "--allocation global" if zeros.get("allocation") == "global" else None
    text = text_for(model, calibration, reads)
    inputs.check_drawing(text, drawing)
    dense, tokenizer = pk.load(model, **loading)
    drawing = drawn(drawing, dense.config, **WINDOWS)
    calib = pk.calibration_set(text, tokenizer, **drawing) if text is not None else None
    held_out = inputs.held_out_windows(text, tokenizer, drawing, seen=True)
    sparse: Any = pk.sparsify(dense, calib, **zeros, inplace=True, held_out=held_out)
    pk.save(sparse, out, tokenizer=tokenizer, **writing)
    report: pk.SparsityReport = sparse.sparsity_report
    loss = measured_loss(report.loss)
    rows = [
        (number, f"{row.sparsity:.1%}", f"{row.error:.4f}" if row.error == row.error else "not measured")
        for number, row in report.by_layer().iterrows()
    ]
    told = [*report.remarks, *(f"{name} stays dense: {why}" for name, why in report.left.items())]
    lines = [text_table([("layer", "zeros", "output error"), *rows]), "", repr(report), *(f"- {line}" for line in told)]
    values = {"method": report.method, "asked": report.target, "sparsity": report.sparsity}
    values |= {"left_dense": dict(report.left), "remarks": list(report.remarks)}
    return Answer({"model": model, "out": out, **values, "loss": loss}, "\n".join(lines))


def recover(
    model: str,
    *,
    data: str,
    out: str,
    method: Annotated[str, {"choices": tuple(METHODS)}] = "lora",
    preset: Literal["paper"] | None = None,
    settings: Annotated[
        dict[str, Any], Of(pk.LoRA, *SETTINGS, "targets", "seq_len", "seed"), Of(pk.FullTuning, "weight_decay")
    ],
    training: Annotated[dict[str, Any], Of(pk.recover, "train_on", "keep_zeros", "folder")],
    teacher: str | None = None,
    distilling: Annotated[
        dict[str, Any], Of(pk.Distillation, "kl", "temperature", "text_share", "top_k", "hidden_share")
    ],
    writing: Writing,
    loading: Loading,
) -> Answer:
    """Train a pruned model to recover its quality.

    Trains small low-rank updates (LoRA) of the model's projections on a text and merges
    them into the weights, or (--method full) trains all weights, and saves the result
    to OUT, with the loss of each step in recovery.json. The last twentieth of the text
    (at most 1,024 tokens) is held out, to measure the loss before and after. Where
    sparsity.json reports zeros in the weights, they stay zero. With --teacher DENSE the
    model learns to predict what the model before pruning predicts. OUT is complete or
    not there. torchrun and accelerate launch run it in several processes.

    Example:
        prunekit recover small/ --data text.txt --out recovered/
        prunekit recover small/ --data world --r 8 --epochs 2 --out recovered/
        prunekit recover small/ --data text.txt --method full --dtype float32 --out recovered/
        prunekit recover small/ --data text.txt --teacher dense/ --out distilled/

    Args:
        model: a checkpoint folder, a .gguf file, a hub id, "world" or "smollm2".
        data: a file of text or records (.txt, .jsonl, .csv, .parquet and others), or "world".
        out: folder to write; it may not exist yet.
        method: lora (the default), or full, whose learning rate is 0.0001 by default.
        preset: LLM-Pruner's settings of LoRA, for models of billions of parameters.
        settings: of the method.
        training: options of `recover`.
        teacher: the model before pruning, to distil from: what `model` can be.
        distilling: options of `Distillation`, with --teacher; --hidden-share reads MODEL's plan.json.
        writing: options of `save`.
        loading: options of `load`.
    """
    how = _settings_of(method, preset, settings)
    this_process()  # of several, each has a GPU of its own as its default
    dense, tokenizer = pk.load(model, **loading)
    if "seq_len" not in settings:
        how = replace(how, seq_len=fitting_length(how.seq_len, dense.config))
    if distilling and teacher is None:
        raise PrunekitError(f"{flag(next(iter(distilling)))} is for distillation: give --teacher DENSE too")
    if distilling.get("hidden_share") and (cut_by := Path(model) / "plan.json").is_file():
        distilling = {**distilling, "plan": pk.PruningPlan.load(cut_by)}
    marked = {"train_on": training["train_on"]} if "train_on" in training else {}
    windows, held_out = hold_out(training_windows(data, tokenizer, how.seq_len, **marked))
    method_used = how if teacher is None else pk.Distillation(pk.load(teacher, **loading)[0], how, **distilling)
    recovered: Any = pk.recover(dense, method_used, windows, inplace=True, held_out=held_out, **training)
    log: RecoveryLog = recovered.recovery_log
    if this_process().is_main_process:
        pk.save(recovered, out, tokenizer=tokenizer, files=_files(model, log), **writing)
    loss = measured_loss(log.loss_change)
    first, last = log.ends
    rows = [("", "first", "last", "steps"), ("loss", f"{first:.3f}", f"{last:.3f}", len(log.losses))]
    values = {"steps": len(log.losses), "loss_first": first, "loss_last": last, "loss": loss, "method": log.method}
    text = f"{text_table(rows)}\n\n{log.trainable:,} weights trained\n{log.loss_change}"
    return Answer({"model": model, "out": out, **values}, text)


def _settings_of(method: str, preset: str | None, settings: dict[str, Any]) -> pk.LoRA | pk.FullTuning:
    """Training settings from the options.

    Raises:
        PrunekitError: a setting that the method does not have, or a value that cannot be.
    """
    kind = METHODS[method]
    if preset is not None and kind is not pk.LoRA:
        raise PrunekitError(f"--preset {preset} is for --method lora; leave out one of the two")
    if unknown := [name for name in settings if name not in signature(kind).parameters]:
        raise PrunekitError(f"--method {method} has no {flag(unknown[0])}; leave one of the two out")
    return replace(pk.LoRA.paper() if preset else kind(), **settings)


def _files(model: str, log: RecoveryLog) -> dict[str, str]:
    """The loss curve, and what stood beside the pruned model: its plan, and its card with a section added."""
    folder, (first, last) = Path(model), log.ends
    pruned = any((folder / name).is_file() for name in ("plan.json", "sparsity.json"))
    carried = {n: read_text(folder / n) for n in ("plan.json", "README.md") if pruned and (folder / n).is_file()}
    section = (
        f"\n## Recovered\n\n{in_code(log.method)} on {log.n_tokens:,} tokens, {len(log.losses)} steps: "
        f"loss {first:.3f} → {last:.3f} (`recovery.json`). Before and after: {in_markdown(log.loss_change)}.\n"
    )
    before = carried.get("README.md", f"# A model trained by prunekit\n\n- Made from: {in_code(model)}\n")
    return {**carried, "README.md": before + section, "recovery.json": json.dumps(log.to_dict(), indent=1)}


def recipe(
    name: Annotated[str, {"choices": tuple(RECIPES)}],
    model: str,
    *,
    out: str,
    data: str | None = None,
    calibration: str | None = None,
    settings: Annotated[
        dict[str, Any],
        Of(recipes.llm_pruner, "pruning_ratio", "mode", "layers", "ranking", "normalize", "n_steps", "modern"),
        Of(recipes.hywia, "rule", "order"),
        Of(recipes.lorashear, "gamma", "n_periods", "folder"),
        Of(recipes.sparsellm, "sparsity", "pattern", "n_iterations", "faithful", "half_depth", "allocation"),
        Of(recipes.accuracy_predictor, "text", "whole_layers", "n_pairs", "n_rounds", "top_k", "n_jobs"),
    ],
    training: Annotated[dict[str, Any], Of(pk.LoRA, *SETTINGS)],
    drawing: Drawing,
    writing: Writing,
    loading: Loading,
) -> Answer:
    r"""Run a published system from beginning to end.

    Prunes as the paper does, at its settings, recovers where --data is given, and saves
    the result to OUT with its plan. lorashear maps knowledge, prunes progressively while
    it trains and needs --data; accuracy-predictor searches architectures under a ratio.
    An option that a recipe does not have is refused. OUT is complete or not written.

    Example:
        prunekit recipe llm-pruner MODEL --pruning-ratio 0.25 --calibration text.txt --out small/
        prunekit recipe lorashear MODEL --data wiki=wiki.txt,code=code.txt --folder work/ --out small/
        prunekit recipe accuracy-predictor MODEL --pruning-ratio 0.35 --calibration text.txt \
            --text other.txt --folder search/ --out small/

    Args:
        name: llm-pruner, hywia, lorashear, sparsellm or accuracy-predictor.
        model: a checkpoint folder, a .gguf file, a hub id, "world" or "smollm2".
        out: folder to write; it may not exist yet.
        data: text to train on; for lorashear several, name=file, with commas.
        calibration: text file, or "world" (the default where MODEL is world).
        settings: of the recipe; each is described for the first that has it.
        training: settings of LoRA, where it is not to train as the recipe does by itself.
        drawing: options of `calibration_set`.
        writing: options of `save`.
        loading: options of `load`.
    """
    function = RECIPES[name]
    takes = signature(function).parameters
    if "budgets" in takes and "pruning_ratio" in settings:
        settings["budgets"] = settings.pop("pruning_ratio")
    if unknown := [option for option in settings if option not in takes]:
        raise PrunekitError(f"recipe {name} has no {flag(unknown[0])}; leave it out")
    if "sources" in takes and data is None:
        raise PrunekitError(f"recipe {name} trains; give --data, such as wiki=wiki.txt,code=code.txt")
    unread = [] if "calib" in takes else [*(["calibration"] if calibration else []), *drawing]
    if unread:
        raise PrunekitError(f"recipe {name} reads no calibration text, so it has no {flag(unread[0])}")
    if training and data is None:
        raise PrunekitError(
            f"{flag(next(iter(training)))} is a setting of recovery, which reads text; give --data too, or leave it out"
        )
    if "budgets" in takes and "budgets" not in settings:
        raise PrunekitError(f"how much is to go? recipe {name} needs --pruning-ratio, such as 0.35")
    if 0 in (settings.get("pruning_ratio"), settings.get("budgets"), settings.get("sparsity")):
        raise PrunekitError(f"recipe {name} would remove nothing; give a fraction above 0, such as 0.25")
    text = text_for(model, calibration, f"recipe {name}") if "calib" in takes else None
    dense, tokenizer = pk.load(model, **loading)
    given: dict[str, Any] = {"tokenizer": tokenizer, "data": data, "sources": inputs.named_texts(data)}
    if training:
        length = fitting_length(pk.LoRA.seq_len, dense.config)
        given["method"] = given["recovery"] = pk.LoRA(**{"seq_len": length, **training})
    if text is not None:
        given["calib"] = pk.calibration_set(text, tokenizer, **drawn(drawing, dense.config, **WINDOWS))
    made = function(dense, **{key: value for key, value in given.items() if key in takes}, **settings)
    plan: pk.PruningPlan | None = getattr(made, "plan", None)
    pk.save(made[0], out, tokenizer=tokenizer, plan=plan, **writing)
    change = getattr(made[0], "loss_change", None)
    text = text_table(plan.summary_rows()) if plan is not None else repr(made.report)
    counts = {"n_parameters_kept": count_parameters(made[0])}
    loss = None if change is None else change.to_dict()
    whole = f"\nnothing goes of {plan.notes['whole']}" if plan is not None and "whole" in plan.notes else ""
    return Answer({"model": model, "out": out, "recipe": name, **counts, "loss": loss}, f"{text}{whole}\n\n{change}")


def export(
    model: str, *, out: str, layout: Annotated[dict[str, Any], Of(pk.export, "layout")], writing: Writing
) -> Answer:
    """Write a checkpoint for programs without prunekit.

    Writes a folder that loads without prunekit, proved to give the same logits:
    plain for what the family's own configuration can say; padded fills layers of
    uneven widths up to even ones with zeros; gguf writes model.gguf for llama.cpp,
    of a LLaMA, whose layers may differ in heads and channels. OUT is complete or not written.

    Example:
        prunekit export small/ --layout padded --out even/
        prunekit export path/to/plain --layout gguf --out for_llama_cpp/

    Args:
        model: a checkpoint folder, a .gguf file, a hub id, "world" or "smollm2".
        out: folder to write; it may not exist yet.
        layout: options of `export`.
        writing: options of `save`.
    """
    whole, tokenizer = pk.load(model)
    cut_by, kind = Path(model) / "plan.json", layout.get("layout", "plain")
    plan = pk.PruningPlan.load(cut_by) if cut_by.is_file() else None
    folder = pk.export(whole, out, **layout, tokenizer=tokenizer, plan=plan, **writing)
    before = after = count_parameters(whole)
    if kind != GGUF:
        after = count_parameters(empty_model(AutoConfig.from_pretrained(folder)))
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    sizes = text_table([("", "bytes"), *((name, f"{size:,}") for name, size in files.items())])
    counts = {"n_parameters": before, "n_parameters_written": after}
    text = f"{kind}: {before:,} parameters before, {after:,} after\n\n{sizes}"
    return Answer({"model": model, "out": out, "layout": kind, **counts, "files": files}, text)
