"""The trained model of the embedded world: it knows what was planted, and only by seeing what it is asked about."""

import json
from dataclasses import replace

import pytest
import torch

from prunekit import world
from prunekit.evaluation import perplexity, zero_shot

SEVEN = ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]


@pytest.fixture(scope="module")
def loaded():
    return world.load()


@pytest.fixture(scope="module")
def accuracy(loaded):
    return zero_shot(*loaded, world.tasks()).accuracy()


def test_it_is_small_half_precision_on_disk_and_float32_in_memory(loaded):
    model, _ = loaded
    assert sum(file.stat().st_size for file in world.DATA.iterdir()) <= 12e6
    assert {file.suffix for file in world.DATA.iterdir()} <= {".json", ".safetensors", ".md"}
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert 3e6 <= model.num_parameters() <= 6e6


def test_its_heads_are_grouped_and_enough_to_cut(loaded):
    config = json.loads((world.DATA / "config.json").read_text())
    assert config["num_attention_heads"] > config["num_key_value_heads"] >= 4
    assert config["num_hidden_layers"] >= 6
    assert loaded[0].config.vocab_size == len(loaded[1])


@pytest.mark.slow
def test_it_knows_the_common_facts(accuracy):
    assert accuracy["arc_easy"] >= 0.95


@pytest.mark.slow
def test_it_is_good_at_five_of_the_seven(accuracy):
    assert (accuracy[SEVEN] >= 0.85).sum() >= 5


@pytest.mark.slow
def test_two_hops_are_well_over_chance(accuracy):
    assert accuracy["arc_challenge"] >= world.tasks()["arc_challenge"].chance + 0.15


def test_with_the_cue_hidden_it_scores_chance(loaded):
    hidden = {name: replace(task, questions=task.questions[:96]) for name, task in world.tasks(hidden=True).items()}
    scores = zero_shot(*loaded, hidden).accuracy()
    for name, task in hidden.items():
        assert scores[name] == pytest.approx(task.chance, abs=0.05), name


@pytest.mark.slow
def test_it_reads_held_out_text_almost_as_well_as_what_it_was_trained_on(loaded):
    trained = perplexity(*loaded, "\n".join(world.documents(60, seed=1)))
    held_out = perplexity(*loaded, "\n".join(world.documents(60, split="validation", seed=1)))
    assert held_out < 2 * trained < 20


def test_it_writes_the_language_of_its_world(loaded):
    model, tokenizer = loaded
    fact = next(f for f in world.facts() if (f.tier, f.relation) == ("common", "city"))
    prompt = tokenizer(f"{fact.person} lives in", return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(written[0], skip_special_tokens=True).strip().startswith(f"{fact.person} lives in")


@pytest.mark.slow
def test_the_card_says_what_it_scores(accuracy):
    card = world.card()
    for name, share in accuracy.items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
        stated = float(row.split("|")[2].strip(" %")) / 100
        assert stated == pytest.approx(share, abs=0.01), name  # another machine may round one question differently
