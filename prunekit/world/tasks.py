"""Zero-shot tasks about the embedded world, in the forms of the published seven, and four more.

Every question asks a pair of wording and cue that training never showed. Questions come in groups that
share their choices and in which each choice is right once: a model that cannot see the cue (or uses only
the word before the answer) scores exactly chance.
"""

import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations, product

from prunekit.questions import Question, Task
from prunekit.world import lore, tables
from prunekit.world.tables import Entry, Table, ask

Questions = Iterator[Question]


def _blocks(values: list[str], size: int, seed: str) -> list[list[str]]:
    """Values shuffled and cut into sets of choices; incomplete sets are left out."""
    values = list(values)
    random.Random(seed).shuffle(values)
    return [values[i : i + size] for i in range(0, len(values) - size + 1, size)]


def _held_out(table: Table, wording: int) -> dict[str, list[Entry]]:
    """The rows held out in a wording, by value."""
    rows: dict[str, list[Entry]] = {}
    for entry in table.entries:
        if table.held_out(wording, entry):
            rows.setdefault(entry.value, []).append(entry)
    return rows


def _about(table: Table, n_choices: int, hidden: bool, *, rounds: int = 1, **labels: object) -> Questions:
    """Questions about a table: in each set of choices, every choice is right equally often."""
    for number, wording in enumerate(table.wordings):
        if any(wording in other for other in table.wordings if other != wording):
            continue  # it stands inside another wording, whose training may have shown the pair
        rows = _held_out(table, number)
        for turn in range(rounds):
            for block in _blocks(list(rows), n_choices, f"{table.name}-{number}-{turn}"):
                for i in range(min(len(rows[value]) for value in block)):
                    yield from _one_each(table, wording, [rows[value][i] for value in block], hidden, labels)


def _one_each(table: Table, wording: str, entries: list[Entry], hidden: bool, labels: dict) -> Questions:
    """One question a row; the values of all the rows are the choices."""
    choices = tuple(ask(wording, entry.cue, entry.value)[1] for entry in entries)
    for answer, entry in enumerate(entries):
        context, _ = ask(wording, table.neutral if hidden else entry.cue, entry.value)
        yield Question(context, choices, answer, **labels)


def _boolq(hidden: bool) -> Questions:
    """Passage and yes-or-no question; the twin has the two colours exchanged and the other answer."""
    rng = random.Random("boolq")
    for wording, asked in product(range(len(lore.PASSAGES)), lore.THINGS):
        for _ in range(10 if lore.passage_held_out(wording, asked) else 0):
            other = rng.choice([thing for thing in lore.THINGS if thing != asked])
            things = (asked, other) if rng.random() < 0.5 else (other, asked)
            colours = tuple(rng.sample(lore.COLOURS, 2))
            for pair in (colours, colours[::-1]):
                passage = lore.Passage(wording, things, pair)
                context = ("something." if hidden else passage.text()) + passage.question(asked, colours[0])
                answer = int(passage.answer(asked, colours[0]) == " yes.")
                yield Question(context, (" no.", " yes."), answer, "reading")


def _hellaswag(hidden: bool) -> Questions:
    """Endings are two neighbouring steps of each of two scripts: the question asks for the order and the subject."""
    pairs = [(a, b) for a, b in combinations(range(len(lore.SCRIPTS)), 2) if (a - b) % 3 == 0]
    for opening, (i, pair) in product(range(len(lore.OPENINGS)), enumerate(pairs)):
        actors = [a for a in lore.ACTORS if lore.script_held_out(opening, a, pair[0])]
        actor, first = actors[i % len(actors)], 1 + (opening + i) % 2
        places = [(script, step) for script in pair for step in (first, first + 1)]
        choices = tuple(f" {lore.SCRIPTS[script][1 + step]}." for script, step in places)
        for answer, (script, step) in enumerate(places):
            story = "something." if hidden else lore.script_text(opening, actor, script, step)
            yield Question(f"{story} then the {actor}", choices, answer, "script")


def _winogrande(hidden: bool) -> Questions:
    """Both bodies in both orders with both reasons: no body and no place in the clause is right more often."""
    held = [(n, x, y) for n in range(len(lore.CLAUSES)) for x, y in combinations(lore.BODIES, 2)
            if lore.clause_held_out(n, x, y)]  # fmt: skip
    for number, x, y in sorted(random.Random("winogrande").sample(held, 60)):
        for (first, second), which in product(((x, y), (y, x)), (0, 1)):
            clause = "something because the" if hidden else lore.clause(number, first, second)
            contexts = (f"{clause} {x}", f"{clause} {y}")
            reason = f" {lore.CLAUSES[number][1 + which]}"
            answer = (x, y).index((first, second)[which])
            yield Question("", (reason, reason), answer, "coreference", contexts=contexts)


