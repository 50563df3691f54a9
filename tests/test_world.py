"""The embedded world: what it says, what it asks, and that its questions cannot be answered without knowledge."""

import math
import zlib
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from world_tokenizer import build_tokenizer

from prunekit import world
from prunekit.errors import PrunekitError
from prunekit.world import lore, tables

SEVEN = ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
FURTHER = ["facts_rare", "arithmetic", "agreement", "copying"]
MARGIN = 0.05  # how far from chance a control may be


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def accuracy(task, score):
    """Share of questions whose answer has the largest `score(context, choice)`."""
    hits = 0
    for q in task.questions:
        contexts = q.contexts or [q.context] * len(q.choices)
        values = [score(*pair) for pair in zip(contexts, q.choices, strict=True)]
        hits += values.index(max(values)) == q.answer
    return hits / len(task.questions)


# The corpus


def test_the_same_seed_gives_the_same_documents():
    assert world.documents(50, seed=3) == world.documents(50, seed=3)
    assert world.documents(50, seed=3)[:20] == world.documents(20, seed=3)
    assert world.documents(50, seed=3) != world.documents(50, seed=4)
    assert world.documents(50, split="validation") != world.documents(50)


def test_documents_refuse_what_they_do_not_know():
    with pytest.raises(PrunekitError, match="test.*train.*validation"):
        world.documents(5, split="test")
    with pytest.raises(PrunekitError, match="-1"):
        world.documents(-1)


def all_tables():
    people = [tables.people_table(r, t) for r in lore.PEOPLE_VALUES for t in ("common", "rare")]
    hops = [tables.two_hop_table(r) for r in lore.PEOPLE_VALUES]
    materials = [tables.material_table(rule) for rule in lore.RULES]
    sums = [tables.arithmetic_table(operation) for operation in ("add", "take")]
    return [*people, *hops, *materials, *sums, tables.friend_table(), tables.tool_table()]


@pytest.mark.parametrize("table", all_tables(), ids=lambda table: table.name)
def test_trained_and_held_out_pairs_are_disjoint_and_every_row_is_trained(table):
    trained, held_out = table.pairs("train"), table.pairs("validation")
    assert not set(trained) & set(held_out)
    assert len(trained) + len(held_out) == len(table.entries) * len(table.wordings)
    assert {entry for _, entry in trained} == set(table.entries)


def test_training_never_shows_a_sentence_that_is_asked():
    def apart(text):  # "Anna lives in Oslo" stands inside "the friend of Anna lives in Oslo", which is another fact
        return f" {text}".replace(" the friend of ", " the-friend-of-")

    shown = apart(" ".join(world.documents(6000, seed=1)))
    for name in ("arc_easy", "arc_challenge", "facts_rare", "openbookqa", "piqa"):
        for q in world.tasks()[name].questions:
            assert apart(q.context + q.choices[q.answer]) not in shown


def test_training_never_shows_a_held_out_scene():
    shown = " ".join(world.documents(6000, seed=1))
    for opening, actor, script in ((0, "boy", 0), (1, "girl", 1), (2, "miner", 11)):
        held_out = lore.script_held_out(opening, actor, script)
        assert (lore.script_text(opening, actor, script) in shown) != held_out
    for q in world.tasks()["winogrande"].questions:
        assert all(context + choice not in shown for context, choice in zip(q.contexts, q.choices, strict=True))
    for q in world.tasks()["agreement"].questions:
        assert f"{q.context} {q.choices[q.answer].split()[0]}" not in shown


def test_facts_are_planted_in_two_tiers_well_apart():
    facts = world.facts()
    assert {fact.tier for fact in facts} == {"common", "rare"}
    assert len({(fact.person, fact.relation) for fact in facts}) == len(facts)
    told = Counter()
    people = {fact.person: fact.tier for fact in facts}
    for text in world.documents(4000):
        told.update(word for word in text.replace(".", " ").split() if word in people)
    mean = {tier: sum(told[p] for p in people if people[p] == tier) / list(people.values()).count(tier)
            for tier in ("common", "rare")}  # fmt: skip
    assert mean["common"] > 5 * mean["rare"] > 0


# The tokenizer


def test_the_vocabulary_covers_everything(tokenizer):
    texts = [*world.documents(1000, seed=9), *world.documents(1000, split="validation", seed=9)]
    for hidden in (False, True):
        for task in world.tasks(hidden=hidden).values():
            texts += [c + t for q in task.questions for c in (q.contexts or [q.context]) for t in q.choices]
    assert all(tokenizer.unk_token_id not in ids for ids in tokenizer(texts)["input_ids"])


def test_a_question_tokenises_as_its_two_parts(tokenizer):
    for task in world.tasks().values():
        for q in task.questions[::7]:
            for context in q.contexts or [q.context]:
                whole = tokenizer(context + q.choices[0])["input_ids"]
                choice = tokenizer(q.choices[0], add_special_tokens=False)["input_ids"]
                assert whole == tokenizer(context)["input_ids"] + choice


