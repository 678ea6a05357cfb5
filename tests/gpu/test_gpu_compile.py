"""Every kernel compiles to machine code of Hopper, with tensor-core products; no GPU is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels that do not depend on the head size are compiled once."""
    return tmp_path_factory.mktemp("triton")


@pytest.mark.slow
@pytest.mark.parametrize(("head_size", "dtype"), [(128, "bfloat16"), (64, "float16"), (256, "bfloat16")])
def test_kernels_compile_for_hopper(cache: Path, head_size: int, dtype: str) -> None:
    program = Path(__file__).with_name("compile_kernels.py")
    environment = {"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, program, "90", str(head_size), dtype],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    products = [kernel for kernel in kernels if kernel["name"].startswith(("project", "reconstruct"))]
    assert len(products) >= 4
    for kernel in products:
        loop = kernel["loop"]
        assert loop["products"] >= 4, kernel
        # Operands arrive 16 bytes at a time, asynchronously; nothing is spilled or divided where time goes.
        assert loop["wide asynchronous loads"] >= 10, kernel
        assert loop["other loads"] == loop["local memory"] == loop["divisions"] == 0, kernel
        assert 96 << 10 <= kernel["shared"] <= 227 << 10, kernel
    check_rans({kernel["name"].split(".")[0]: kernel for kernel in kernels})
    assert any(kernel["name"].startswith("xxh3.") for kernel in kernels)
    for kernel in kernels:
        # Addresses and counts around a product's loop, once a tile.
        most = 640 if kernel["name"].startswith("project") else 0
        assert 0 <= kernel["stack"] <= most, kernel


def check_rans(kernels: dict[str, dict[str, Any]]) -> None:
    """A step of 32 bytes is one sum over a warp and a few dozen instructions, and keeps to the registers."""
    assert {"rans_count", "rans_write_table", "rans_encode", "rans_decode"} <= set(kernels)
    # The encoder's loop takes four steps.
    for name, steps, most in (("rans_decode", 1, 45), ("rans_encode", 4, 190)):
        loop = kernels[name]["loop"]
        assert loop["instructions"] <= most, loop
        assert loop["sums over lanes"] == steps, loop
        assert loop["counts of bits"] == 2 * steps, loop
        assert loop["local and shared memory"] == loop["divisions and barriers"] == 0, loop
    # The decoder's words are in the registers of the warp: it loads a table's entry and stores a byte.
    loop = kernels["rans_decode"]["loop"]
    assert loop["shuffles"] == loop["loads"] == loop["stores"] == 1, loop
