"""Generated calls: every public function and every argument with wrong values, from a seed.

A call either ends with a `PrunekitError`, or the value makes sense there: `SENSE` says which do. Any other exception,
and any other value that is accepted, is a fault.
"""

import copy
import random
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightgbm  # noqa: F401 - what it imports draws from Python's random numbers, once
import numpy as np
import pandas as pd
import pytest
import torch
from evaluation_helpers import TEXT, byte_tokenizer, choice_task, llama
from torch import nn

import prunekit as pk
from prunekit import recipes
from prunekit.cli import main
from prunekit.errors import PrunekitError
from prunekit.recovery.lhspg import update_saliency
from prunekit.recovery.lora import attach
from prunekit.search import Choice, HyperparameterSpace, Metric, Range, Trees

SEED = 0
PER_ARGUMENT = 10  # values that are drawn for each argument
LEAST, LEAST_WHOLE = 1000, 500  # cases in all
WHOLE = (
    "LHSPG",
    "accuracy_predictor",
    "hywia",
    "lorashear",
    "prune_progressively",
    "recover_on_mixture",
    "search_space",
    "sparsellm",
)
CALIB = torch.arange(64).view(4, 16) % 200 + 2

POOL: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "-1": lambda: -1,
    "0": lambda: 0,
    "3": lambda: 3,
    "2**32": lambda: 2**32,
    "10**400": lambda: 10**400,
    "0.5": lambda: 0.5,
    "-0.5": lambda: -0.5,
    "inf": lambda: float("inf"),
    "nan": lambda: float("nan"),
    "1j": lambda: 1j,
    "a word": lambda: "word",
    "an empty text": lambda: "",
    "a long text": lambda: "x" * 5000,
    "a text with NUL": lambda: "a\0b",
    "bytes": lambda: b"bytes",
    "[]": lambda: [],
    "[None]": lambda: [None],
    "['word']": lambda: ["word"],
    "[nan]": lambda: [float("nan")],
    "{}": lambda: {},
    "{'word': None}": lambda: {"word": None},
    "{1: 2}": lambda: {1: 2},
    "set()": lambda: set(),
    "(1, 2)": lambda: (1, 2),
    "(2, 1)": lambda: (2, 1),
    "an object": object,
    "a class": lambda: dict,
    "a function": lambda: lambda *args, **options: None,
    "a module": lambda: nn.Linear(2, 2),
    "DataParallel": lambda: nn.DataParallel(nn.Linear(2, 2)),
    "floats": lambda: torch.rand(2, 4),
    "meta tensor": lambda: torch.zeros(2, 8, dtype=torch.long, device="meta"),
    "sparse tensor": lambda: torch.ones(2, 8, dtype=torch.long).to_sparse(),
    "nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "empty tensor": lambda: torch.zeros(0, 8, dtype=torch.long),
    "scalar tensor": lambda: torch.tensor(3),
    "tokens too high": lambda: torch.full((2, 8), 10**6),
    "an array": lambda: np.ones(3),
    "a table": lambda: pd.DataFrame({"a": [1]}),
    "a path": lambda: Path("gone/x"),
}


@dataclass(frozen=True)
class Call:
    """A call that works, and arguments of it that are made anew each time."""

    function: Callable[..., Any]
    good: Mapping[str, Any] = field(default_factory=dict)
    fresh: Mapping[str, Callable[[], Any]] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        return {**self.good, **{name: make() for name, make in self.fresh.items()}}


def is_integer(low, high=float("inf")):
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v < high


def is_number(low, high):
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and low <= v < high


def none_or(sense):
    return lambda v: v is None or sense(v)


def one_of(*values):
    return lambda v: any(type(v) is type(each) and v == each for each in values)


def is_text(v):
    return isinstance(v, str)


COUNT, SEEDS = is_integer(1, 2**31), is_integer(0, 2**32)
FLAG, NEVER = one_of(True, False), one_of()
POSITIVE = is_number(1e-30, 1e300)


def is_empty(v):
    return isinstance(v, list | set | dict | tuple) and len(v) == 0


def is_prose(v):
    """A text that can be read: of itself, in a list or a set, or as ids."""
    return is_text(v) and v.strip() != ""


