"""Fuzzing of everything that reads bytes from outside: streams, segments, artifacts, configurations.

Each target makes mutated input from golden input and judges what its reader does with it. Input is either
damaged (nothing is recomputed: it must be refused, or read as what it was) or forged (checksums are made
right again: it must be refused, or read as something sound). Everything follows from a seed.

    python -m benchmarks.fuzz                   ten million streams and more: tens of minutes
    python -m benchmarks.fuzz --scale 0.001     a quick look
    python -m benchmarks.fuzz.guided stream     guided by coverage (needs ``pip install atheris``)
"""
