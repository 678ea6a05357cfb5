"""What a calibration is asked to do, and the digest that tells whether it was done already."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, pairwise
from pathlib import Path

from dynamo_kvtc.calibration.capture import RECENT_WINDOW, SINK_TOKENS
from dynamo_kvtc.calibration.fingerprint import hash_weights
from dynamo_kvtc.calibration.fit import FitMethod
from dynamo_kvtc.calibration.manifest import SCHEMA_VERSION
from dynamo_kvtc.calibration.recall import RECALL_VERSION
from dynamo_kvtc.calibration.text import hash_files, spread_over_files
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.errors import CalibrationError

__all__ = [
    "DEFAULT_RATIOS",
    "DEFAULT_RECALL_SHARES",
    "SENSITIVITIES",
    "CalibrationSettings",
    "InputDigests",
    "default_layer_groups",
    "digest_inputs",
    "split_layers",
]

#: Ratios that plans are made for, by profile: of real streams with rd, before entropy coding with kvtc.
DEFAULT_RATIOS: dict[str, tuple[float, ...]] = {
    "rd": (10.0, 20.0, 40.0, 80.0),
    "kvtc": (8.0, 16.0, 32.0),
}

#: Share of generated recall documents, by profile. With rd that of one of five domains, which takes the
#: divergence of retrieval to a third (docs/science.md); the published method calibrates on text alone.
DEFAULT_RECALL_SHARES = {"rd": 0.2, "kvtc": 0.0}

#: Where the rd profile may take the model's sensitivity from.
SENSITIVITIES = ("gradients", "forward")

#: Row that the rd profile's default layer groups exceed by a quarter at most, in elements: its covariance
#: takes half a gigabyte, and its exact eigenvectors some minutes.
_LARGEST_ROW = 8192

#: With fewer groups, a small first one would cost too many bytes.
_LEAST_GROUPS_WITH_A_SMALL_FIRST = 4

#: Most layers of the default layer groups: with kvtc this gives the least bytes, with rd its products take no
#: longer than those of kvtc at like quality; docs/calibration.md and docs/science.md have the measurements.
_LAYERS_PER_GROUP = 10


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
    profile : str
        ``"rd"`` or ``"kvtc"``.
    tokens : int
        Tokens to prefill in all. 160,000 to 200,000 are published practice, 40,000 come close.
    ratios : tuple[float, ...]
        Ratios to make plans for: of real streams with rd, nominal with kvtc. Empty stands for
        `DEFAULT_RATIOS`, which take its place.
    max_kls : tuple[float, ...]
        Divergences (nats) to make further plans for, each with the highest ratio that stays within; rd only.
    layers_per_group : int or None
        Consecutive layers with one basis; None for `default_layer_groups`.
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
    validation_documents : int
        Documents that take no part in the fit; the plans' ratio and divergence are measured on them. rd only.
    sensitivity_documents : int
        Documents from which the model's sensitivity is taken, at most; rd only.
    scored_tokens : int
        Last tokens of such a document, and of a validation document, whose predictions count; rd only.
    sensitivity : str
        ``"gradients"``, or ``"forward"`` for models too large for a backward pass; rd only.
    recall_share : float or None
        Share of the documents to fit, to the nearest document, in whose place documents are generated that
        state facts and refer back to them; None for `DEFAULT_RECALL_SHARES`, which takes its place.
    """

    model: str
    texts: tuple[Path, ...]
    out: Path
    profile: str = "rd"
    tokens: int = 40_000
    ratios: tuple[float, ...] = ()
    max_kls: tuple[float, ...] = ()
    layers_per_group: int | None = None
    document_tokens: int = 2048
    seed: int = 0
    threads: int | None = None
    method: FitMethod = FitMethod.AUTO
    dtype: str = "bfloat16"
    basis_dtype: str = "float16"
    recent_window: int = RECENT_WINDOW
    sample_tokens: int = 1024
    validation_documents: int = 2
    sensitivity_documents: int = 24
    scored_tokens: int = 384
    sensitivity: str = "gradients"
    recall_share: float | None = None

    def __post_init__(self) -> None:
        if self.profile not in DEFAULT_RATIOS:
            raise CalibrationError(
                f"there is no profile {self.profile!r} to calibrate; known: {', '.join(DEFAULT_RATIOS)}"
            )
        if not self.ratios:
            object.__setattr__(self, "ratios", DEFAULT_RATIOS[self.profile])
        if self.recall_share is None:
            object.__setattr__(self, "recall_share", DEFAULT_RECALL_SHARES[self.profile])
        if not 1 < min(self.ratios) <= max(self.ratios) < math.inf or len(set(self.ratios)) < len(
            self.ratios
        ):
            raise CalibrationError("ratios must be above 1 and none may stand twice")
        if len(self.ratios) + len(self.max_kls) > 256:
            raise CalibrationError("an artifact holds at most 256 plans: give fewer ratios and divergences")
        if self.layers_per_group is not None and self.layers_per_group < 1:
            raise CalibrationError("a layer group has at least one layer")
        if not 0 <= (self.recall_share or 0) <= 1:
            raise CalibrationError(
                f"the share of recall documents is {self.recall_share}; give one from 0 to 1"
            )
        if min(self.tokens, self.sample_tokens) < 1 or self.recent_window < 0:
            raise CalibrationError("numbers of tokens must be positive")
        left_out = SINK_TOKENS + self.recent_window
        if self.profile == "rd":
            self._check_rd()
            left_out += self.scored_tokens
        elif self.max_kls:
            raise CalibrationError(
                "the kvtc profile measures no divergences: give ratios, or choose profile rd"
            )
        if self.document_tokens <= left_out:
            raise CalibrationError(
                f"documents of {self.document_tokens} tokens leave nothing to fit once sinks, the recent "
                f"window and scored tokens are taken away; they need more than {left_out}"
            )

    def _check_rd(self) -> None:
        kls = self.max_kls
        if kls and (not 0 < min(kls) <= max(kls) < math.inf or len(set(kls)) < len(kls)):
            raise CalibrationError("divergences must be positive and none may stand twice")
        if min(self.validation_documents, self.sensitivity_documents, self.scored_tokens) < 1:
            raise CalibrationError(
                "rd needs at least one validation document, one sensitivity document and one scored token"
            )
        if self.sensitivity not in SENSITIVITIES:
            raise CalibrationError(
                f"there is no sensitivity from {self.sensitivity!r}; known: {', '.join(SENSITIVITIES)}"
            )

    @property
    def plan_ratios(self) -> dict[int, float]:
        """Ratio by plan id, ascending."""
        return dict(enumerate(sorted(self.ratios)))

    def recall_documents(self) -> list[int]:
        """Return the indices of the documents that are generated; none of them is for validation."""
        documents = -(-self.tokens // self.document_tokens)
        if self.profile == "rd":
            documents -= self.validation_documents
        number = round((self.recall_share or 0) * max(0, documents))
        return spread_over_files(number, documents, len(self.texts))

    def layer_groups(self, geometry: KvGeometry) -> tuple[LayerRange, ...]:
        """Divide a model's layers as these settings say."""
        if self.layers_per_group:
            return split_layers(geometry.num_layers, self.layers_per_group)
        return default_layer_groups(self.profile, geometry)


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
        "profile": settings.profile,
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
    if settings.profile == "rd":
        content |= {
            "max_kls": sorted(settings.max_kls),
            "validation_documents": settings.validation_documents,
            "sensitivity_documents": settings.sensitivity_documents,
            "scored_tokens": settings.scored_tokens,
            "sensitivity": settings.sensitivity,
        }
    if settings.recall_share:
        content["recall"] = [RECALL_VERSION, settings.recall_share]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return InputDigests(text, blake2b(canonical.encode(), digest_size=32).hexdigest())


def default_layer_groups(profile: str, geometry: KvGeometry) -> tuple[LayerRange, ...]:
    """Return which layers share a basis if nothing is said: at most about 10, with rd perhaps fewer.

    With rd, more layers find more in common, and the metric keeps early layers from being starved, but the
    products of a token grow with the row. Rows of much more than 8,192 elements would make covariances and
    eigenproblems too large as well. Four groups and more begin with one of half the size, so that the first
    layers are in place early; the others are as even as they can be.
    """
    layers = geometry.num_layers
    most = min(_LAYERS_PER_GROUP, layers)
    if profile == "kvtc":
        return split_layers(layers, most)
    most = min(most, max(1, _LARGEST_ROW // geometry.layer_size))
    groups = -(-layers // most)
    if groups < _LEAST_GROUPS_WITH_A_SMALL_FIRST:
        return split_layers(layers, -(-layers // groups))
    first = max(1, most // 2)
    # As many groups as without a small one, unless rows would grow by more than a quarter.
    others = max(groups - 1, -(-(layers - first) // (most + most // 4)))
    size, larger = divmod(layers - first, others)
    starts = accumulate([first] + [size + 1] * larger + [size] * (others - larger), initial=0)
    return tuple(LayerRange(start, stop - start) for start, stop in pairwise(starts))


def split_layers(num_layers: int, layers_per_group: int | None) -> tuple[LayerRange, ...]:
    """Divide the layers into groups of `layers_per_group`, None being all; the last may be smaller."""
    step = layers_per_group or num_layers
    return tuple(LayerRange(first, min(step, num_layers - first)) for first in range(0, num_layers, step))
