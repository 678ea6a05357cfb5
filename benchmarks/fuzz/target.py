"""What a fuzz target is, and accidents that can happen to any bytes."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from random import Random
from typing import Any, Protocol

__all__ = ["NUMBERS", "Target", "Violation", "damage", "number", "scratch_folder"]

#: Numbers at the borders of fields and bounds.
NUMBERS = (0, 1, 2, 7, 15, 16, 17, 127, 128, 255, 256, 4095, 4096, 4097, 65_535, 65_536, 65_537, 2**24,
           2**31 - 1,
           2**31, 2**32 - 1, 2**48, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip


class Violation(AssertionError):  # noqa: N818
    """A reader accepted what it must refuse, or returned something that is not sound."""


class Target(Protocol):
    """A reader under test.

    `make` returns a case that is picklable, `judge` the name of the outcome: the class of the typed error, or
    what was accepted. Anything else that `judge` raises is a finding. `bound` is how many bytes of memory
    judging a case may take at its peak.
    """

    name: str

    def make(self, random: Random) -> Any:
        """Return a mutated case."""

    def judge(self, case: Any) -> str:
        """Let the reader read a case."""

    def bound(self, case: Any) -> int:
        """Return the allocation bound of a case that `judge` has just judged, in bytes."""


def scratch_folder(owner: object) -> Path:
    """Return a folder, in memory where there is one, that goes with its owner."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    weakref.finalize(owner, shutil.rmtree, folder, True)
    return folder


def number(random: Random, bits: int) -> int:
    """Return an unsigned number of some bits: often one at a border."""
    chosen = random.choice(NUMBERS) if random.random() < 0.6 else random.getrandbits(bits)
    return chosen % (1 << bits)


def damage(random: Random, data: bytearray, other: bytes | bytearray) -> None:
    """Let one accident happen: bytes are flipped, lost, doubled, moved, foreign, zeroed or random."""
    size = len(data)
    start = random.randrange(size + 1)
    length = random.randrange(1, 9) if random.random() < 0.6 else random.randrange(1, 300)
    accident = random.randrange(9)
    if accident <= 1 and start < size:
        data[start] ^= 1 << random.randrange(8)
    elif accident == 2:
        del data[start:]
    elif accident == 3:
        del data[start : start + length]
    elif accident == 4:
        data[start:start] = data[start : start + length]
    elif accident == 5:
        target = random.randrange(size + 1)
        data[target : target + length] = data[start : start + length]
    elif accident == 6:
        data[start : start + length] = other[start : start + length]
    elif accident == 7:
        data[start : start + length] = bytes(len(data[start : start + length]))
    else:
        data[start : start + length] = random.randbytes(length)
