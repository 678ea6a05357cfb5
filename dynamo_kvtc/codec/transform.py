"""Rows of keys or values to coefficients and back, one layer at a time on the way back.

A layer group shares one basis, so its coefficients are computed once; each layer then costs one product
with the columns of the basis that belong to it. Components that the plan does not store never enter a
product.
"""

from __future__ import annotations

from functools import cached_property

import torch

from dynamo_kvtc.codec.parameters import RdSideParameters, SideParameters

__all__ = ["COMPUTE_DTYPES", "SideTransform", "bfloat16_hardware", "resolve_compute_dtype"]

#: Names of the dtypes that products may be computed in; "auto" chooses by what the CPU is good at.
COMPUTE_DTYPES = ("auto", "bfloat16", "float32")


def resolve_compute_dtype(name: str) -> torch.dtype:
    """Return the dtype for a name of `COMPUTE_DTYPES`.

    "auto" is bfloat16 where the CPU multiplies it in hardware (AMX or AVX512-BF16), float32 elsewhere.
    Products in bfloat16 are two to several times faster there and round centred numbers to 8 bits of
    mantissa, far below what quantisation costs.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if name not in COMPUTE_DTYPES:
        raise ValueError(f"unknown compute dtype {name!r}; choose one of {', '.join(COMPUTE_DTYPES)}")
    if name == "auto":
        return torch.bfloat16 if bfloat16_hardware() else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def bfloat16_hardware() -> str | None:
    """Return the name of the CPU's instructions that multiply matrices in bfloat16, None if it has none."""
    # Private names of torch; where they are missing, float32 is right, only slower.
    for name, probe in (("AMX", "_is_amx_tile_supported"), ("AVX512-BF16", "_is_avx512_bf16_supported")):
        if getattr(torch.cpu, probe, bool)():
            return name
    return None


class SideTransform:
    """The transform of one side (keys before RoPE, or values) of one layer group, trimmed to a plan.

    Parameters
    ----------
    side : SideParameters or RdSideParameters
        Mean, and weights of both directions.
    components : torch.Tensor
        int64 ``[stored]``: the component of each coefficient row.
    layer_size : int
        Elements of one layer in a row.
    dtype : torch.dtype
        dtype of the products' operands; results are of this dtype too.
    """

    def __init__(
        self,
        side: SideParameters | RdSideParameters,
        components: torch.Tensor,
        layer_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._side = side
        self._components = components
        self._layer_size = layer_size
        self._dtype = dtype
        self._layer_means = side.mean.view(-1, layer_size)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Centre and project rows.

        Parameters
        ----------
        rows : torch.Tensor
            float32 ``[tokens, row]``.

        Returns
        -------
        torch.Tensor
            ``[stored, tokens]`` in the compute dtype.
        """
        return self.project(self.centre(rows))

    def centre(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows without the mean, float32 ``[tokens, row]``: it can be many times larger than what is
        left, so it goes before precision does.
        """
        return rows - self._side.mean

    def project(self, centred: torch.Tensor) -> torch.Tensor:
        """Return the coefficients of what `centre` returned: ``[stored, tokens]`` in the compute dtype."""
        return self._forward_weights @ centred.to(self._dtype).t()

    def inverse(self, coefficients: torch.Tensor, layer: int) -> torch.Tensor:
        """Reconstruct one layer.

        Parameters
        ----------
        coefficients : torch.Tensor
            ``[tokens, stored]`` in the compute dtype.
        layer : int
            Index of the layer within its group.

        Returns
        -------
        torch.Tensor
            float32 ``[tokens, layer_size]``.
        """
        return (coefficients @ self._inverse_weights[layer]).float().add_(self._layer_means[layer])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the coefficients that `inverse` takes."""
        return self._dtype

    def warm_up(self) -> None:
        """Make the weights of both directions now."""
        _ = self._forward_weights, self._inverse_weights

    # Encoders and decoders each need one of the two copies, so each is made when it is first used.

    @cached_property
    def _forward_weights(self) -> torch.Tensor:
        """``[stored, row]``, one row per component."""
        return self._side.analysis(self._components).to(self._dtype)

    @cached_property
    def _inverse_weights(self) -> torch.Tensor:
        """``[layers, stored, layer_size]``: what one layer needs lies together."""
        weights = self._side.synthesis(self._components).to(self._dtype)
        stored = weights.shape[0]
        return weights.view(stored, len(self._layer_means), self._layer_size).transpose(0, 1).contiguous()
