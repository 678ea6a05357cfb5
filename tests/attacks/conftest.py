"""The readers of golden parameters lie beside the tests of the codec."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "codec"))
