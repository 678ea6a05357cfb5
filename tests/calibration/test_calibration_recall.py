from __future__ import annotations

import re

import pytest

from benchmarks.quality.tasks import words
from dynamo_kvtc.calibration.recall import RecallDocuments
from dynamo_kvtc.calibration.recall_kinds import KINDS, Kind
from dynamo_kvtc.calibration.text import Documents, spread_over_files

TOKENS, REFERENCES = 6000, 1500


class Characters:
    """A tokenizer with one token per character, and one of its own before a text."""

    def __call__(self, text: str, verbose: bool, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [2] * add_special_tokens + [ord(sign) for sign in text]}


def recall_documents(seed: int = 0, tokens: int = TOKENS) -> RecallDocuments:
    return RecallDocuments(Characters(), document_tokens=tokens, reference_tokens=REFERENCES, seed=seed)


def read(number: int, seed: int = 0) -> str:
    return "".join(map(chr, recall_documents(seed)[number]))


def facts_of(text: str, kind: Kind) -> list[dict[str, str]]:
    """Return the records that a text states."""
    seen: set[str] = set()
    template = re.escape(kind.fact.format(**{name: f"<{name}>" for name in kind.fields}))
    for name in kind.fields:
        where = f"<{name}>"
        template = template.replace(where, f"(?P={name})" if name in seen else f"(?P<{name}>[^\n]+?)")
        seen.add(name)
    return [found.groupdict() for found in re.finditer(template, text)]


def test_a_document_begins_as_any_text_and_has_the_wanted_length():
    for number in range(4):
        ids = recall_documents()[number]
        assert len(ids) == TOKENS
        assert ids[0] == 2 and 2 not in ids[1:]


def test_the_same_arguments_give_the_same_documents():
    assert read(1) == read(1)
    assert len({read(0), read(1), read(0, seed=1)}) == 3


def test_successive_documents_go_through_all_kinds():
    documents = recall_documents()
    kinds = [kind.opening for number in range(8) for kind in documents._kinds(number)]
    assert all(kinds.count(kind.opening) == 3 for kind in KINDS.values())


@pytest.mark.parametrize("number", range(8))
def test_everything_behind_the_facts_refers_to_them(number):
    text, documents = read(number), recall_documents()
    facts, references = text[: TOKENS - REFERENCES], text[TOKENS - REFERENCES :]
    asked = 0
    for kind in documents._kinds(number):
        records = facts_of(facts, kind)
        assert len(records) > 5
        assert kind.fact.format(**records[0]) not in references
        lines = [
            line.format(**record)
            for record in records
            for _, line, _ in kind.references
            if line.format(**record) in references
        ]
        asked += sum(map(len, lines))
    # All but headings, and what is cut off at both ends.
    assert asked > 0.7 * REFERENCES


def test_names_are_unambiguous():
    for number in range(8):
        for kind in recall_documents()._kinds(number):
            named = next(iter(kind.fields))
            names = [record[named] for record in facts_of(read(number)[: TOKENS - REFERENCES], kind)]
            assert len(set(names)) == len(names)


def test_nothing_is_taken_from_the_evaluation():
    text = "".join(read(number, seed) for number in range(8) for seed in range(5))
    assert not re.search(r"(?<![\w.])\d{5}(?!\w)", text)
    used = set(re.findall(r"[a-z]+", text.lower()))
    asked = {*words._ADJECTIVES, *words._NOUNS, *(w.lower() for c in words.CATEGORIES.values() for w in c)}
    assert used & asked == set(), "words of the evaluation"
    assert not re.search(r'"\w+ \w+": "', text)


def test_short_documents_still_state_something():
    ids = recall_documents(tokens=REFERENCES + 1)[0]
    assert len(ids) == REFERENCES + 1


def test_generated_documents_stand_in_the_place_of_others(texts):
    given = {"tokens": 1000, "document_tokens": 120, "seed": 0}
    plain = Documents(texts, Characters(), **given)
    generated = RecallDocuments(Characters(), document_tokens=120, reference_tokens=60, seed=0)
    mixed = Documents(texts, Characters(), **given, recall=generated, recall_at=[2, 5])
    assert len(mixed) == len(plain) == 9
    for index in range(9):
        assert mixed.is_recall(index) == (index in (2, 5))
        if index not in (2, 5):
            assert mixed[index] == plain[index]
    assert (mixed[2], mixed[5]) == (generated[0], generated[1])


@pytest.mark.parametrize("files", [1, 2, 4, 5])
@pytest.mark.parametrize("documents", [0, 1, 7, 36])
def test_places_are_spread_over_files_and_their_turns(files, documents):
    for number in range(documents + 1):
        chosen = spread_over_files(number, documents, files)
        assert len(set(chosen)) == len(chosen) == number
        assert all(0 <= index < documents for index in chosen)
        of_files = [sum(index % files == file for index in chosen) for file in range(min(files, documents))]
        assert not of_files or max(of_files) - min(of_files) <= 1


def test_places_are_far_apart():
    assert spread_over_files(4, 12, 4) == [4, 5, 6, 7]
    assert spread_over_files(6, 36, 4) == [8, 9, 18, 19, 24, 25]