SENSE: dict[str, Callable[[Any], bool]] = {
    # argument, or function.argument → whether a value makes sense there
    "n_samples": COUNT,
    "seq_len": none_or(is_integer(2, 97)),
    "seed": SEEDS,
    "separator": none_or(is_text),
    "bos": none_or(FLAG),
    "held_out": none_or(FLAG),
    "inplace": FLAG,
    "measure": FLAG,
    "normalize": one_of(None),
    "pruning_ratio": is_number(0, 1),
    "kinds": none_or(NEVER),
    "protect_layers": is_empty,
    "after": one_of(None),
    "compensate": one_of(None),
    "groups": one_of(None),
    "ridge": none_or(POSITIVE),
    "report_error": FLAG,
    "layers": one_of(None),
    "pattern": one_of(None, (1, 2)),
    "keep_zeros": none_or(FLAG),
    "tokenizer": one_of(None),
    "data": is_prose,
    "text": none_or(is_prose),
    "output_dir": lambda v: v is None or is_text(v) or isinstance(v, Path),
    "window": none_or(is_integer(2, 97)),
    "stride": none_or(is_integer(1, 97)),
    "batch_size": none_or(COUNT),
    "limit": none_or(COUNT),
    "shots": is_integer(0, 1000),
    "data_dir": lambda v: v is None or is_text(v) or isinstance(v, Path),  # read where a task is named
    "device": one_of(None, 0),
    "device_map": one_of(None),
    "offload_folder": one_of(None),
    "repeats": COUNT,
    "path": one_of(None),
    "tokens_a_batch": COUNT,
    "out": lambda v: is_text(v) or isinstance(v, Path),
    "plan": one_of(None),
    "report": one_of(None),
    "files": lambda v: v is None or v == {},
    "max_shard_size": is_integer(1, 2**63),
    "dtype": one_of("auto"),
    "trust_remote_code": FLAG,
    "notes": lambda v: v is None or isinstance(v, dict),
    "metric": NEVER,
    "start": is_empty,
    "folder": lambda v: v is None or is_text(v) or isinstance(v, Path),
    "n_jobs": one_of(1, -1),
    "also": is_empty,
    "tasks": none_or(NEVER),
    "n": COUNT,
    "max_new_tokens": is_integer(1, 90),
    "prompts": lambda v: is_prose(v) or v == ["word"],
    "layer": none_or(is_integer(0, 2)),
    "mixture": one_of(None),
    "protect": is_empty,
    "n_periods": COUNT,
    "warmup": is_number(0, 1e300),
    "rest": is_number(0, 1),
    "r": is_integer(1, 2**16 + 1),
    "alpha": none_or(POSITIVE),
    "beta": none_or(POSITIVE),
    "gamma": none_or(POSITIVE),
    "dropout": is_number(0, 1),
    "targets": none_or(lambda v: isinstance(v, list | tuple) and len(v) > 0 and all(map(is_text, v))),
    "learning_rate": POSITIVE,
    "epochs": is_number(1e-30, 10_001),
    "max_steps": none_or(COUNT),
    "weight_decay": is_number(0, 1e300),
    "n_rounds": COUNT,
    "uniform_share": is_number(0, 1.01),
    "temperature": POSITIVE,
    "n_validation": COUNT,
    "n_iterations": COUNT,
    "faithful": FLAG,
    "n_trees": COUNT,
    "n_models": COUNT,
    "n_leaves": is_integer(2),
    "min_pairs": COUNT,
    "n_steps": COUNT,
    "round_to": lambda v: COUNT(v) or v == {},
    "min_units": COUNT,
    "damping": POSITIVE,
    "mode": NEVER,
    "modern": FLAG,
    "recovery": one_of(None),
    "half_depth": FLAG,
    "importance": NEVER,
    "label": is_text,
    "perplexity_options": lambda v: v is None or v == {},
    "zero_shot_options": lambda v: v is None or v == {},
    "cost_options": lambda v: v is None or v == {},
    "top_k": COUNT,
    "n_cuts": is_integer(0),
    "trees": one_of(None),
    "source": one_of(None),
    "text_or_path": is_prose,
    # where the same name means something else
    "cost.seq_len": is_integer(1, 97),
    "score.calib": lambda v: v is None,
    "score.importance": NEVER,
    "fuse.rule": one_of((1, 2), (2, 1)),
    "sparsify.sparsity": is_number(0, 1),
    "sparsify.held_out": one_of(None),
    "prune.held_out": one_of(None),
    "recover.held_out": one_of(None),
    "recover.seq_len": none_or(is_integer(2, 97)),
    "keep_logits.top_k": is_integer(1),
    "keep_logits.folder": lambda v: v is None or (is_text(v) and v != "") or isinstance(v, Path),
    "Distillation.temperature": none_or(POSITIVE),
    "Distillation.top_k": none_or(is_integer(1)),
    "Distillation.kl": NEVER,
    "Distillation.text_share": one_of(0, 1, 0.5, True),
    "evaluate.metrics": NEVER,
    "knowledge_distribution.ratios": lambda v: isinstance(v, np.ndarray),
    "LoRA.warmup": is_number(0, 1e300),
    "LoRA.seq_len": is_integer(2),
    "FullTuning.seq_len": is_integer(2),
    "measure_pairs.model": lambda v: isinstance(v, nn.Linear),
    "measure_pairs.tokenizer": one_of(None),
    "save.tokenizer": one_of(None),
    "prune_checkpoint.source": NEVER,
    "load.source": NEVER,
    "load.device": one_of("cpu"),
    "compensate.plan": NEVER,
    "reconstruct.plan": NEVER,
    "reconstruct.steps": COUNT,
    "reconstruct.batch_size": COUNT,
    "prune.plan": NEVER,
    "plan.groups": NEVER,
    "score.groups": NEVER,
    "knowledge_distribution.groups": NEVER,
    "knowledge_distribution.path": one_of(None),
    "prune_progressively.folder": lambda v: v is None or is_text(v) or isinstance(v, Path),
    "prune_progressively.warmup": is_number(0, 1),
    "standard_text.name": NEVER,
    "llm_pruner.layers": none_or(is_empty),
    "massive_activations.groups": NEVER,
    "Choice.options": lambda v: v in ((1, 2), (2, 1), ["word"]),
    "Range.low": is_number(-1e300, 1),
    "Range.high": is_number(1e-30, 1e300),
    "Metric.name": lambda v: is_text(v) and v != "",
    "Metric.measure": callable,
    "Metric.maximize": FLAG,
    "Metric.log": FLAG,
    "Metric.of": is_text,
    "HyperparameterSpace.of": is_text,
    "HyperparameterSpace.build": callable,
    "HyWIA.rule": one_of("attention", (1, 2), (2, 1)),
    "calibration_set.source": lambda v: is_prose(v) or (isinstance(v, torch.Tensor) and v.dtype is torch.int64),
    "plan_in_steps.calib": one_of(None),
    "llm_pruner.calib": one_of(None),
    "discover.model": lambda v: isinstance(v, nn.Linear),  # whose channels are found as well
    # not read there, for the metric is another
    "measure_pairs.text": lambda v: True,
    "measure_pairs.tasks": lambda v: True,
    "evaluate.tasks": lambda v: True,
    "knowledge_of_units.text": lambda v: v is None or is_empty(v) or is_prose(v),
    "knowledge_distribution.text": lambda v: v is None or is_empty(v) or is_prose(v),
    "ablate.groups": NEVER,
    "needs.groups": NEVER,
    "needs.question": is_prose,
    "needs.choices": one_of(None),
    "needs.channels": is_integer(0, 2**31),
    "exciting_tokens.groups": NEVER,
    "attention_pattern.head": is_integer(0, 4),
    "attention_pattern.layer": is_integer(0, 2),
    "ask.prompt": is_prose,
    "ask.choices": lambda v: v is None or v == ["word"],
    "distributions": NEVER,
    "n_resamples": COUNT,
    "explore.text": none_or(lambda v: is_prose(v) or v == ["word"]),
    "exciting_tokens.text": lambda v: is_prose(v) or v == ["word"],
    "explore.channels": is_integer(0, 2**31),
    "known": one_of(None),
    "compared": one_of(None),
    "top": COUNT,
    # another default stands for None
    "recover_on_mixture.method": one_of(None),
    "prune_progressively.method": one_of(None),
    "plan.ranking": one_of(None),
    # what the good call does reads no calibration set
    "sparsify.calib": one_of(None),
    "prune_checkpoint.calib": one_of(None),
    "measure_pairs.source": lambda v: v is None or is_text(v) or isinstance(v, Path),
    "llm_pruner.data": one_of(None),
    "hywia.data": one_of(None),
    "hywia.rule": one_of("attention", (1, 2), (2, 1)),
    "lorashear.instructions": one_of(None),
    "lorashear.method": one_of(None),
    "lorashear.importance": one_of(None),
    "lorashear.gamma": is_number(0, 1),
    "accuracy_predictor.budgets": is_number(0, 1),
    "accuracy_predictor.start_known": FLAG,
    "accuracy_predictor.whole_layers": is_integer(0),
    "sparsellm.sparsity": is_number(0, 1),
    "LHSPG.epsilon": is_number(0, 1),
    "LHSPG.lr": is_number(0, 1e300),
    "LHSPG.warmup_steps": is_integer(0),
    "LHSPG.period_steps": COUNT,
    "LHSPG.saliency": callable,
    "sparsellm.data": one_of(None),
    "accuracy_predictor.data": one_of(None),
}


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """A working call of every public function and every class of settings."""
    root = tmp_path_factory.mktemp("fuzz")
    model, tokenizer, task = llama(), byte_tokenizer(), choice_task(4)
    groups = pk.discover(model)
    units = groups.of_kind("kv_head", "ffn_channel")
    scores = pk.score(model, units, pk.Magnitude())
    plan = pk.plan(groups, scores, 0.2)
    small = pk.prune(model, plan, measure=False)
    pk.save(model, root / "model", tokenizer=tokenizer)
    report = pk.evaluate(model, tokenizer, ["zero_shot"], tasks=[task])
    known = pk.knowledge_of_units(model, tokenizer, units[:1], tasks=[task], limit=2)
    space = HyperparameterSpace({"a": Range(0.0, 1.0)}, build=_as_it_is)
    quick = pk.LoRA(max_steps=1, batch_size=2, seq_len=16)
    adapted = attach(copy.deepcopy(model), quick)
    discovered = pk.discover(adapted).of_kind("ffn_channel")
    numbers = iter(range(10**6))

    def new():
        return root / f"new{next(numbers)}"

    reading = {"model": model, "tokenizer": tokenizer}
    found = {
        "discover": Call(pk.discover, {"model": model}),
        "score": Call(
            pk.score,
            {"model": model, "groups": units, "importance": pk.Taylor(), "calib": CALIB, "normalize": None},
        ),
        "plan": Call(
            pk.plan,
            {
                "groups": groups, "scores": scores, "pruning_ratio": 0.2, "of": "parameters", "ranking": "local",
                "kinds": None, "protect_layers": (), "round_to": 1, "min_units": 1, "after": None,
            },
        ),
        "plan_in_steps": Call(
            pk.plan_in_steps,
            {
                "model": model, "importance": pk.Magnitude(), "pruning_ratio": 0.2, "calib": None, "n_steps": 1,
                "normalize": None, "groups": groups,
            },
        ),
        "prune": Call(
            pk.prune,
            {"plan": plan, "inplace": False, "compensate": None, "fit": "weights", "held_out": None, "measure": False},
            {"model": lambda: copy.deepcopy(model)},
        ),
        "compensate": Call(
            pk.compensate,
            {"model": model, "plan": plan, "calib": CALIB, "fit": "weights", "ridge": 0.3},
            {"small": lambda: copy.deepcopy(small)},
        ),
        "reconstruct": Call(
            pk.reconstruct,
            {
                "model": model, "plan": plan, "calib": CALIB, "steps": 1, "learning_rate": 1e-4, "batch_size": 2,
                "seed": 0,
            },
            {"small": lambda: copy.deepcopy(small)},
        ),
        "sparsify": Call(
            pk.sparsify,
            {
                "calib": CALIB, "method": "magnitude", "sparsity": 0.5, "pattern": None, "allocation": "uniform",
                "layers": None, "damping": 0.01, "report_error": False, "inplace": False, "held_out": None,
                "measure": False,
            },
            {"model": lambda: copy.deepcopy(model)},
        ),
        "recover": Call(
            pk.recover,
            {
                "method": quick, "data": CALIB, "train_on": "replies", "keep_zeros": False, "tokenizer": tokenizer,
                "seq_len": 16, "inplace": False, "output_dir": None, "folder": None, "held_out": None,
                "measure": False,
            },
            {"model": lambda: copy.deepcopy(model)},
        ),
        "keep_logits": Call(
            pk.keep_logits,
            {
                "teacher": model, "data": CALIB, "top_k": 4, "temperature": 1.0, "train_on": "replies",
                "tokenizer": tokenizer, "seq_len": 16,
            },
            {"folder": new},
        ),
        "recover_on_mixture": Call(
            pk.recover_on_mixture,
            {
                "dense": model, "sources": {"a": CALIB.repeat(4, 1)}, "method": quick,
                "mixture": pk.Mixture(n_rounds=1), "train_on": "replies", "keep_zeros": False, "tokenizer": tokenizer,
                "inplace": False,
            },
            {"model": lambda: copy.deepcopy(model)},
        ),
        "prune_progressively": Call(
            pk.prune_progressively,
            {
                "model": model, "pruning_ratio": 0.1, "data": CALIB, "method": pk.LoRA(max_steps=2, batch_size=2),
                "protect": (), "n_periods": 1, "warmup": 0.0, "rest": 0.0, "tokenizer": tokenizer, "folder": None,
            },
        ),
        "save": Call(
            pk.save,
            {
                "model": small, "tokenizer": tokenizer, "plan": plan, "report": None, "files": {"a": "b"},
                "max_shard_size": "1MB",
            },
            {"out": new},
        ),
        "export": Call(
            pk.export,
            {"model": model, "layout": "plain", "tokenizer": tokenizer, "plan": plan, "max_shard_size": "1MB"},
            {"out": new},
        ),
        "load": Call(
            pk.load,
            {
                "source": root / "model", "dtype": "auto", "device": "cpu", "device_map": None, "offload_folder": None,
                "trust_remote_code": False,
            },
        ),
        "prune_checkpoint": Call(
            pk.prune_checkpoint,
            {
                "source": root / "model", "how": pk.Magnitude(), "pruning_ratio": 0.2, "calib": None,
                "max_shard_size": "1MB", "notes": {},
            },
            {"out": new},
        ),
        "perplexity": Call(
            pk.perplexity,
            {
                **reading, "text_or_path": TEXT, "window": 32, "stride": 16, "protocol": "windows", "separator": None,
                "bos": None, "batch_size": 4,
            },
        ),
        "zero_shot": Call(
            pk.zero_shot,
            {**reading, "tasks": [task], "limit": 2, "data_dir": None, "shots": 0, "batch_size": 4},
        ),
        "evaluate": Call(
            pk.evaluate,
            {
                **reading, "metrics": ["perplexity"], "text": TEXT, "tasks": [task], "batch_size": 4,
                "perplexity_options": {"window": 32}, "zero_shot_options": {}, "cost_options": {},
            },
        ),
        "cost": Call(pk.cost, {"model": model, "seq_len": 4, "batch_size": 1, "repeats": 1, "device": None}),
        "generations": Call(
            pk.generations,
            {"models": {"a": model}, "tokenizer": tokenizer, "prompts": ["the cat"], "max_new_tokens": 2},
        ),
        "compare": Call(pk.compare, {"reports": {"a": report}}),
        "compare_accuracy": Call(pk.compare_accuracy, {"reports": {"a": report}, "by": "task"}),
        "knowledge_distribution": Call(
            pk.knowledge_distribution,
            {
                **reading, "groups": units[:1], "scores": scores, "ratios": (0.5,), "tasks": [task], "text": None,
                "limit": 1, "data_dir": None, "path": None, "tokens_a_batch": 64,
            },
        ),
        "knowledge_of_units": Call(
            pk.knowledge_of_units,
            {
                **reading, "groups": units[:1], "tasks": [task], "text": None, "limit": 1, "data_dir": None,
                "path": None, "tokens_a_batch": 64,
            },
        ),
        "massive_activations": Call(
            pk.massive_activations, {"model": model, "groups": groups, "tokens": CALIB, "layer": None}
        ),
        "ablate": Call(
            pk.ablate,
            {"model": model, "groups": units, "units": {units[0].name: [0]}, "mode": "mean", "tokens": CALIB},
        ),
        "ask": Call(pk.ask, {**reading, "prompt": "the cat", "choices": [" sat", " ran"], "max_new_tokens": 2}),
        "needs": Call(
            pk.needs,
            {
                **reading, "question": "the cat", "answer": " sat", "groups": units[:2], "choices": [" sat", " ran"],
                "measure": "answer", "channels": 1,
            },
        ),
        "attention_pattern": Call(pk.attention_pattern, {**reading, "text": "the cat", "layer": 1, "head": 0}),
        "exciting_tokens": Call(pk.exciting_tokens, {**reading, "groups": units[:1], "text": TEXT, "top": 3}),
        "compare_knowledge": Call(
            pk.compare_knowledge,
            {"distributions": {"a": known}, "by": "domain", "measure": "loss", "n_resamples": 20, "seed": 0},
        ),
        "explore": Call(
            pk.explore,
            {
                **reading, "groups": units[:2], "tasks": [task], "data_dir": None, "known": known, "compared": None,
                "text": CALIB, "channels": 0,
            },
        ),
        "fuse": Call(pk.fuse, {"coarse": scores, "fine": scores, "rule": "attention"}),
        "calibration_set": Call(
            pk.calibration_set,
            {
                "source": TEXT, "tokenizer": tokenizer, "n_samples": 2, "seq_len": 8, "seed": 0, "separator": None,
                "bos": None, "held_out": False,
            },
        ),
        "standard_text": Call(pk.standard_text, {"name": "ptb", "data_dir": root}),
        "measure_pairs": Call(
            pk.measure_pairs,
            {
                "space": space, "model": nn.Linear(2, 2), "tokenizer": None, "n": 1,
                "metric": Metric("m", _one), "also": (), "text": None, "tasks": None, "start": (), "seed": 0,
                "folder": None, "n_jobs": 1, "backend": "loky", "source": None,
            },
        ),
        "search_space": Call(
            pk.search_space,
            {
                "space": space, "model": nn.Linear(2, 2), "tokenizer": None, "n_pairs": 10, "n_rounds": 1, "top_k": 1,
                "n_cuts": 0, "metric": Metric("m", _one), "also": (), "text": None, "tasks": None, "start": (),
                "trees": Trees(n_models=1, n_trees=2), "seed": 0, "folder": None, "n_jobs": 1, "backend": "loky",
                "source": None,
            },
        ),
        "hywia": Call(
            recipes.hywia,
            {
                "model": model, "calib": CALIB, "pruning_ratio": 0.2, "rule": "attention", "order": "first",
                "layers": [0, 1], "data": None, "tokenizer": None, "recovery": None,
            },
        ),
        "sparsellm": Call(
            recipes.sparsellm,
            {
                "model": model, "calib": CALIB, "sparsity": 0.5, "pattern": None, "n_iterations": 1, "faithful": False,
                "half_depth": False, "allocation": "uniform", "data": None, "tokenizer": None, "recovery": None,
            },
        ),
        "lorashear": Call(
            recipes.lorashear,
            {
                "model": model, "tokenizer": tokenizer, "sources": {"a": CALIB.repeat(4, 1)}, "pruning_ratio": 0.1,
                "instructions": None, "method": pk.LoRA(max_steps=10, batch_size=2), "mixture": pk.Mixture(n_rounds=1),
                "gamma": 0.0, "importance": pk.Magnitude(), "n_periods": 1, "shares": (0.6, 0.3, 0.1), "folder": None,
            },
        ),
        "accuracy_predictor": Call(
            recipes.accuracy_predictor,
            {
                "model": model, "tokenizer": tokenizer, "calib": CALIB, "budgets": 0.2, "text": TEXT,
                "importances": ["l1"], "whole_layers": 0, "start_known": False, "n_pairs": 10, "n_rounds": 1,
                "top_k": 1, "trees": Trees(n_models=1, n_trees=2), "seed": 0, "folder": None,
                "data": None, "recovery": None,
            },
        ),
        "LHSPG": Call(
            pk.LHSPG,
            {
                "model": adapted, "groups": discovered, "n_units": {"ffn_channel": 2}, "warmup_steps": 1,
                "period_steps": 1, "n_periods": 1, "saliency": update_saliency, "epsilon": 0.0, "min_units": 1,
                "lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0,
            },
        ),
        "llm_pruner": Call(
            recipes.llm_pruner,
            {
                "model": model, "calib": CALIB, "pruning_ratio": 0.2, "mode": "block", "importance": pk.Magnitude(),
                "layers": [0, 1], "ranking": "local", "normalize": None, "n_steps": 1, "modern": False, "data": None,
                "tokenizer": None, "recovery": None,
            },
        ),
    }  # fmt: skip
    settings = {
        pk.LoRA: {}, pk.FullTuning: {}, pk.Mixture: {}, pk.SparseLLM: {}, pk.Magnitude: {}, pk.Random: {},
        pk.Distillation: {"teacher": model, "training": quick},
        pk.Taylor: {}, pk.Curvature: {}, pk.Reconstruction: {}, pk.REAP: {}, pk.RouterFrequency: {},
        pk.HyWIA: {}, Trees: {},
        Range: {"low": 0.0, "high": 1.0}, Choice: {"options": (1, 2)}, Metric: {"name": "m", "measure": _one},
        HyperparameterSpace: {"settings": {"a": Range(0.0, 1.0)}, "build": _as_it_is},
    }  # fmt: skip
    for kind, good in settings.items():
        every = {name: each.default for name, each in kind.__dataclass_fields__.items()}
        found[kind.__name__] = Call(kind, {**every, **good})
    return found


