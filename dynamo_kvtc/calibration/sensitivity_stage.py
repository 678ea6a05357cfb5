"""The first stage of the rd profile's calibration: what some documents tell of the model's sensitivity.

Each document's share is kept on disk, so that an interrupted calibration continues, and memory holds a
bounded sample whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dynamo_kvtc.calibration.capture import SINK_TOKENS
from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.calibration.sensitivity import (
    SideSample,
    SideSensitivity,
    apply_blocks,
    fit_sensitivity,
    root_and_inverse,
)
from dynamo_kvtc.calibration.sensitivity_capture import capture_sensitivity
from dynamo_kvtc.calibration.sensitivity_forward import (
    ForwardSensitivity,
    ForwardSensitivitySums,
    forward_only_sensitivity,
)
from dynamo_kvtc.calibration.settings import CalibrationSettings
from dynamo_kvtc.calibration.statistics import SIDES
from dynamo_kvtc.calibration.text import Documents
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.errors import CalibrationError

__all__ = ["Sensitivities", "SensitivityStage"]

#: Rows that each document gives to the sample at most, and bytes that the sample may take in all.
_ROWS_PER_DOCUMENT = 400
_SAMPLE_BYTES = 1 << 30

#: Fewest coded tokens that make a document worth a backward pass.
_MINIMUM_CODED = 32


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """Sensitivity of every side of every layer group."""

    by_place: Mapping[tuple[int, str], SideSensitivity]

    def __getitem__(self, place: tuple[int, str]) -> SideSensitivity:
        """Return the sensitivity of a layer group's side."""
        return self.by_place[place]

    def prepare(self, group: int, side: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take rows ``[tokens, row]`` into the metric; return them and their weights, the squared scales."""
        sensitivity = self.by_place[group, side]
        in_metric = apply_blocks(rows - sensitivity.mean, sensitivity.metric)
        return in_metric, sensitivity.scales(rows).square()


class SensitivityStage:
    """Captures the sensitivity of documents, spread evenly over those that are fitted.

    Parameters
    ----------
    documents : Documents
        All documents.
    fitted : int
        How many of them, from the first, may be used.
    groups : Sequence[LayerRange]
        Layer groups.
    state : Path
        Folder for what was captured.

    Raises
    ------
    CalibrationError
        If no document is long enough.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        settings: CalibrationSettings,
        documents: Documents,
        fitted: int,
        groups: Sequence[LayerRange],
        state: Path,
    ) -> None:
        self._loaded = loaded
        self._settings = settings
        self._documents = documents
        self._groups = groups
        self._state = state
        needed = SINK_TOKENS + _MINIMUM_CODED + settings.recent_window + settings.scored_tokens
        usable = [index for index in range(fitted) if len(documents[index]) >= needed]
        if not usable:
            raise CalibrationError(
                f"no document has the {needed} tokens that sinks, window and {settings.scored_tokens} scored "
                "tokens need; give longer documents (--document-tokens)"
            )
        count = min(settings.sensitivity_documents, len(usable))
        recall = [index for index in usable if documents.is_recall(index)]
        text = [index for index in usable if not documents.is_recall(index)]
        # Each kind by its share: an even choice from all might pass over most of the generated ones.
        of_recall = round(count * len(recall) / len(usable))
        self._chosen = sorted(_evenly(text, count - of_recall) + _evenly(recall, of_recall))
        rows = _SAMPLE_BYTES // (count * loaded.geometry.row_size * _ROW_BYTES)
        self._rows = max(1, min(_ROWS_PER_DOCUMENT, rows))

    def __len__(self) -> int:
        """Return the number of documents that are captured."""
        return len(self._chosen)

    def capture(self) -> Iterator[int]:
        """Capture what is not on disk yet; yields the number of documents done."""
        for number in range(len(self._chosen)):
            path = self._path(number)
            if not path.is_file():
                tensors = self._gradients(number) if self._by_gradients else self._forward(number)
                scratch = path.with_suffix(".partial")
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch)
                scratch.replace(path)
            yield number + 1

    def fit(self) -> Sensitivities:
        """Fit metrics and importance from what was captured.

        Raises
        ------
        CalibrationError
            If the saved state is damaged, or the model's loss is not sensitive to it.
        """
        try:
            captured = [load_file(self._path(number)) for number in range(len(self._chosen))]
        except (SafetensorError, OSError) as error:
            raise CalibrationError(
                f"the saved state in {self._state} is damaged ({error}); remove it and calibrate again"
            ) from error
        fit = self._fit_gradients if self._by_gradients else self._fit_forward
        return Sensitivities(fit(captured))

    @property
    def _by_gradients(self) -> bool:
        return self._settings.sensitivity == "gradients"

    def _path(self, number: int) -> Path:
        return self._state / f"sensitivity-{number}.safetensors"

    def _gradients(self, number: int) -> dict[str, torch.Tensor]:
        """Return some rows of a document, their gradients and their distances from the scored tokens."""
        settings, token_ids = self._settings, self._documents[self._chosen[number]]
        captured = capture_sensitivity(
            self._loaded,
            token_ids,
            scored_tokens=settings.scored_tokens,
            recent_window=settings.recent_window,
            seed=settings.seed + number,
        )
        tokens = captured.keys.shape[0]
        taken = min(self._rows, tokens)
        chosen = torch.arange(taken) * tokens // taken
        return {
            "keys": captured.keys[chosen],
            "values": captured.values[chosen],
            "keys.gradients": captured.key_gradients[chosen].bfloat16(),
            "values.gradients": captured.value_gradients[chosen].bfloat16(),
            "distances": (tokens + settings.recent_window - chosen).float(),
        }

    def _fit_gradients(
        self, captured: Sequence[Mapping[str, torch.Tensor]]
    ) -> dict[tuple[int, str], SideSensitivity]:
        sizes = torch.tensor([document["distances"].numel() for document in captured])
        origin = torch.repeat_interleave(torch.arange(len(captured)), sizes)
        distances = torch.cat([document["distances"] for document in captured])
        fitted = {}
        for group, layers in enumerate(self._groups):
            size = self._loaded.geometry.layer_size
            columns = slice(layers.first * size, layers.stop * size)
            for side in SIDES:
                sample = SideSample(
                    torch.cat([document[side][:, columns] for document in captured]),
                    torch.cat([document[f"{side}.gradients"][:, columns] for document in captured]),
                    origin,
                    distances,
                )
                fitted[group, side] = fit_sensitivity(sample, self._loaded.geometry.head_size)
        return fitted

    def _forward(self, number: int) -> dict[str, torch.Tensor]:
        document = forward_only_sensitivity(
            self._loaded,
            self._documents[self._chosen[number]],
            scored_tokens=self._settings.scored_tokens,
            recent_window=self._settings.recent_window,
        )
        return {
            "keys": document.key_blocks,
            "values": document.value_blocks,
            "tokens": torch.tensor([document.coded_tokens]),
        }

    def _fit_forward(
        self, captured: Sequence[Mapping[str, torch.Tensor]]
    ) -> dict[tuple[int, str], SideSensitivity]:
        geometry = self._loaded.geometry
        sums = ForwardSensitivitySums(geometry)
        for document in captured:
            sums.add(ForwardSensitivity(document["keys"], document["values"], int(document["tokens"])))
        blocks = {"keys": sums.key_blocks, "values": sums.value_blocks}
        fitted = {}
        for group, layers in enumerate(self._groups):
            row = torch.zeros(layers.count * geometry.layer_size)
            for side in SIDES:
                part = blocks[side][layers.first : layers.stop].flatten(0, 1).double()
                metric, inverse = root_and_inverse(part)
                # Without gradients nothing tells tokens apart: all have the same importance.
                fitted[group, side] = SideSensitivity(metric, inverse, row, row, 0.0, 0.0)
        return fitted


def _evenly(indices: Sequence[int], count: int) -> list[int]:
    return [indices[number * len(indices) // count] for number in range(count)]


#: Bytes of a sampled row: keys and values in float32, their gradients in bfloat16.
_ROW_BYTES = 2 * (4 + 2)
