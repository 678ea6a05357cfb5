"""Streaming mean and covariance of keys and values, and a bounded sample of rows.

Memory depends on the size of a row and of the sample, not on the number of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.errors import CalibrationError

__all__ = ["SIDES", "KvStatistics", "Moments"]

#: Takes the layer group, the side and rows ``[tokens, row]``; returns rows and their weights, or None.
Prepare = Callable[[int, str, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]

#: The two sides of a cache, in the order in which they are stored everywhere.
SIDES = ("keys", "values")


class Moments:
    """Count, mean and scatter matrix of rows, updated batch by batch.

    Batches are reduced in float32 around their own mean and joined in float64 (Chan, Golub and LeVeque,
    1979), which does not cancel when the mean is far larger than the spread, as keys' means are.

    Attributes
    ----------
    count : int
        Rows seen.
    weight : float
        Sum of their weights; rows without one count 1.
    mean : torch.Tensor
        float64 ``[row]``, weighted.
    scatter : torch.Tensor
        float64 ``[row, row]``: weighted sum over rows of the outer product of ``row - mean`` with itself.
    """

    def __init__(self, row: int) -> None:
        self.count = 0
        self.weight = 0.0
        self.mean = torch.zeros(row, dtype=torch.float64)
        self.scatter = torch.zeros(row, row, dtype=torch.float64)

    def update(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Take in rows, float32 ``[tokens, row]``, of equal or of given positive weights ``[tokens]``."""
        if rows.shape[0] == 0:
            return
        if weights is None:
            weight, mean = float(rows.shape[0]), rows.mean(dim=0, dtype=torch.float64)
        else:
            weight = float(weights.sum(dtype=torch.float64))
            mean = (weights @ rows).double() / weight
        # Rounding the mean to float32 displaces it by far less than the rows' own rounding.
        centred = rows - mean.float()
        weighted = centred if weights is None else centred * weights[:, None]
        self._join(rows.shape[0], weight, mean, weighted.T @ centred)

    def merge(self, other: Moments) -> None:
        """Take in everything that `other` has seen."""
        if other.count:
            self._join(other.count, other.weight, other.mean, other.scatter)

    def covariance(self) -> torch.Tensor:
        """Return the scatter per row, float32 ``[row, row]``: without weights, the covariance."""
        return (self.scatter / max(1, self.count)).float()

    def _join(self, count: int, weight: float, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        total = self.weight + weight
        delta = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(delta, delta, alpha=self.weight * weight / total)
        self.mean += delta * (weight / total)
        self.weight = total
        self.count += count


class KvStatistics:
    """Moments of every layer group and side, and rows sampled evenly over the documents.

    Parameters
    ----------
    geometry : KvGeometry
        Shape of the cache.
    groups : Sequence[LayerRange]
        Layer groups.
    rows_per_document : int
        How many rows a sampled document gives to the sample.
    sample_every : int
        Distance between sampled documents, so that very many of them do not make the sample grow.
    prepare : Prepare, optional
        What is done to rows before they enter the moments; the sample keeps them as they are.

    Attributes
    ----------
    documents : int
        Documents seen.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        groups: Sequence[LayerRange],
        *,
        rows_per_document: int,
        sample_every: int = 1,
        prepare: Prepare | None = None,
    ) -> None:
        self.geometry = geometry
        self._prepare = prepare
        self.groups = tuple(groups)
        self.rows_per_document = rows_per_document
        self.sample_every = sample_every
        self.documents = 0
        self._moments = {
            (group, side): Moments(layers.count * geometry.layer_size)
            for group, layers in enumerate(self.groups)
            for side in SIDES
        }
        self._samples: dict[str, list[torch.Tensor]] = {side: [] for side in SIDES}

    @property
    def rows(self) -> int:
        """Rows seen."""
        return self._moments[0, SIDES[0]].count

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take in one document.

        Parameters
        ----------
        keys, values : torch.Tensor
            float32 ``[tokens, row_size]``, the rows that take part in the fit.
        """
        for side, rows in zip(SIDES, (keys, values), strict=True):
            for group, layers in enumerate(self.groups):
                part, weights = rows[:, self._columns(layers)], None
                if self._prepare is not None:
                    part, weights = self._prepare(group, side, part)
                self._moments[group, side].update(part, weights)
            if self.documents % self.sample_every == 0:
                taken = min(self.rows_per_document, rows.shape[0])
                chosen = torch.arange(taken) * rows.shape[0] // max(1, taken)
                self._samples[side].append(rows[chosen].clone())
        self.documents += 1

    def moments(self, group: int, side: str) -> Moments:
        """Return the moments of one side of one layer group."""
        return self._moments[group, side]

    def sample(self, group: int, side: str) -> torch.Tensor:
        """Return the sampled rows of one side of one layer group, float32 ``[sampled tokens, row]``."""
        columns = self._columns(self.groups[group])
        return torch.cat([rows[:, columns] for rows in self._samples[side]])

    def save(self, path: Path) -> None:
        """Write everything to a safetensors file, which replaces an earlier one only when it is whole."""
        tensors = {}
        for (group, side), moments in self._moments.items():
            tensors[f"{group}.{side}.mean"] = moments.mean
            tensors[f"{group}.{side}.scatter"] = moments.scatter
        for side, samples in self._samples.items():
            tensors[f"sample.{side}"] = torch.cat([torch.empty(0, self.geometry.row_size), *samples])
        scratch = path.with_suffix(".partial")
        weights = {f"{group}.{side}": moments.weight for (group, side), moments in self._moments.items()}
        counts = {"documents": self.documents, "rows": self.rows, "weights": weights}
        save_file(tensors, scratch, metadata={"counts": json.dumps(counts)})
        scratch.replace(path)

    def load(self, path: Path) -> None:
        """Continue from what `save` wrote, with the same geometry and layer groups.

        Raises
        ------
        CalibrationError
            If the file is damaged or of another geometry.
        """
        try:
            with safe_open(path, framework="pt") as file:
                counts = json.loads((file.metadata() or {})["counts"])
                for (group, side), moments in self._moments.items():
                    moments.mean.copy_(file.get_tensor(f"{group}.{side}.mean"))
                    moments.scatter.copy_(file.get_tensor(f"{group}.{side}.scatter"))
                    moments.count = counts["rows"]
                    moments.weight = counts["weights"][f"{group}.{side}"]
                for side in SIDES:
                    self._samples[side] = [file.get_tensor(f"sample.{side}")]
                self.documents = counts["documents"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CalibrationError(
                f"the saved state {path} is damaged ({error}); remove it and calibrate again"
            ) from error

    def _columns(self, layers: LayerRange) -> slice:
        size = self.geometry.layer_size
        return slice(layers.first * size, layers.stop * size)
