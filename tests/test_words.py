"""What users read: every public name is documented in full."""

import dataclasses
import inspect
import re

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
