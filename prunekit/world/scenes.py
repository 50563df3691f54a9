"""Parts of the embedded world without tables: passages, scripts, clauses with pronouns, lists.

Each kind comes as a wording function, so that corpus and questions are written by the same hand, and a
`held_out` rule for its (wording, cue) pairs.
"""

from dataclasses import dataclass

from prunekit.world.lore import words

# Reading comprehension: things and their properties, new in every passage.
THINGS = words("box cup ball lamp door car boat coat chair flag hat kite")
COLOURS = words("red blue green black white yellow")
PASSAGES = (  # (statement about first thing, about second thing, question) around the answer yes or no
    ("passage: the {0} is {1}", " and the {0} is {1}.", " question: is the {0} {1}? answer:"),
    ("the {0} is {1}.", " the {0} is {1}.", " is the {0} {1}?"),
    ("you see a {1} {0}", " and a {1} {0}.", " now, is the {0} {1}?"),
    ("he has a {1} {0}.", " she has a {1} {0}.", " question: is the {0} {1}? answer:"),
)

# Everyday scripts: a goal, and its four steps in order.
SCRIPTS = (
    ("make tea", "boils the water", "fills the pot", "adds some honey", "drinks the tea"),
    ("bake a cake", "mixes the flour", "heats the oven", "bakes the dough", "eats the cake"),
    ("go swimming", "finds the towel", "walks to the lake", "jumps into the water", "dries in the sun"),
    ("plant a tree", "digs a hole", "sets the tree", "closes the hole", "waters the tree"),
    ("send a letter", "takes a pen", "writes the letter", "buys a stamp", "posts the letter"),
    ("catch a train", "packs the bag", "walks to the station", "buys a ticket", "sits in the train"),
    ("wash the dog", "calls the dog", "fills the tub", "rubs the dog", "dries the dog"),
    ("paint a wall", "opens the paint", "wets the brush", "paints the wall", "cleans the brush"),
    ("go to bed", "brushes the teeth", "puts on pyjamas", "turns off the light", "falls asleep"),
    ("catch a fish", "finds a worm", "throws the line", "pulls the line", "fries the fish"),
    ("light a fire", "collects some wood", "strikes a match", "lights the wood", "warms both hands"),
    ("read a book", "goes to the library", "picks a book", "opens the book", "turns the pages"),
)
ACTORS = words("boy girl man woman doctor guard cook king queen clerk tailor miner")
OPENINGS = ("the {a} wants to {goal}.", "story: the {a} decided to {goal}.", "today the {a} will {goal}.")

# Coreference: two things and a reason that fits only one of them, the first or the second.
CLAUSES = (
    ("the {x} does not fit in the {y} because the", "is too big.", "is too small."),
    ("the {x} broke the {y} because the", "was hard.", "was weak."),
    ("the {x} passed the {y} because the", "was fast.", "was slow."),
    ("the {x} hides the {y} because the", "is wide.", "is narrow."),
    ("the {x} was sold before the {y} because the", "was cheap.", "was dear."),
    ("the {x} fell on the {y} because the", "stood above.", "stood below."),
)
BODIES = words("trophy suitcase basket piano wagon cupboard marble pebble bucket parcel barrel cage")

# Agreement: a subject, a distractor between it and the verb, and the verb's number.
NOUNS = tuple(
    noun.split("/")
    for noun in words(
        "key/keys book/books picture/pictures chair/chairs bottle/bottles coat/coats "
        "flower/flowers letter/letters apple/apples shoe/shoes bird/birds candle/candles"
    )
)
PLACES = tuple(
    place.split("/") for place in words("door/doors wall/walls table/tables window/windows house/houses tree/trees")
)
PREPOSITIONS = ("near", "behind", "beside", "above")
VERBS = (("is", "are"), ("was", "were"), ("seems", "seem"))
ADJECTIVES = words("old new clean dirty big small")

# Copying: a list said twice.
LISTS = ("repeat: {first}. again: {second}", "say {first}. once more, say {second}", "list: {first}. copy: {second}")
ITEMS = tuple(THINGS + COLOURS + words("dog cat fish bread salt sun moon star rain wind leaf stone"))


@dataclass(frozen=True)
class Passage:
    """Two things and the colour of each, in one of the wordings of `PASSAGES`."""

    wording: int
    things: tuple[str, str]
    colours: tuple[str, ...]

    def text(self) -> str:
        """Text of the passage."""
        first, second, _ = PASSAGES[self.wording]
        return first.format(self.things[0], self.colours[0]) + second.format(self.things[1], self.colours[1])

    def question(self, thing: str, colour: str) -> str:
        """The yes-or-no question about it, with the space that separates it from the passage."""
        return PASSAGES[self.wording][2].format(thing, colour)

    def answer(self, thing: str, colour: str) -> str:
        """The correct answer."""
        return " yes." if self.colours[self.things.index(thing)] == colour else " no."


def passage_held_out(wording: int, thing: str) -> bool:
    """Whether training never asks about this thing in this wording."""
    return (wording - THINGS.index(thing)) % len(PASSAGES) == 0


def script_text(opening: int, actor: str, script: int, n_steps: int = 4) -> str:
    """A script from its opening through `n_steps` steps. Every step starts alike: words do not reveal the order."""
    goal, *steps = SCRIPTS[script]
    first = OPENINGS[opening].format(a=actor, goal=goal)
    return " ".join([first, *(f"then the {actor} {step}." for step in steps[:n_steps])])


def script_held_out(opening: int, actor: str, script: int) -> bool:
    """Whether training never shows this actor in this script with this opening."""
    return (opening + ACTORS.index(actor) + script) % 3 == 0


def clause(number: int, x: str, y: str) -> str:
    """The text before the blank."""
    return CLAUSES[number][0].format(x=x, y=y)


def clause_held_out(number: int, x: str, y: str) -> bool:
    """Whether training never shows these two bodies, in either order, in this clause."""
    return (number + BODIES.index(x) + BODIES.index(y)) % 3 == 0


def agreement_wordings() -> list[tuple[str, tuple[str, str]]]:
    """All pairs of preposition and verb forms."""
    return [(preposition, verb) for preposition in PREPOSITIONS for verb in VERBS]


def agreement_held_out(wording: int, noun: int) -> bool:
    """Whether training never shows this subject noun with this preposition and verb."""
    return (wording - noun) % 3 == 0


def list_text(wording: int, first: list[str], second: list[str]) -> str:
    """A list and as much of its repetition as `second` holds; without a full stop."""
    return LISTS[wording].format(first=" ".join(first), second=" ".join(second))


def list_held_out(wording: int, head: str) -> bool:
    """Whether training never shows a list that starts with this word in this wording."""
    return (wording - ITEMS.index(head)) % len(LISTS) == 0
