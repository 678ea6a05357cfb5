"""What a calibration is asked to do, and the digest that tells whether it was done already."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from dynamo_kvtc.calibration.capture import RECENT_WINDOW, SINK_TOKENS
from dynamo_kvtc.calibration.fingerprint import hash_weights
from dynamo_kvtc.calibration.fit import FitMethod
from dynamo_kvtc.calibration.manifest import SCHEMA_VERSION
from dynamo_kvtc.calibration.text import hash_files
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.errors import CalibrationError

__all__ = ["CalibrationSettings", "InputDigests", "digest_inputs", "split_layers"]


@dataclass(frozen=True)
class CalibrationSettings:
    """Everything a calibration depends on.

    Attributes
    ----------
    model : str
        A Hugging Face folder, a ``.gguf`` file or ``builtin:smollm2``.
    texts : tuple[Path, ...]
        UTF-8 files; documents are taken from them in turn.
    out : Path
        Folder of the artifact, and of the state of an unfinished calibration.
    tokens : int
        Tokens to prefill in all. 160,000 to 200,000 are published practice, 40,000 come close.
    ratios : tuple[float, ...]
        Nominal ratios to make bit plans for.
    layers_per_group : int or None
        Consecutive layers with one basis; None for all.
    document_tokens : int
        Tokens of one document.
    seed : int
        Of the choice of documents and of the randomised fit.
    threads : int or None
        Threads of torch while calibrating; None leaves them as they are.
    method : FitMethod
        How covariances are decomposed.
    dtype : str
        dtype of the model and its cache.
    basis_dtype : str
        dtype in which bases are stored.
    recent_window : int
        Last tokens of each document that stay out of the fit.
    sample_tokens : int
        Rows on which quantisation is simulated.
    """

    model: str
    texts: tuple[Path, ...]
    out: Path
    tokens: int = 40_000
    ratios: tuple[float, ...] = (8.0, 16.0, 32.0)
    layers_per_group: int | None = 10
    document_tokens: int = 2048
    seed: int = 0
    threads: int | None = None
    method: FitMethod = FitMethod.AUTO
    dtype: str = "bfloat16"
    basis_dtype: str = "float16"
    recent_window: int = RECENT_WINDOW
    sample_tokens: int = 1024

    def __post_init__(self) -> None:
        if not self.ratios or min(self.ratios) <= 1 or len(set(self.ratios)) < len(self.ratios):
            raise CalibrationError("give at least one ratio, all above 1 and none twice")
        if len(self.ratios) > 256:
            raise CalibrationError("an artifact holds at most 256 ratios")
        if self.layers_per_group is not None and self.layers_per_group < 1:
            raise CalibrationError("a layer group has at least one layer")
        if min(self.tokens, self.sample_tokens) < 1 or self.recent_window < 0:
            raise CalibrationError("numbers of tokens must be positive")
        if self.document_tokens <= self.recent_window + SINK_TOKENS:
            raise CalibrationError(
                f"documents of {self.document_tokens} tokens hold nothing but sinks and the recent window; "
                f"they need more than {self.recent_window + SINK_TOKENS}"
            )

    @property
    def plan_ratios(self) -> dict[int, float]:
        """Nominal ratio by plan id, ascending."""
        return dict(enumerate(sorted(self.ratios)))


@dataclass(frozen=True)
class InputDigests:
    """Hex digests of what goes into a calibration.

    Attributes
    ----------
    text : str
        Of the texts.
    everything : str
        Of the model's files, the texts and all settings that change the result.
    """

    text: str
    everything: str


def digest_inputs(settings: CalibrationSettings, folder: Path) -> InputDigests:
    """Digest settings, texts and the model in `folder`.

    Raises
    ------
    CalibrationError
        If a file cannot be read.
    """
    text = hash_files(settings.texts)
    described = [path for name in ("config.json", "tokenizer.json") if (path := folder / name).is_file()]
    content = {
        "schema": SCHEMA_VERSION,
        "weights": hash_weights(folder),
        "model": hash_files(described),
        "text": text,
        "tokens": settings.tokens,
        "ratios": sorted(settings.ratios),
        "layers_per_group": settings.layers_per_group,
        "document_tokens": settings.document_tokens,
        "seed": settings.seed,
        "method": settings.method.value,
        "dtype": settings.dtype,
        "basis_dtype": settings.basis_dtype,
        "recent_window": settings.recent_window,
        "sample_tokens": settings.sample_tokens,
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return InputDigests(text, blake2b(canonical.encode(), digest_size=32).hexdigest())


def split_layers(num_layers: int, layers_per_group: int | None) -> tuple[LayerRange, ...]:
    """Divide the layers into groups of `layers_per_group`; the last may be smaller."""
    step = layers_per_group or num_layers
    return tuple(LayerRange(first, min(step, num_layers - first)) for first in range(0, num_layers, step))
