"""What calibrations of both profiles share: documents, state on disk, capture of keys and values."""

from __future__ import annotations

import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.capture import SINK_TOKENS, capture_rows, select_rows
from dynamo_kvtc.calibration.manifest import CalibrationRecord
from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.calibration.recall import RecallDocuments
from dynamo_kvtc.calibration.settings import CalibrationSettings, InputDigests
from dynamo_kvtc.calibration.statistics import SIDES, KvStatistics, Prepare
from dynamo_kvtc.calibration.text import Documents
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.errors import CalibrationError, CalibrationStoppedError

__all__ = ["MINIMUM_ROWS", "STATE_FOLDER", "Calibration", "Progress", "check_memory"]

#: Folder inside the output folder that holds an unfinished calibration.
STATE_FOLDER = ".calibration"

#: Fewest rows that a covariance is worth anything with.
MINIMUM_ROWS = 256

#: Seconds of captured documents that an abrupt end may cost.
_CHECKPOINT_SECONDS = 60.0


class Progress(NamedTuple):
    """How far a calibration is.

    Attributes
    ----------
    stage : str
        What is being done, for people.
    done, total : float
        Work, in a unit of its own, over all stages.
    """

    stage: str
    done: float
    total: float


@dataclass(frozen=True, eq=False)
class Calibration(ABC):
    """One run over one model; a subclass per profile strings the stages together."""

    settings: CalibrationSettings
    loaded: LoadedModel
    digests: InputDigests
    progress: Callable[[Progress], None]
    should_stop: Callable[[], bool]

    @abstractmethod
    def run(self) -> Artifact:
        """Calibrate and write the artifact and its report."""

    def documents(self) -> Documents:
        """Return the documents to calibrate on; those for validation come last, and are never generated."""
        settings, tokenizer = self.settings, self.loaded.tokenizer
        recall = RecallDocuments(
            tokenizer,
            document_tokens=settings.document_tokens,
            reference_tokens=settings.recent_window + settings.scored_tokens,
            seed=settings.seed,
        )
        return Documents(
            settings.texts,
            tokenizer,
            tokens=settings.tokens,
            document_tokens=settings.document_tokens,
            seed=settings.seed,
            recall=recall,
            recall_at=settings.recall_documents(),
        )

    @property
    def parameters(self) -> int:
        """Parameters of the model, for estimates of work."""
        return sum(parameter.numel() for parameter in self.loaded.model.parameters())

    def open_state(self) -> Path:
        """Return the state's folder, emptied if it belongs to other inputs."""
        state = self.settings.out / STATE_FOLDER
        stamp = state / "inputs"
        if not (stamp.is_file() and stamp.read_text() == self.digests.everything):
            shutil.rmtree(state, ignore_errors=True)
            state.mkdir(parents=True)
            stamp.write_text(self.digests.everything)
        return state

    def capture(
        self,
        documents: Documents,
        count: int,
        groups: Sequence[LayerRange],
        saved: Path,
        captured: Callable[[int], Progress],
        prepare: Prepare | None = None,
    ) -> KvStatistics:
        """Take the statistics of the first `count` documents.

        Parameters
        ----------
        saved : Path
            Where the state is kept, and continued from if it is there.
        captured : Callable[[int], Progress]
            What to report after so many documents.
        prepare : Prepare, optional
            As for `KvStatistics`.

        Raises
        ------
        CalibrationError
            If too few rows are left.
        CalibrationStoppedError
            If the caller wants to stop.
        """
        statistics = KvStatistics(
            self.loaded.geometry,
            groups,
            rows_per_document=-(-self.settings.sample_tokens // count),
            sample_every=max(1, count // self.settings.sample_tokens),
            prepare=prepare,
        )
        if saved.is_file():
            statistics.load(saved)
        last_saved = time.monotonic()
        for index in range(statistics.documents, count):
            self.progress(captured(index))
            statistics.update(*self._capture_document(documents[index]))
            stop = self.should_stop()
            if stop or time.monotonic() - last_saved > _CHECKPOINT_SECONDS:
                statistics.save(saved)
                last_saved = time.monotonic()
            self.stop_if(stop)
        if statistics.rows < MINIMUM_ROWS:
            raise CalibrationError(
                f"the text gives {statistics.rows} usable tokens, calibration needs at least {MINIMUM_ROWS}; "
                "give more text, more --tokens or longer documents"
            )
        return statistics

    def _capture_document(self, token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of a document that take part in the fit."""
        window = self.settings.recent_window
        if len(token_ids) <= SINK_TOKENS + window:
            nothing = torch.empty(0, self.loaded.geometry.row_size)
            return nothing, nothing
        keys, values = capture_rows(self.loaded, token_ids)
        return select_rows(keys, window), select_rows(values, window)

    def record(self, statistics: KvStatistics, **of_profile: Any) -> CalibrationRecord:
        """Return what the artifact says of its calibration.

        Parameters
        ----------
        **of_profile
            Fields of `CalibrationRecord` that one profile alone has.
        """
        settings = self.settings
        row_size = statistics.groups[0].count * self.loaded.geometry.layer_size
        return CalibrationRecord(
            text_digest=self.digests.text,
            input_digest=self.digests.everything,
            documents=statistics.documents,
            document_tokens=settings.document_tokens,
            rows=statistics.rows,
            sample_rows=statistics.sample(0, SIDES[0]).shape[0],
            sink_tokens=SINK_TOKENS,
            recent_window=settings.recent_window,
            method=settings.method.resolve(row_size).value,  # type: ignore[arg-type]
            seed=settings.seed,
            recall_share=settings.recall_share or None,
            **of_profile,
        )

    def stop_if(self, stop: bool) -> None:
        """Stop here if asked to.

        Raises
        ------
        CalibrationStoppedError
            If `stop` is true.
        """
        if stop:
            raise CalibrationStoppedError(
                f"calibration was stopped; its state is kept in {self.settings.out / STATE_FOLDER}: run the "
                "same command again to continue, or remove the folder"
            )


def check_memory(rows: Sequence[int]) -> None:
    """Refuse statistics that this machine cannot hold, before it begins to swap.

    Raises
    ------
    CalibrationError
        If the covariances of rows of these sizes do not fit into memory.
    """
    # Scatter matrices in float64, and while one of them is fitted four float32 matrices of its size.
    needed = sum(len(SIDES) * 8 * row**2 for row in rows) + 16 * max(rows) ** 2
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise CalibrationError(
            f"covariances of rows of {max(rows)} elements need {needed / 2**30:.0f} GiB, this machine has "
            f"{available / 2**30:.0f} GiB; put fewer layers in a group (--layers-per-group) or use a "
            "larger machine"
        )
