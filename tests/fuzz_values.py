"""Wrong values for the generated calls of `test_fuzz`, and which of them make sense where."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

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


def is_place(v):
    return isinstance(v, str | Path)


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
    "layers": one_of(None),
    "pattern": one_of(None, (1, 2)),
    "keep_zeros": none_or(FLAG),
    "tokenizer": one_of(None),
    "data": is_prose,
    "text": none_or(is_prose),
    "output_dir": none_or(is_place),
    "window": none_or(is_integer(2, 97)),
    "stride": none_or(is_integer(1, 97)),
    "batch_size": none_or(COUNT),
    "limit": none_or(COUNT),
    "shots": is_integer(0, 1000),
    "data_dir": none_or(is_place),  # read where a task is named
    "device": one_of(None, 0),
    "device_map": one_of(None),
    "offload_folder": one_of(None),
    "repeats": COUNT,
    "path": one_of(None),
    "tokens_a_batch": COUNT,
    "out": is_place,
    "plan": one_of(None),
    "report": one_of(None),
    "files": lambda v: v is None or v == {},
    "max_shard_size": is_integer(1, 2**63),
    "dtype": one_of("auto"),
    "trust_remote_code": FLAG,
    "notes": lambda v: v is None or isinstance(v, dict),
    "metric": NEVER,
    "start": is_empty,
    "folder": none_or(is_place),
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
    "Distillation.hidden_share": one_of(0, 1, 0.5, True),
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
    "prune_progressively.folder": none_or(is_place),
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
    "measure_pairs.source": none_or(is_place),
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
