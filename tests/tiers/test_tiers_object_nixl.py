"""The object tier over NIXL's OBJ backend, in a child process: the plugin folder is chosen per process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("obstore", reason="needs obstore: pip install 'dynamo-kvtc[object]'")

from s3_server import CREDENTIALS, S3Server

HERE = Path(__file__).parent


def plugin_folder() -> str | None:
    """Return the folder of the NIXL plugins with OBJ among them: that of nixl-cu12."""
    spec = importlib.util.find_spec("nixl_cu12")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parents[1] / ".nixl_cu12.mesonpy.libs" / "plugins"
    return str(folder) if (folder / "libplugin_OBJ.so").exists() else None


def test_the_object_tier_over_nixl(s3_server: S3Server, tmp_path: Path) -> None:
    folder = plugin_folder()
    if folder is None:
        pytest.skip("needs NIXL's OBJ plugin: pip install --no-deps nixl-cu12")
    child = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *(f"--basetemp={tmp_path / 'nixl'}", str(HERE / "object_nixl_cases.py")),
        ],
        env={**os.environ, **CREDENTIALS, "NIXL_PLUGIN_DIR": folder, "KVTC_TEST_S3": s3_server.endpoint},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert " passed" in child.stdout and "skipped" not in child.stdout
