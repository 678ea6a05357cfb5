"""Cut documents for calibration out of text files, evenly and without reading the files whole."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from dynamo_kvtc.calibration.recall import RecallDocuments
from dynamo_kvtc.errors import CalibrationError

__all__ = ["Documents", "hash_files", "spread_over_files"]

#: Bytes read for a document, per token wanted; English has 4 to 5 bytes a token, other scripts more.
_BYTES_PER_TOKEN = 8

_READ_BYTES = 1 << 20

#: What a UTF-8 character goes on with; where there is no line to begin with, begin with a character.
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


class Documents:
    """Token ids of `count` documents, from all files in turn.

    Every file is divided into as many equal stretches as it gives documents; a document begins at the
    first line behind a place within its stretch that the seed chooses, and does not leave the stretch.

    Parameters
    ----------
    files : Sequence[Path]
        UTF-8 text.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's own; the special tokens that it puts before a text are put before every document.
    tokens, document_tokens : int
        Tokens in all, and in one document. Documents are shorter, or empty, where a file is too small.
    seed : int
        Chooses where documents begin.
    recall : RecallDocuments, optional
        Generated documents.
    recall_at : Sequence[int]
        Indices of the documents in whose place they stand, in turn; the others stay what they are.

    Raises
    ------
    CalibrationError
        If a file cannot be read or is not UTF-8 text.
    """

    def __init__(
        self,
        files: Sequence[Path],
        tokenizer: Any,
        *,
        tokens: int,
        document_tokens: int,
        seed: int,
        recall: RecallDocuments | None = None,
        recall_at: Sequence[int] = (),
    ) -> None:
        if not files:
            raise CalibrationError("calibration needs text: name at least one file")
        self._files = tuple(files)
        self._tokenizer = tokenizer
        self._document_tokens = document_tokens
        self._seed = seed
        self.count = max(1, -(-tokens // document_tokens))
        self._recall = recall
        self._recall_numbers = {index: number for number, index in enumerate(recall_at)}

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        return (self[index] for index in range(self.count))

    def __getitem__(self, index: int) -> list[int]:
        """Return the token ids of one document; the same for the same arguments."""
        if not 0 <= index < self.count:
            raise IndexError(f"document {index} of {self.count}")
        if self._recall is not None and self.is_recall(index):
            return self._recall[self._recall_numbers[index]]
        file_index, turn = index % len(self._files), index // len(self._files)
        turns = -(-(self.count - file_index) // len(self._files))
        text = self._read_stretch(self._files[file_index], turn, turns)
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        return ids[: self._document_tokens]

    def is_recall(self, index: int) -> bool:
        """Return whether a document is a generated one."""
        return index in self._recall_numbers

    def _read_stretch(self, path: Path, turn: int, turns: int) -> str:
        wanted = self._document_tokens * _BYTES_PER_TOKEN
        try:
            size = path.stat().st_size
            first, stop = size * turn // turns, size * (turn + 1) // turns
            slack = max(0, stop - first - wanted)
            start = first + random.Random(f"{self._seed}:{path.name}:{turn}").randint(0, slack)
            with path.open("rb") as file:
                file.seek(start)
                data = file.read(min(wanted, stop - start))
        except OSError as error:
            raise CalibrationError(f"cannot read the text {path}: {error}") from error
        if start > 0:
            data = data[data.find(b"\n") + 1 :].lstrip(_CONTINUATION_BYTES)
        try:
            return data[: _whole_characters(data)].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{path} is not UTF-8 text: {error}") from error


def spread_over_files(number: int, documents: int, files: int) -> list[int]:
    """Choose documents, each file giving as many as the others, and evenly among those of a file.

    Parameters
    ----------
    number : int
        How many documents to choose.
    documents : int
        Among how many, from the first; they come from the files in turn.
    files : int
        Number of files.

    Returns
    -------
    list[int]
        Different indices below `documents`; fewer than `number` if a file has too few.
    """
    chosen = []
    for file in range(min(files, number, documents)):
        turns, wanted = -(-(documents - file) // files), -(-(number - file) // files)
        wanted = min(wanted, turns)
        chosen += [files * ((2 * turn + 1) * turns // (2 * wanted)) + file for turn in range(wanted)]
    return sorted(chosen)


def hash_files(files: Sequence[Path]) -> str:
    """Return the hex BLAKE2b-256 over names, sizes and content of text files.

    Raises
    ------
    CalibrationError
        If one cannot be read.
    """
    whole = blake2b(digest_size=32)
    for path in files:
        try:
            with path.open("rb") as file:
                digest = blake2b(digest_size=32)
                while piece := file.read(_READ_BYTES):
                    digest.update(piece)
        except OSError as error:
            raise CalibrationError(f"cannot read the text {path}: {error}") from error
        whole.update(path.name.encode() + b"\0" + digest.digest())
    return whole.hexdigest()


def _whole_characters(data: bytes) -> int:
    """Return the length of `data` without a UTF-8 character that its end cuts in two."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            needed = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if needed > back else len(data)
    return len(data)
