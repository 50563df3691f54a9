"""What users read: every public name is documented in full, in the words of STYLE.md; no two modules share a name."""

import ast
import dataclasses
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

import prunekit as pk

EXPORTED = {name: getattr(pk, name) for name in pk.__all__}
PUBLIC = [name for name, found in EXPORTED.items() if not (inspect.isclass(found) and issubclass(found, Exception))]


def documents(doc, name):
    return re.search(rf"^\s*\**{re.escape(name)}:", doc, re.MULTILINE)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_or_attribute_of_a_public_name_is_documented(name):
    found = getattr(pk, name)
    doc = inspect.getdoc(found) or ""
    assert doc and len(doc.splitlines()[0]) <= 120
    if not inspect.isclass(found):
        missing = [p for p in inspect.signature(found).parameters if not documents(doc, p)]
        assert not missing and "Returns:" in doc and "Raises:" in doc
        return
    if dataclasses.is_dataclass(found):
        names = [field.name for field in dataclasses.fields(found)]
    else:
        names = list(inspect.signature(found).parameters)
        doc += inspect.getdoc(found.__init__) or ""
    assert not [field for field in names if not field.startswith("_") and not documents(doc, field)]


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isclass(getattr(pk, name))])
def test_every_public_method_is_documented(name):
    for method, found in vars(getattr(pk, name)).items():
        function = getattr(found, "__func__", found)
        if not method.startswith("_") and inspect.isfunction(function):
            assert inspect.getdoc(function), method


ROOT = Path(pk.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
PAGES = [ROOT.parent / "README.md", *sorted((ROOT.parent / "docs").rglob("*.md"))]
DEFINES = (ast.Module, ast.ClassDef, ast.FunctionDef)

# Pattern → the word to use. A word that also has a proper use is matched only in the phrase that is wrong.
WRONG = {
    r"[sS]ilence[sd]?|[sS]ilencing": "ablate, zero",
    r"[kK]nobs?(?!:)": "hyperparameter",
    r"points? of (?:this|the|a) (?:space|search)": "candidate",
    r"[pP]airs (?:of points|learned|measured|taught)|(?:more|fewer|few|many) pairs": "samples",
    r"(?:its|their|whose|unit's) readers?|readers? (?:is|are) re-fitted": "consumer layer",
    r"hands? on|(?:is|are|be) handed": "outputs, receives, passes to",
    r"written out": "eager implementation",
    r"[eE]xams?": "evaluation set",
    r"[mM]arks(?!:)": "scores, measurements",
    r"words? for (?:it|its|this|the|these)": "the configuration cannot express this",
    r"(?<!there )(?:is|are) none": "say what it must be",
    r"told|tells?": "given, reports, distinguishes",
    r"[nN]obody|[sS]omebody": "say who or what",
    r"lent|lends?": "say what happens",
}


def wrong_words(text):
    return [
        f"{found[0]!r} (say: {better})"
        for wrong, better in WRONG.items()
        for found in re.finditer(rf"\b(?:{wrong})\b", text)
    ]


def prose_of(module):
    """(line, text) of docstrings, and of literal text in what is raised as a PrunekitError."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, DEFINES) and ast.get_docstring(node):
            yield node.body[0].lineno, re.sub(r"`[^`]*`", "", ast.get_docstring(node))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "PrunekitError":
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_and_errors_use_the_words_of_the_field(module):
    found = [f"line {line}: {word}" for line, text in prose_of(module) for word in wrong_words(text)]
    assert not found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_use_the_words_of_the_field(page):
    assert not wrong_words(re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL))


def test_each_wrong_word_is_found():
    for text in (
        "a unit is silenced",
        "the knob",
        "no point of this space",
        "its readers",
        "plan={} is none",
        "told of it",
    ):
        assert wrong_words(text), text
    for text in (
        "the silencings",
        "a data point",
        "colour-blind readers",
        "None",
        "the remarks",
        "there is none",
        "excellent",
    ):
        assert not wrong_words(text), text


def test_no_two_modules_have_one_name():
    names = Counter(path.stem for path in MODULES if path.stem != "__init__")
    assert not [name for name, times in names.items() if times > 1]


def test_the_map_of_the_rooms_names_every_module_and_no_other():
    text = (ROOT.parent / "docs/data_flow.md").read_text()
    parts = re.split(r"^(?:\*\*`(\w+)`\*\*.*|\| file of `(\w+)` .*)$", text, flags=re.M)
    rooms = {a or b: part for a, b, part in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)}
    wrong = {}
    for room, part in rooms.items():
        rows = re.findall(r"^\| (`.*?) \|", part, re.M)
        named = {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"__init__"}
        there = {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__"}
        wrong |= {room: named ^ there} if named ^ there else {}
    assert not wrong, "named and not there, or there and not named"
    without = {"recipes", "world"}  # whose modules the first table says
    assert rooms.keys() | without == {path.parent.name for path in ROOT.glob("*/__init__.py")}