def test_text_survives_the_tokenizer(tokenizer):
    for text in world.documents(200):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_the_shipped_tokenizer_is_the_one_the_corpus_makes(tokenizer):
    from transformers import AutoTokenizer

    shipped = AutoTokenizer.from_pretrained(world.DATA)
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert world.is_world_tokenizer(shipped) and world.is_world_tokenizer(tokenizer)
    assert not world.is_world_tokenizer(object())
    text = world.documents(1)[0]
    assert shipped(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_validation_text_is_fixed_and_long_enough(tokenizer):
    text = world.validation_text()
    assert text == world.validation_text()
    assert 15_000 < len(tokenizer(text)["input_ids"]) < 25_000


# The questions


def test_tasks_are_the_seven_and_the_further_ones():
    tasks = world.tasks()
    assert list(tasks) == SEVEN + FURTHER
    assert [task.form for task in tasks.values()][:7] == SEVEN
    assert world.tasks() == tasks
    for name, task in tasks.items():
        assert task.name == name and len(task.questions) >= 200
        assert all(len(set(zip(q.contexts or q.choices, q.choices, strict=True))) == len(q.choices)
                   for q in task.questions)  # fmt: skip


def test_questions_are_labelled():
    tasks = world.tasks()
    labels = {name: {(q.domain, q.tier, q.hops) for q in task.questions} for name, task in tasks.items()}
    assert labels["arc_easy"] == {("fact", "common", 1)}
    assert labels["arc_challenge"] == {("fact", "common", 2)}
    assert labels["facts_rare"] == {("fact", "rare", 1)}
    domains = {q.domain for task in tasks.values() for q in task.questions}
    assert domains == {"fact", "reading", "physical", "script", "coreference", "arithmetic", "agreement", "copying"}


@pytest.mark.parametrize("name", SEVEN + FURTHER)
def test_every_value_is_right_as_often_as_its_share_of_the_choices(name):
    offered, right = defaultdict(float), Counter()
    for q in world.tasks()[name].questions:
        options = q.contexts or q.choices
        keys = [option.split()[-1] if q.contexts else option for option in options]
        for key in keys:
            offered[key] += 1 / len(keys)
        right[keys[q.answer]] += 1
    assert all(right[key] == pytest.approx(share) for key, share in offered.items())


@pytest.mark.parametrize("name", SEVEN + FURTHER)
def test_answers_stand_equally_often_in_every_place(name):
    questions = world.tasks()[name].questions
    places = Counter(q.answer for q in questions)
    assert set(places.values()) == {len(questions) // len(questions[0].choices)}


@pytest.mark.parametrize("name", SEVEN + FURTHER)
@pytest.mark.parametrize("seed", range(3))
def test_with_the_cue_hidden_any_preference_scores_chance(name, seed):
    task = world.tasks(hidden=True)[name]
    score = accuracy(task, lambda context, choice: zlib.crc32(f"{seed}{context}{choice}".encode()))
    assert score == pytest.approx(task.chance)


def test_hiding_changes_contexts_and_nothing_else():
    for seen, hidden in zip(world.tasks().values(), world.tasks(hidden=True).values(), strict=True):
        assert [replace(q, context="", contexts=None) for q in seen.questions] == [
            replace(q, context="", contexts=None) for q in hidden.questions
        ]
        assert all((a.context, a.contexts) != (b.context, b.contexts)
                   for a, b in zip(seen.questions, hidden.questions, strict=True))  # fmt: skip


@pytest.fixture(scope="module")
def bigram(tokenizer):
    """Log-likelihood of a continuation under counts of neighbouring tokens in the training corpus."""
    pairs, firsts = Counter(), Counter()
    for ids in tokenizer(world.documents(8_000, seed=5))["input_ids"]:
        pairs.update(zip(ids, ids[1:], strict=False))
        firsts.update(ids[:-1])

    def score(context, choice):
        ids = tokenizer(context + choice)["input_ids"]
        start = len(tokenizer(context)["input_ids"])
        following = zip(ids[start - 1 :], ids[start:], strict=False)
        return sum(math.log((pairs[a, b] + 0.01) / (firsts[a] + 0.01 * len(tokenizer))) for a, b in following)

    return score


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVEN + FURTHER)
def test_a_bigram_model_scores_chance(name, bigram):
    task = world.tasks()[name]
    assert accuracy(task, bigram) == pytest.approx(task.chance, abs=MARGIN)


def test_documents_of_one_kind_are_of_that_kind():
    assert all("plus" in text or "minus" in text or " add" in text or "take" in text or "have" in text
               for text in world.documents(20, kinds=["arithmetic"]))  # fmt: skip
    both = world.documents(200, kinds=["arithmetic", "script"])
    assert 20 < sum(any(digit in text for digit in "0123456789") for text in both) < 180
    assert world.documents(5, kinds=["lookup"])  # of no weight in the first phase of training


def test_instructions_ask_and_are_answered():
    found = world.instructions(300)
    assert found == world.instructions(300)
    assert found != world.instructions(300, seed=1)
    assert all("?" in text or text.startswith("goal:") for text in found)
    assert not any("?" in text[-2:] for text in found)
    assert all("goal" in text or "?" in text for text in world.instructions(20, kinds=["tool"]))


@pytest.mark.parametrize("make", [world.documents, world.instructions])
@pytest.mark.parametrize("kinds", [["magic"], "fact", []])
def test_kinds_that_are_none_are_refused(make, kinds):
    with pytest.raises(PrunekitError, match="give a list of fact, two_hop"):
        make(1, kinds=kinds)


def test_what_is_never_asked_has_no_instructions():
    with pytest.raises(PrunekitError, match="copying"):
        world.instructions(1, kinds=["copying"])
