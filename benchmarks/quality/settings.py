"""What one run measures: a full one, or a quick one for continuous integration."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.quality.artifacts import CalibrationPlan
from benchmarks.quality.codecs import CODECS
from benchmarks.quality.tasks import TASKS, NeedleTask, Task, TextTask

__all__ = ["FULL", "QUICK", "RunPlan"]


@dataclass(frozen=True)
class RunPlan:
    """The defaults of a run.

    Attributes
    ----------
    tasks : dict[str, Task]
        The tasks, with their sizes, by name.
    by_model : dict[str, tuple[str, ...]]
        The tasks of each model, where none are asked for: those that it solves. Other models get all.
    codecs : tuple[str, ...]
        Names of codecs.
    calibration : CalibrationPlan
        How missing artifacts are calibrated.
    """

    tasks: dict[str, Task]
    by_model: dict[str, tuple[str, ...]]
    codecs: tuple[str, ...] = tuple(CODECS)
    calibration: CalibrationPlan = field(default_factory=CalibrationPlan)

    def tasks_of(self, model: str) -> tuple[str, ...]:
        """Return the names of a model's tasks."""
        return self.by_model.get(model, tuple(self.tasks))


#: Everything. SmolLM2-135M is at chance in retrieval and tracking, which then measure nothing.
FULL = RunPlan(
    tasks=TASKS,
    by_model={"smollm2": ("text", "needle", "choice"), "qwen-coder": tuple(TASKS)},
)

#: Whether everything still works, in about a minute.
QUICK = RunPlan(
    tasks={
        "text": TextTask(
            per_domain=1, context_tokens=512, scored_tokens=64, domains=("technical", "dialogue")
        ),
        "needle": NeedleTask(lengths=(512,), per_length=2),
    },
    by_model={},
    codecs=("none", "int4", "rotation", "kvtc"),
    calibration=CalibrationPlan(
        tokens=10_240, document_tokens=1024, ratios=(8.0, 16.0, 32.0), layers_per_group=10
    ),
)
