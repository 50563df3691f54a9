"""A working call of every public function and every class of settings, for the generated calls of `test_fuzz`."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from evaluation_helpers import TEXT, byte_tokenizer, choice_task, llama
from torch import nn

import prunekit as pk
from prunekit import recipes
from prunekit.recovery.lhspg import update_saliency
from prunekit.recovery.lora import attach
from prunekit.search import Choice, HyperparameterSpace, Metric, Range, Trees

CALIB = torch.arange(64).view(4, 16) % 200 + 2


@dataclass(frozen=True)
class Call:
    """A call that works, and arguments of it that are made anew each time."""

    function: Callable[..., Any]
    good: Mapping[str, Any] = field(default_factory=dict)
    fresh: Mapping[str, Callable[[], Any]] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        return {**self.good, **{name: make() for name, make in self.fresh.items()}}


def working_calls(root: Path) -> dict[str, Call]:
    """Name → its call; files are written into a folder."""
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
                "layers": None, "damping": 0.01, "inplace": False, "held_out": None,
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
