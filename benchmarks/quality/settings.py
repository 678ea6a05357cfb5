"""What one run measures: a full one, or a quick one for continuous integration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from benchmarks.quality.artifacts import CalibrationPlan
from benchmarks.quality.codecs import CODECS
from benchmarks.quality.tasks import TASKS, ChoiceTask, NeedleTask, Task, TextTask

__all__ = ["FULL", "QUICK", "RunPlan"]


@dataclass(frozen=True)
class RunPlan:
    """The defaults of a run.

    Attributes
    ----------
    tasks : dict[str, Task]
        The tasks, with their sizes, by name.
    by_model : dict[str, dict[str, Task]]
        For models by name, the tasks they solve, in the extent to which they do: these are run where none
        are asked for. Other models get all.
    codecs : tuple[str, ...]
        Names of codecs.
    calibration : CalibrationPlan
        How missing artifacts are calibrated.
    """

    tasks: dict[str, Task]
    by_model: dict[str, dict[str, Task]] = field(default_factory=dict)
    codecs: tuple[str, ...] = tuple(CODECS)
    calibration: CalibrationPlan = field(default_factory=CalibrationPlan)

    def tasks_of(self, model: str, names: Sequence[str] = ()) -> list[Task]:
        """Return a model's tasks: those with the given names, or by default those it solves."""
        own = self.by_model.get(model, self.tasks)
        return [own.get(name, self.tasks[name]) for name in names or own]

    def with_contexts(self, number: int) -> RunPlan:
        """Return the same plan with this many contexts of each length in the tasks that have lengths."""

        def sized(tasks: dict[str, Task]) -> dict[str, Task]:
            return {name: _with_contexts(task, number) for name, task in tasks.items()}

        by_model = {model: sized(tasks) for model, tasks in self.by_model.items()}
        return replace(self, tasks=sized(self.tasks), by_model=by_model)


def _with_contexts(task: Task, number: int) -> Task:
    sizes = [size.name for size in fields(task)]  # type: ignore[arg-type]
    return replace(task, per_length=number) if "per_length" in sizes else task  # type: ignore[type-var]


#: Everything. SmolLM2-135M is at chance in retrieval, tracking and copying, which then measure nothing.
FULL = RunPlan(
    tasks=TASKS,
    by_model={
        "smollm2": {
            "text": TASKS["text"],
            "needle": TASKS["needle"],
            "choice": ChoiceTask(kinds=("addition", "product", "category")),
        }
    },
)

#: Whether everything still works, in about a minute.
QUICK = RunPlan(
    tasks={
        "text": TextTask(
            per_domain=1, context_tokens=512, scored_tokens=64, domains=("technical", "dialogue")
        ),
        "needle": NeedleTask(lengths=(512,), per_length=2),
    },
    codecs=("none", "int4", "rotation", "kvtc", "rd"),
    calibration=CalibrationPlan(
        tokens=10_240,
        document_tokens=1024,
        ratios={"kvtc": (8.0, 16.0, 32.0), "rd": (20.0, 40.0, 80.0)},
        layers_per_group=10,
        sensitivity_documents=4,
        validation_documents=1,
    ),
)
