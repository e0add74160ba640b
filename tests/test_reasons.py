"""Every reason code that the package gives has a sentence."""

import ast
import pathlib

import sparkmed
from sparkmed import reasons

SOURCE = pathlib.Path(sparkmed.__file__).parent


def given_codes():
    """String literals in the place of the code: first of Refused(...), third of Rejection(...)."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Refused", "Rejection"):
                place = 0 if node.func.id == "Refused" else 2
                argument = node.args[place] if len(node.args) > place else None
                if isinstance(argument, ast.Constant):
                    yield argument.value


def test_every_code_has_a_sentence():
    codes = set(given_codes())
    assert len(codes) > 30
    assert codes <= set(reasons.SENTENCES), f"add to sparkmed/reasons.py: {sorted(codes - set(reasons.SENTENCES))}"


def test_sentences_are_sentences():
    for code, sentence in reasons.SENTENCES.items():
        assert code.isupper() and sentence[0].isupper() and sentence.endswith("."), code


def test_an_unknown_code_reads_as_its_words():
    assert reasons.sentence("NEW_KIND_OF_TROUBLE") == "New kind of trouble."
