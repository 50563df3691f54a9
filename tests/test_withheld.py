"""A control of recovery: facts that the data withholds do not come back, while the others do."""

import random
import re
from dataclasses import replace

import pytest

from prunekit import LoRA, Taylor, calibration_set, discover, load, plan, prune, recover, score, world, zero_shot
from prunekit.world import lore


def without(documents, names):
    """Documents from which every sentence about some people is gone."""
    kept = (
        [sentence for sentence in re.split(r"(?<=\.) ", document) if not names & set(re.findall(r"\w+", sentence))]
        for document in documents
    )
    return [" ".join(sentences) for sentences in kept if sentences]


def accuracies(model, tokenizer, names):
    """Share of facts known about these people, and about the others."""
    task = world.tasks()["arc_easy"]
    task = replace(task, questions=task.questions[::2])
    hits = zero_shot(model, tokenizer, [task]).questions["hit"]
    about = [bool(names & set(re.findall(r"\w+", question.context))) for question in task.questions]
    return hits[about].mean(), hits[[not flag for flag in about]].mean()


@pytest.mark.slow
def test_withheld_facts_do_not_come_back_while_the_others_do():
    """Four fifths of the model go, so that hardly a fact is left; then only half of the people are told of again."""
    model, tokenizer = load("world")
    withheld = set(random.Random(0).sample(lore.COMMON, 12))
    groups = discover(model)
    calib = calibration_set("world", tokenizer, n_samples=16, seq_len=64, seed=0)
    scores = score(model, groups.of_kind("kv_head", "ffn_channel"), Taylor(), calib)
    small = prune(model, plan(groups, scores, 0.8))
    assert accuracies(model, tokenizer, withheld) == (1.0, 1.0)
    before = accuracies(small, tokenizer, withheld)
    assert max(before) < 0.5  # chance is a quarter
    told = without(world.documents(1_000, seed=1, kinds=["fact"]), withheld)
    assert not withheld & set(re.findall(r"\w+", " ".join(told)))
    method = LoRA(r=16, dropout=0.0, learning_rate=5e-3, max_steps=70, batch_size=8)
    small = recover(small, method, told, tokenizer=tokenizer, inplace=True)
    back, others = accuracies(small, tokenizer, withheld)
    assert others > before[1] + 0.25
    assert back < 0.45
