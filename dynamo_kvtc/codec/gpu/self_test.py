"""A trial at start: what the device encodes and decodes is compared with the CPU's codec before it serves.

Kernels are compiled on the machine they run on, by the compiler that is installed there; that one computes
something else must not be found out by an engine. The trial also compiles most kernels, which the first
offload and onboard would wait for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.gpu.gpu_codec import GpuCodec
from dynamo_kvtc.codec.parameters import AnyParameters
from dynamo_kvtc.errors import EncodeRangeError, GpuUnavailableError

__all__ = ["made_up_blocks", "self_test"]

_TOKENS, _SINKS = 24, 4

#: Largest root-mean-square difference, of that of the centred values: products in bfloat16 against the CPU's
#: differ by .5 % (tests), one wrong symbol in a hundred by more than this.
_TOLERANCE = 0.03


def made_up_blocks(parameters: AnyParameters) -> Iterator[TierBlock]:
    """Yield tier blocks around the mean, ever closer to it; the last is the mean, which can be encoded."""
    geometry, rope = parameters.geometry, parameters.rope
    generator = torch.Generator().manual_seed(0)
    shape = (_TOKENS, geometry.num_layers, geometry.num_kv_heads, geometry.head_size)
    noise = torch.randn((2, *shape), generator=generator)
    means = [
        torch.cat([side.mean.view(-1, *shape[2:]) for side in sides])
        for sides in zip(*((group.keys, group.values) for group in parameters.groups), strict=True)
    ]
    for scale in (1.0, 0.3, 0.1, 0.03, 0.0):
        keys, values = (
            mean + noise[index] * scale * mean.square().mean().sqrt() for index, mean in enumerate(means)
        )
        keys = rope.rotate(keys, *rope.cos_sin(torch.arange(_TOKENS)))
        yield TierBlock(keys.to(geometry.torch_dtype), values.to(geometry.torch_dtype), 0, _SINKS)


def self_test(codec: GpuCodec) -> None:
    """Encode and decode made-up KV on the device and on the CPU, each what the other has written.

    Raises
    ------
    GpuUnavailableError
        If they disagree, or kernels do not run at all.
    """
    try:
        difference = _worst_difference(codec)
    except GpuUnavailableError:
        raise
    except Exception as error:
        # Whatever a compiler or a driver may raise: this device does not serve.
        raise GpuUnavailableError(f"the trial of {codec.device} failed: {error!r}") from error
    if not difference <= _TOLERANCE:
        raise GpuUnavailableError(
            f"{codec.device} decodes otherwise than the CPU: they differ by {difference:.2g} of the values, "
            f"{_TOLERANCE} are allowed; report this with the output of dynamo-kvtc doctor"
        )


def _worst_difference(codec: GpuCodec) -> float:
    """Return how far apart the two decode; raises what either finds wrong with the other's stream."""
    host = codec.host
    for block in made_up_blocks(codec.parameters):
        try:
            streams = host.encode([block])
        except EncodeRangeError:
            continue
        streams += codec.encode([block])
        pairs = [(host.decode(stream), codec.decode(stream)) for stream in streams]
        # Not Python's max, which may lose a NaN.
        return float(torch.tensor([_difference(codec.parameters, *pair) for pair in pairs]).max())
    raise EncodeRangeError("the artifact's own mean cannot be encoded")


def _difference(parameters: AnyParameters, expected: TierBlock, found: TierBlock) -> float:
    """Return the largest relative difference of a layer's keys or values, sinks apart; NaN stays NaN."""
    worst = torch.zeros(())
    for name in ("keys", "values"):
        a, b = getattr(expected, name).float(), getattr(found, name).float()
        if not torch.equal(a[:_SINKS], b[:_SINKS]):
            return float("inf")
        layers = (0, 2, 3)
        spread = (a - a.mean(0)).square().mean(layers).sqrt()
        rounding = 2.0**-8 * a.abs().amax(layers)
        missed = (a - b).square().mean(layers).sqrt()
        worst = torch.maximum(worst, (missed / (spread + rounding).clamp_min(1e-30)).max())
    return float(worst)
