"""One run: models, tasks and codecs in, scores of documents out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.quality.artifacts import artifacts_for
from benchmarks.quality.codecs import CODECS, CodecInputs, DocumentCodec
from benchmarks.quality.measure import DocumentScore, measure_document
from benchmarks.quality.models import model_spec
from benchmarks.quality.settings import RunPlan
from benchmarks.quality.tasks import Task
from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.models import LoadedModel, load_model, resolve_model
from dynamo_kvtc.errors import EvaluationError

__all__ = ["RunRequest", "Step", "measure_task", "run_model"]


@dataclass(frozen=True, slots=True)
class Step:
    """How far a run is: what is being done, and work done and in all, in a unit of the stage's own."""

    stage: str
    done: float
    total: float


@dataclass(frozen=True)
class RunRequest:
    """What to run.

    Attributes
    ----------
    plan : RunPlan
        Sizes and defaults.
    tasks, codecs : Sequence[str]
        Names; by default those of the plan.
    dtype : str
        dtype of models and caches.
    tier_block_tokens : int
        Tokens of one stream.
    artifacts : Mapping[str, Sequence[Path]]
        Folders of ready artifacts by profile.

    Raises
    ------
    EvaluationError
        If a name is unknown.
    """

    plan: RunPlan
    tasks: Sequence[str] = ()
    codecs: Sequence[str] = ()
    dtype: str = "float32"
    tier_block_tokens: int = 256
    artifacts: Mapping[str, Sequence[Path]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, names, known in (
            ("task", self.tasks, self.plan.tasks),
            ("codec", self.codecs, CODECS),
        ):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise EvaluationError(f"there is no {what} {unknown[0]!r}; known: {', '.join(known)}")


def run_model(
    model: str, request: RunRequest, on_step: Callable[[Step], None]
) -> tuple[dict[str, Artifact], Iterator[DocumentScore]]:
    """Load a model, prepare what its codecs need, and measure.

    Parameters
    ----------
    model : str
        A name of `benchmarks.quality.models.MODELS`, or what `load_model` takes.
    request : RunRequest
        What to run.
    on_step : Callable[[Step], None]
        Called after each piece of work.

    Returns
    -------
    tuple[dict[str, Artifact], Iterator[DocumentScore]]
        The artifacts in use, and the scores one by one as they are measured.

    Raises
    ------
    KvtcError
        The subclass that names what is missing or does not fit.
    """
    families = [CODECS[name] for name in request.codecs or request.plan.codecs]
    profiles = list(dict.fromkeys(family.profile for family in families if family.profile))
    on_step(Step(f"{model}: fetch and convert", 0, 1))
    folder = resolve_model(model_spec(model))
    artifacts = artifacts_for(
        folder,
        profiles,
        request.dtype,
        request.plan.calibration,
        request.artifacts,
        lambda progress: on_step(Step(f"{model}: {progress.stage}", progress.done, progress.total)),
    )
    loaded = load_model(folder, request.dtype)
    for artifact in artifacts.values():
        artifact.check_model(loaded.geometry, loaded.rope, loaded.fingerprint.weights_hash)
    inputs = CodecInputs(loaded.geometry, artifacts, request.tier_block_tokens)
    codecs = [codec for family in families for codec in family.build(inputs)]
    return artifacts, _measure(loaded, model, codecs, request, on_step)


def _measure(
    loaded: LoadedModel,
    model: str,
    codecs: Sequence[DocumentCodec],
    request: RunRequest,
    on_step: Callable[[Step], None],
) -> Iterator[DocumentScore]:
    for task in request.plan.tasks_of(model, request.tasks):
        yield from measure_task(loaded, model, task, codecs, on_step)


def measure_task(
    loaded: LoadedModel,
    model: str,
    task: Task,
    codecs: Sequence[DocumentCodec],
    on_step: Callable[[Step], None],
) -> Iterator[DocumentScore]:
    """Yield the scores of all documents of a task with all codecs."""
    label = _label(model)
    documents = task.documents(loaded.tokenizer)
    done, total = 0, len(documents) * len(codecs)
    on_step(Step(f"{label}: {task.name}", done, total))
    for number, document in enumerate(documents):
        for score in measure_document(loaded, document, codecs, model=label, task=task.name, number=number):
            done += 1
            on_step(Step(f"{label}: {task.name}", done, total))
            yield score


def _label(model: str) -> str:
    """Return what reports call a model: its name, or the last part of its path."""
    return re.sub(r"[^\w.-]+", "-", Path(model).name)
