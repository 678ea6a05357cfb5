"""Streams again, guided by coverage: ``python -m benchmarks.fuzz.guided -atheris_runs=1000000``.

Needs ``pip install 'dynamo-kvtc[fuzz]'``. Atheris keeps the inputs that reach new places of the reader and
asks for mutations of those; each is one change of `StreamTarget.change`, with checksums made right again.
Arguments are libFuzzer's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["dynamo_kvtc.codec"]):
    from benchmarks.fuzz.streams import StreamCase, StreamTarget, seal_chunks, seal_header


def main() -> None:
    target = StreamTarget()

    def judge(data: bytes) -> None:
        target.judge(StreamCase(0, data, forged=True))

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random, changed = Random(seed), bytearray(data)
        target.change(random, changed)
        seal_chunks(changed)
        seal_header(changed)
        return bytes(changed[:max_size])

    with tempfile.TemporaryDirectory() as corpus:
        for index, golden in enumerate(target.golden):
            (Path(corpus) / str(index)).write_bytes(golden)
        atheris.Setup([*sys.argv, "-max_len=4096", corpus], judge, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
