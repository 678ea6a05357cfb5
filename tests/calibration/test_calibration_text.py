from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.calibration.text import Documents, hash_files
from dynamo_kvtc.errors import CalibrationError


class Characters:
    """A tokenizer with one token per character, so that tests see exactly which text was taken."""

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(sign) for sign in text]}


def read(documents: Documents) -> list[str]:
    return ["".join(map(chr, ids)) for ids in documents]


def lines_of(path) -> set[str]:
    return set(path.read_text(encoding="utf-8").splitlines(keepends=True))


def test_documents_come_from_all_files_in_turn_and_begin_with_a_line(texts):
    documents = Documents(texts, Characters(), tokens=1000, document_tokens=120, seed=0)
    found = read(documents)
    assert len(found) == len(documents) == 9
    for index, document in enumerate(found):
        assert len(document) == 120
        assert document.splitlines(keepends=True)[0] in lines_of(texts[index % 2])
    assert len(set(found)) == 9


def test_the_seed_chooses_the_places_and_repeats_them(texts):
    def documents(seed):
        return read(Documents(texts, Characters(), tokens=600, document_tokens=100, seed=seed))

    assert documents(1) == documents(1)
    assert documents(1) != documents(2)


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="aé漢😀\n", min_size=1, max_size=60), tokens=st.integers(1, 30))
def test_no_character_is_ever_cut(tmp_path_factory, text, tokens):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(text.encode())
    for document in read(Documents([path], Characters(), tokens=60, document_tokens=tokens, seed=3)):
        assert document in text
        assert len(document) <= tokens


def test_documents_of_a_small_file_do_not_overlap(tmp_path):
    path = tmp_path / "small.txt"
    path.write_text("".join(f"{i:03}\n" for i in range(40)))
    lines = [
        line
        for document in read(Documents([path], Characters(), tokens=400, document_tokens=50, seed=0))
        for line in document.splitlines()
        if len(line) == 3
    ]
    assert len(lines) == len(set(lines)) > 20


def test_binary_and_missing_files_are_refused(tmp_path):
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"ab\xff\xfe\x00cd" * 50)
    with pytest.raises(CalibrationError, match="UTF-8"):
        Documents([binary], Characters(), tokens=10, document_tokens=10, seed=0)[0]
    missing = tmp_path / "missing.txt"
    with pytest.raises(CalibrationError, match="cannot read"):
        Documents([missing], Characters(), tokens=10, document_tokens=10, seed=0)[0]
    with pytest.raises(CalibrationError, match="cannot read"):
        hash_files([missing])
    with pytest.raises(CalibrationError, match="at least one file"):
        Documents([], Characters(), tokens=10, document_tokens=10, seed=0)


def test_the_hash_of_files_knows_content_and_order(texts):
    first, second = texts
    assert hash_files([first, second]) == hash_files([first, second])
    assert hash_files([first, second]) != hash_files([second, first])
    assert hash_files([first]) != hash_files([second])
