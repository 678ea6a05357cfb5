"""The artifacts that codecs need: given by the caller, or calibrated once and kept in the cache folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.quality.domains import DOMAINS
from dynamo_kvtc.calibration.artifact import Artifact, load_artifact
from dynamo_kvtc.calibration.fingerprint import hash_weights
from dynamo_kvtc.calibration.models import cache_folder
from dynamo_kvtc.calibration.run import Progress, calibrate
from dynamo_kvtc.calibration.settings import CalibrationSettings
from dynamo_kvtc.errors import EvaluationError

__all__ = ["CalibrationPlan", "artifacts_for", "calibrated"]


@dataclass(frozen=True)
class CalibrationPlan:
    """How artifacts are calibrated: every profile on the same text.

    Attributes
    ----------
    tokens, document_tokens : int
        Tokens of calibration text in all, evenly from all its domains, and of one document.
    ratios : Mapping[str, tuple[float, ...]]
        Nominal ratios by profile.
    layers_per_group : int or None
        Consecutive layers with one basis; None for each profile's best.
    sensitivity_documents, validation_documents : int
        Documents that rd takes the model's sensitivity from, and that it measures its plans on.
    domains : tuple[str, ...]
        Names of `DOMAINS` whose calibration texts are used.
    seed : int
        Chooses the documents among the texts', and everything else that is drawn.
    recall_share : float or None
        Share of generated recall documents; None for each profile's own.
    """

    tokens: int = 81_920
    document_tokens: int = 2048
    ratios: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            "kvtc": (4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0),
            "rd": (10.0, 16.0, 20.0, 28.0, 40.0, 56.0, 80.0, 112.0),
        }
    )
    layers_per_group: int | None = None
    sensitivity_documents: int = 24
    validation_documents: int = 4
    domains: tuple[str, ...] = tuple(DOMAINS)
    seed: int = 0
    recall_share: float | None = None


def artifacts_for(
    folder: Path,
    profiles: Sequence[str],
    dtype: str,
    plan: CalibrationPlan,
    given: Mapping[str, Sequence[Path]],
    progress: Callable[[Progress], None],
) -> dict[str, Artifact]:
    """Return the artifacts of a model, by profile.

    Parameters
    ----------
    folder : Path
        The model's Hugging Face folder.
    profiles : Sequence[str]
        Which ones.
    dtype : str
        dtype of model and cache.
    plan : CalibrationPlan
        How those are calibrated that are not given.
    given : Mapping[str, Sequence[Path]]
        Folders of ready artifacts by profile, of this model or others.
    progress : Callable[[Progress], None]
        Called while calibrating.

    Raises
    ------
    ArtifactError, CalibrationError
        If a given artifact cannot be read, or calibration fails.
    EvaluationError
        If a profile cannot be calibrated here.
    """
    weights_hash = hash_weights(folder)
    found = {}
    for profile in profiles:
        ready = [load_artifact(path) for path in given.get(profile, ())]
        own = [artifact for artifact in ready if artifact.manifest.model.weights_hash == weights_hash]
        found[profile] = own[0] if own else calibrated(folder, profile, dtype, plan, progress)
    return found


def calibrated(
    folder: Path, profile: str, dtype: str, plan: CalibrationPlan, progress: Callable[[Progress], None]
) -> Artifact:
    """Return a model's artifact of one profile from the cache, or calibrate it; see `artifacts_for`."""
    if profile not in plan.ratios:
        raise EvaluationError(f"there is no calibration of profile {profile!r}; give an artifact")
    layers = plan.layers_per_group or "best"
    name = f"{folder.name}-{profile}-{dtype}-{plan.tokens}-tokens-{layers}-layers"
    if plan.domains != tuple(DOMAINS):
        name += f"-{'-'.join(plan.domains)}"
    if plan.seed:
        name += f"-seed-{plan.seed}"
    if plan.recall_share is not None:
        name += f"-recall-{plan.recall_share:g}"
    settings = CalibrationSettings(
        model=str(folder),
        texts=tuple(DOMAINS[name].calibration for name in plan.domains),
        out=cache_folder() / "quality" / name,
        profile=profile,
        tokens=plan.tokens,
        document_tokens=plan.document_tokens,
        ratios=plan.ratios[profile],
        layers_per_group=plan.layers_per_group,
        dtype=dtype,
        sensitivity_documents=plan.sensitivity_documents,
        validation_documents=plan.validation_documents,
        seed=plan.seed,
        recall_share=plan.recall_share,
    )
    return calibrate(settings, progress)