def _as_it_is(model, point):
    return model


def _one(model, tokenizer):
    return 1.0


def cases_of(calls, rng):
    """(function, argument, name of the value), each argument with some values of the pool."""
    for name, call in calls.items():
        for argument in [*call.good, *call.fresh]:
            for value in rng.sample(list(POOL), PER_ARGUMENT):
                yield name, argument, value


def makes_sense(function, argument, value):
    sense = SENSE.get(f"{function}.{argument}", SENSE.get(argument, NEVER))
    try:
        return bool(sense(value))
    except (TypeError, ValueError, RuntimeError):  # an array has no truth
        return False


def fault_of(name, call, argument, value):
    """What is wrong with how a call takes a value; None for nothing."""
    given = {**call.arguments(), argument: value}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.function(**given)
    except PrunekitError as error:
        return "its error says nothing" if len(str(error)) < 10 else None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None if makes_sense(name, argument, value) else "accepted"


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_generated_call_is_refused_by_name_or_makes_sense(whole, calls, tmp_path, monkeypatch):
    """Of whole searches, trainings and recipes apart, which take seconds a call."""
    monkeypatch.chdir(tmp_path)
    chosen = {name: call for name, call in calls.items() if (name in WHOLE) == whole}
    cases = list(cases_of(chosen, random.Random(SEED)))
    state = random.getstate(), np.random.get_state()[1].tolist()
    faults = {}
    for name, argument, value in cases:
        fault = fault_of(name, calls[name], argument, POOL[value]())
        faults |= {f"{name}({argument}={value})": fault} if fault is not None else {}
        for path in tmp_path.iterdir():  # what was written there would be found by a later case
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert len(cases) >= (LEAST_WHOLE if whole else LEAST)
    assert not faults, "\n".join(f"{case}: {fault}" for case, fault in faults.items())
    assert random.getstate() == state[0] and np.random.get_state()[1].tolist() == state[1]
    for one, other in zip(calls["discover"].good["model"].parameters(), llama().parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_call_works_and_every_public_function_is_among_them(whole, calls):
    functions = {name for name in pk.__all__ if name.islower()}
    assert functions | {*recipes.__all__} <= {*calls}
    for name, call in calls.items():
        if (name in WHOLE) == whole and name != "standard_text":
            call.function(**call.arguments())


def test_a_function_without_checks_would_be_caught():
    def unchecked(seed=0, n_samples=1):
        return seed / n_samples

    found = {
        fault_of("unchecked", Call(unchecked), argument, make())
        for argument in ("seed", "n_samples")
        for make in POOL.values()
    }
    assert "accepted" in found and any(str(fault).startswith("TypeError") for fault in found)


COMMANDS = {
    # verb → what it is always given, and its options; none of these ends well with a wrong value
    "discover": (["MODEL"], ("--plot", "--layer")),
    "prune": (
        ["MODEL", "--out", "OUT", "--calibration", "TEXT"],
        ("--pruning-ratio", "--importance", "--kinds", "--ranking", "--n-samples", "--seq-len", "--seed", "--round-to",
         "--min-units", "--protect-layers", "--n-steps", "--fit", "--dtype", "--device", "--max-shard-size", "--plan"),
    ),
    "sparsify": (
        ["MODEL", "--out", "OUT", "--calibration", "TEXT"],
        ("--sparsity", "--pattern", "--method", "--allocation", "--layers", "--n-samples", "--seq-len", "--seed"),
    ),
    "recover": (
        ["MODEL", "--out", "OUT", "--data", "TEXT"],
        ("--r", "--alpha", "--dropout", "--learning-rate", "--batch-size", "--epochs", "--max-steps", "--warmup",
         "--targets", "--seq-len", "--seed", "--method", "--weight-decay", "--preset"),
    ),
    "evaluate": (["MODEL", "--data", "TEXT"], ("--metrics", "--window", "--stride", "--protocol")),
    "knowledge": (["MODEL", "--out", "OUT", "--text", "TEXT"], ("--ratios", "--kinds", "--importance", "--limit")),
    "export": (["MODEL", "--out", "OUT"], ("--layout", "--max-shard-size")),
    "recipe": (
        ["llm-pruner", "MODEL", "--out", "OUT", "--calibration", "TEXT"],
        ("--pruning-ratio", "--mode", "--layers", "--ranking", "--normalize", "--n-steps"),
    ),
}  # fmt: skip
WORDS = ("-1", "9" * 20, "9" * 5000, "inf", "nan", "word", "", "\x1b[31m", "x" * 400, "1e400", "0x1", "-0.5", "1,,x")
GOOD = {  # option → what of these it takes
    "--kinds": ("",), "--layers": ("",), "--protect-layers": ("",), "--alpha": ("9" * 20,), "--warmup": ("9" * 20,),
}  # fmt: skip


@pytest.mark.slow
def test_commands_end_with_2_and_one_line_whatever_an_option_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pk.save(llama(), tmp_path / "model", tokenizer=byte_tokenizer())
    (tmp_path / "text.txt").write_text(TEXT * 3)
    capsys.readouterr()  # the bar of saving
    places = {"MODEL": "model", "OUT": "out", "TEXT": "text.txt"}
    faults, rng, n_cases = [], random.Random(SEED), 0
    for verb, (given, options) in COMMANDS.items():
        for option in options:
            for word in rng.sample(WORDS, 5):
                n_cases += 1
                arguments = [verb, *(places.get(each, each) for each in given), f"{option}={word}"]
                if verb == "prune" and option != "--pruning-ratio":
                    arguments.append("--pruning-ratio=0.2")
                if verb == "sparsify" and option not in ("--sparsity", "--pattern"):
                    arguments.append("--sparsity=0.5")
                fault = command_fault(arguments, capsys, word in GOOD.get(option, ()))
                faults += [f"{arguments}: {fault}"] if fault else []
                shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert not faults, "\n".join(faults)
    assert n_cases > 250


def command_fault(arguments, capsys, is_good):
    """What is wrong with how a command ends; None for nothing."""
    try:
        code = main(arguments)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    said = capsys.readouterr().err
    if code == 0:
        return None if is_good else "accepted"
    is_refused = code == 2 and said.startswith("prunekit: ") and "\x1b" not in said and not Path("out").exists()
    return None if is_refused else f"ends with {code}: {said[-80:]}"
