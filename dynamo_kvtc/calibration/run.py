"""The whole calibration, stage by stage; it can be interrupted and continued, and repeats exactly."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from dynamo_kvtc.calibration.artifact import MANIFEST_NAME, Artifact, load_artifact
from dynamo_kvtc.calibration.artifact_writer import FittedSide, write_artifact
from dynamo_kvtc.calibration.capture import SINK_TOKENS, capture_rows, select_rows
from dynamo_kvtc.calibration.fingerprint import ModelFingerprint
from dynamo_kvtc.calibration.manifest import CalibrationRecord
from dynamo_kvtc.calibration.models import LoadedModel, load_model, resolve_model
from dynamo_kvtc.calibration.report import write_report
from dynamo_kvtc.calibration.settings import CalibrationSettings, InputDigests, digest_inputs, split_layers
from dynamo_kvtc.calibration.sides import fit_side, load_side, save_side
from dynamo_kvtc.calibration.statistics import SIDES, KvStatistics
from dynamo_kvtc.calibration.text import Documents
from dynamo_kvtc.codec.geometry import CACHE_DTYPES, LayerRange
from dynamo_kvtc.errors import ArtifactError, CalibrationError, CalibrationStoppedError

__all__ = ["Progress", "calibrate"]

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


def calibrate(
    settings: CalibrationSettings,
    progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Artifact:
    """Calibrate a model and write the artifact and its report to ``settings.out``.

    A ready artifact of the same inputs is returned as it is. An unfinished calibration of the same inputs
    is continued, with the same result as without the interruption.

    Parameters
    ----------
    settings : CalibrationSettings
        What to do.
    progress : Callable[[Progress], None]
        Called after each piece of work.
    should_stop : Callable[[], bool]
        Asked between pieces of work, every few seconds; when it says yes, the state is saved.

    Raises
    ------
    CalibrationStoppedError
        If `should_stop` said yes.
    CalibrationError
        If the model or the text is unfit, or the statistics would not fit into memory.
    MissingDependencyError, RopeError
        As `dynamo_kvtc.calibration.models.load_model`.
    """
    with _torch_threads(settings.threads):
        folder = resolve_model(settings.model)
        digests = digest_inputs(settings, folder)
        ready = _ready_artifact(settings.out, digests)
        if ready is not None:
            return ready
        return _Calibration(
            settings, load_model(folder, settings.dtype), digests, progress, should_stop
        ).run()


def _ready_artifact(out: Path, digests: InputDigests) -> Artifact | None:
    if not (out / MANIFEST_NAME).is_file():
        return None
    try:
        artifact = load_artifact(out)
    except ArtifactError:
        return None  # it will be replaced
    return artifact if artifact.manifest.calibration.input_digest == digests.everything else None


@dataclass(frozen=True, eq=False)
class _Calibration:
    """One run over one model."""

    settings: CalibrationSettings
    loaded: LoadedModel
    digests: InputDigests
    progress: Callable[[Progress], None]
    should_stop: Callable[[], bool]

    def run(self) -> Artifact:
        settings, geometry = self.settings, self.loaded.geometry
        groups = split_layers(geometry.num_layers, settings.layers_per_group)
        rows = [layers.count * geometry.layer_size for layers in groups]
        _check_memory(rows)
        documents = Documents(
            settings.texts,
            self.loaded.tokenizer,
            tokens=settings.tokens,
            document_tokens=settings.document_tokens,
            seed=settings.seed,
        )
        parameters = sum(parameter.numel() for parameter in self.loaded.model.parameters())
        work = _Work(settings, len(documents), parameters, rows)
        state = self._open_state()
        statistics = self._capture(documents, groups, state / "statistics.safetensors", work)
        sides = self._fit(statistics, state, work)
        artifact = self._write(statistics, sides)
        shutil.rmtree(state, ignore_errors=True)
        return artifact

    def _open_state(self) -> Path:
        """Return the state's folder, emptied if it belongs to other inputs."""
        state = self.settings.out / STATE_FOLDER
        stamp = state / "inputs"
        if not (stamp.is_file() and stamp.read_text() == self.digests.everything):
            shutil.rmtree(state, ignore_errors=True)
            state.mkdir(parents=True)
            stamp.write_text(self.digests.everything)
        return state

    def _capture(
        self, documents: Documents, groups: tuple[LayerRange, ...], saved: Path, work: _Work
    ) -> KvStatistics:
        statistics = KvStatistics(
            self.loaded.geometry,
            groups,
            rows_per_document=-(-self.settings.sample_tokens // len(documents)),
            sample_every=max(1, len(documents) // self.settings.sample_tokens),
        )
        if saved.is_file():
            statistics.load(saved)
        last_saved = time.monotonic()
        for index in range(statistics.documents, len(documents)):
            self.progress(Progress("capture keys and values", work.captured(index), work.total))
            statistics.update(*self._capture_document(documents[index]))
            stop = self.should_stop()
            if stop or time.monotonic() - last_saved > _CHECKPOINT_SECONDS:
                statistics.save(saved)
                last_saved = time.monotonic()
            self._stop_if(stop)
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

    def _fit(self, statistics: KvStatistics, state: Path, work: _Work) -> list[tuple[FittedSide, FittedSide]]:
        fitted: dict[tuple[int, str], FittedSide] = {}
        pending = [(group, side) for group in range(len(statistics.groups)) for side in SIDES]
        for number, (group, side) in enumerate(pending):
            path = state / f"side-{group}-{side}.safetensors"
            layers = statistics.groups[group]
            stage = f"fit {side} of layers {layers.first} to {layers.stop - 1}"
            self.progress(Progress(stage, work.fitted(number), work.total))
            if path.is_file():
                fitted[group, side] = load_side(path)
                continue
            if number == 0:
                statistics.save(state / "statistics.safetensors")
            fitted[group, side] = fit_side(
                statistics.moments(group, side),
                statistics.sample(group, side),
                self.settings.plan_ratios,
                layers=layers.count,
                method=self.settings.method,
                seed=self.settings.seed,
                basis_dtype=CACHE_DTYPES[self.settings.basis_dtype],
            )
            save_side(path, fitted[group, side])
            self._stop_if(self.should_stop())
        self.progress(Progress("write the artifact", work.total, work.total))
        return [(fitted[group, "keys"], fitted[group, "values"]) for group in range(len(statistics.groups))]

    def _write(self, statistics: KvStatistics, sides: list[tuple[FittedSide, FittedSide]]) -> Artifact:
        settings = self.settings
        fingerprint: ModelFingerprint = self.loaded.fingerprint
        artifact = write_artifact(
            settings.out,
            fingerprint=fingerprint,
            layer_groups=statistics.groups,
            sides=sides,
            ratios=settings.plan_ratios,
            calibration=CalibrationRecord(
                text_digest=self.digests.text,
                input_digest=self.digests.everything,
                documents=statistics.documents,
                document_tokens=settings.document_tokens,
                rows=statistics.rows,
                sample_rows=statistics.sample(0, SIDES[0]).shape[0],
                sink_tokens=SINK_TOKENS,
                recent_window=settings.recent_window,
                method=settings.method.resolve(sides[0][0].mean.numel()).value,  # type: ignore[arg-type]
                seed=settings.seed,
            ),
        )
        write_report(artifact)
        return artifact

    def _stop_if(self, stop: bool) -> None:
        if stop:
            raise CalibrationStoppedError(
                f"calibration was stopped; its state is kept in {self.settings.out / STATE_FOLDER}: run the "
                "same command again to continue, or remove the folder"
            )


class _Work:
    """Estimates of the work of each stage, so that the time left can be told.

    The factors are measured times relative to a product of matrices with as many operations.
    """

    def __init__(
        self, settings: CalibrationSettings, documents: int, parameters: int, rows: list[int]
    ) -> None:
        covariance = sum(2 * len(SIDES) * row**2 for row in rows)
        self._per_document = float(settings.document_tokens * (2 * parameters + covariance))
        self._capture = documents * self._per_document
        self._sides = [20.0 * row**3 + 4e5 * row * settings.sample_tokens for row in rows for _ in SIDES]
        self.total = self._capture + sum(self._sides)

    def captured(self, documents: int) -> float:
        """Work after so many documents."""
        return documents * self._per_document

    def fitted(self, sides: int) -> float:
        """Work after all documents and so many sides."""
        return self._capture + sum(self._sides[:sides])


def _check_memory(rows: list[int]) -> None:
    """Refuse statistics that this machine cannot hold, before it begins to swap."""
    # Scatter matrices in float64, and while one of them is fitted four float32 matrices of its size.
    needed = sum(len(SIDES) * 8 * row**2 for row in rows) + 16 * max(rows) ** 2
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise CalibrationError(
            f"covariances of rows of {max(rows)} elements need {needed / 2**30:.0f} GiB, this machine has "
            f"{available / 2**30:.0f} GiB; put fewer layers in a group (--layers-per-group) or use a "
            "larger machine"
        )


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