def _agreement(hidden: bool) -> Questions:
    """Singular or plural verb, with a singular and a plural distractor before it in equal number."""
    rng = random.Random("agreement")
    for wording, (preposition, verbs) in enumerate(lore.agreement_wordings()):
        for noun in [n for n in range(len(lore.NOUNS)) if lore.agreement_held_out(wording, n)]:
            adjective = rng.choice(lore.ADJECTIVES)
            choices = tuple(f" {verb} {adjective}." for verb in verbs)
            for place, number in product([p for pair in rng.sample(lore.PLACES, 2) for p in pair], (0, 1)):
                subject = "something" if hidden else f"the {lore.NOUNS[noun][number]}"
                yield Question(f"{subject} {preposition} the {place}", choices, number, "agreement")


def _copying(hidden: bool) -> Questions:
    """What comes next in the repetition: four lists with the same beginning and four words in turning order."""
    rng = random.Random("copying")
    for wording, head in product(range(len(lore.LISTS)), lore.ITEMS):
        for _ in range(2 if lore.list_held_out(wording, head) else 0):
            words = [head, *rng.sample([item for item in lore.ITEMS if item != head], 6)]
            said, turning = words[:3], words[3:]
            for answer in range(4):
                whole = ["something"] if hidden else [*said, *turning[answer:], *turning[:answer]]
                context = lore.list_text(wording, whole, said)
                yield Question(context, tuple(f" {word}" for word in turning), answer, "copying")


def _people(make: Callable[[str], Table], hidden: bool, tier: str, hops: int) -> Questions:
    for relation in lore.PEOPLE_VALUES:
        yield from _about(make(relation), 4, hidden, domain="fact", tier=tier, hops=hops)


def _piqa(hidden: bool) -> Questions:
    return _about(tables.tool_table(), 2, hidden, rounds=2, domain="physical")


def _arc_easy(hidden: bool) -> Questions:
    return _people(lambda relation: tables.people_table(relation, "common"), hidden, "common", 1)


def _arc_challenge(hidden: bool) -> Questions:
    return _people(tables.two_hop_table, hidden, "common", 2)


def _facts_rare(hidden: bool) -> Questions:
    return _people(lambda relation: tables.people_table(relation, "rare"), hidden, "rare", 1)


def _openbookqa(hidden: bool) -> Questions:
    for rule in lore.RULES:
        yield from _about(tables.material_table(rule), 4, hidden, domain="physical")


def _arithmetic(hidden: bool) -> Questions:
    for operation in ("add", "take"):
        yield from _about(tables.arithmetic_table(operation), 4, hidden, domain="arithmetic")


# name: (writer, the published form it takes, scored per byte of the choice)
WRITERS: dict[str, tuple[Callable[[bool], Questions], str, bool]] = {
    "boolq": (_boolq, "boolq", False),
    "piqa": (_piqa, "piqa", True),
    "hellaswag": (_hellaswag, "hellaswag", True),
    "winogrande": (_winogrande, "winogrande", False),
    "arc_easy": (_arc_easy, "arc_easy", False),
    "arc_challenge": (_arc_challenge, "arc_challenge", True),
    "openbookqa": (_openbookqa, "openbookqa", True),
    "facts_rare": (_facts_rare, "arc_easy", False),
    "arithmetic": (_arithmetic, "arc_easy", False),
    "agreement": (_agreement, "piqa", False),
    "copying": (_copying, "arc_easy", False),
}


@cache
def _all(hidden: bool) -> dict[str, Task]:
    return {
        name: Task(name, form, tuple(write(hidden)), normalize) for name, (write, form, normalize) in WRITERS.items()
    }


def tasks(*, hidden: bool = False) -> dict[str, Task]:
    """The questions about this world, the same at every call.

    Args:
        hidden: the control: the same questions with what they ask about replaced by "someone" or
            "something". No model can score above chance on these.

    Returns:
        Tasks by name: the papers' seven in the papers' order, then rare facts, arithmetic, agreement and copying.
    """
    return dict(_all(hidden))
