"""The tasks, one file each."""

from __future__ import annotations

from benchmarks.quality.tasks.base import Document, Probe, Task
from benchmarks.quality.tasks.choice import ChoiceTask
from benchmarks.quality.tasks.needle import NeedleTask
from benchmarks.quality.tasks.retrieval import RetrievalTask
from benchmarks.quality.tasks.text import TextTask
from benchmarks.quality.tasks.tracking import TrackingTask

__all__ = ["TASKS", "ChoiceTask", "Document", "NeedleTask", "Probe", "Task", "TextTask"]

#: All tasks by name, with the sizes of a full run.
TASKS: dict[str, Task] = {
    task.name: task for task in (TextTask(), RetrievalTask(), NeedleTask(), TrackingTask(), ChoiceTask())
}
