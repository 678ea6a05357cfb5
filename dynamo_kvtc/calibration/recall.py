"""Generated documents that state many arbitrary facts and later refer back to them exactly.

Ordinary text seldom asks a model for a string that stood a thousand tokens before, and for nothing else; so
losses on it say little about what exact recall needs from the cache. The facts of a document are records of
some kinds (`recall_kinds`), such as directories, settings, stock lists or logs. They end where the recent
window begins, and everything behind them refers to them: questions and answers, lookups, tables in another
order. The labels of the sensitivity are drawn from the model there as anywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from dynamo_kvtc.calibration.recall_kinds import KINDS, Kind

__all__ = ["RECALL_VERSION", "RecallDocuments"]

#: Part of the digest of a calibration: changes with what is generated.
RECALL_VERSION = 1

#: Kinds of record in one document.
_KINDS_PER_DOCUMENT = 3

#: Records that are referred to under one heading.
_LEAST_REFERRED, _MOST_REFERRED = 4, 8


class RecallDocuments:
    """Token ids of generated documents, each made when it is asked for.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's own; the special tokens that it puts before a text are put before every document.
    document_tokens : int
        Tokens of a document.
    reference_tokens : int
        Tokens at its end, at least, that refer back: recent window and scored tokens. The facts stand before
        them.
    seed : int
        Chooses everything that is drawn.
    """

    def __init__(self, tokenizer: Any, *, document_tokens: int, reference_tokens: int, seed: int) -> None:
        self._tokenizer = tokenizer
        self._document_tokens = document_tokens
        self._fact_tokens = document_tokens - reference_tokens
        self._seed = seed

    def __getitem__(self, number: int) -> list[int]:
        """Return the token ids of one document; the same for the same arguments."""
        random = Random(f"recall:{self._seed}:{number}")
        ids, stated = self._facts(self._kinds(number), random)
        for text in _references(stated, random):
            ids += self._tokens(text)
            if len(ids) >= self._document_tokens:
                break
        return ids[: self._document_tokens]

    def _kinds(self, number: int) -> list[Kind]:
        """Return the kinds of a document; successive documents go through all of them in turn."""
        kinds = list(KINDS.values())
        Random(f"recall:{self._seed}").shuffle(kinds)
        first = number * _KINDS_PER_DOCUMENT
        return [kinds[(first + offset) % len(kinds)] for offset in range(_KINDS_PER_DOCUMENT)]

    def _facts(
        self, kinds: list[Kind], random: Random
    ) -> tuple[list[int], list[tuple[Kind, list[dict[str, str]]]]]:
        """Return the first part of a document, a block of each kind, and what it states."""
        ids: list[int] = self._tokenizer("", verbose=False)["input_ids"]
        stated = []
        for turn, kind in enumerate(kinds):
            stop = self._fact_tokens * (turn + 1) // len(kinds)
            ids += self._tokens(kind.opening.format())
            closing = self._tokens(kind.closing.format())
            records: list[dict[str, str]] = []
            for record in kind.records(random):
                line = self._tokens(kind.fact.format(**record))
                if records and len(ids) + len(line) + len(closing) > stop:
                    break
                ids += line
                records.append(record)
            ids += closing
            stated.append((kind, records))
        return ids, stated

    def _tokens(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found


def _references(stated: list[tuple[Kind, list[dict[str, str]]]], random: Random) -> Iterator[str]:
    """Yield references to what was stated, without end; no way of referring twice before all came up."""
    ways = [(kind, records, way) for kind, records in stated for way in kind.references]
    while True:
        random.shuffle(ways)
        for _, records, (opening, line, closing) in ways:
            yield opening.format()
            count = min(len(records), random.randint(_LEAST_REFERRED, _MOST_REFERRED))
            yield from (line.format(**record) for record in random.sample(records, count))
            yield closing.format()
