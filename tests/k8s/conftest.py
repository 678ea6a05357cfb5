"""The chart, rendered, for tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "k8s"))
sys.path.insert(0, str(Path(__file__).parent))
