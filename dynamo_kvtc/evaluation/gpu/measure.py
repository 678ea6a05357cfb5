"""Measures the GPU codec on one device: encoding and decoding by stage, against floors, and onboarding."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from dynamo_kvtc.codec.entropy import RansCoder
from dynamo_kvtc.codec.gpu.coders import default_coder
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.gpu_codec import GpuCodec
from dynamo_kvtc.codec.gpu.stages import DECODE_STAGES, ENCODE_STAGES, StageClock
from dynamo_kvtc.codec.gpu.staging import decode_bytes_per_token, encode_bytes_per_token
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.paged_codec import PagedBlock
from dynamo_kvtc.errors import EvaluationError
from dynamo_kvtc.evaluation.environment import describe_environment
from dynamo_kvtc.evaluation.gpu.cache import make_cache, shuffled_blocks
from dynamo_kvtc.evaluation.gpu.made_up import PLAN_ID, RATIO, MadeUp, make_up, write_kv
from dynamo_kvtc.evaluation.gpu.onboard import measure_onboard
from dynamo_kvtc.evaluation.gpu.rates import Rates, measure_rates
from dynamo_kvtc.evaluation.gpu.report import GpuReport, ShapeReport, alternatives, direction
from dynamo_kvtc.evaluation.gpu.shapes import BenchShape
from dynamo_kvtc.evaluation.gpu.work import describe_memory, describe_sides, stage_work

__all__ = ["GpuBenchSettings", "bench_gpu"]

_SINKS = 4


@dataclass(frozen=True, slots=True)
class GpuBenchSettings:
    """What is measured.

    Attributes
    ----------
    profiles : tuple[str, ...]
        ``"rd"``, ``"kvtc"``.
    tokens : int
        Tokens of the sequence; encoded and decoded in one batch.
    tier_block_tokens, block_size : int
        Tokens of a stream, and of an engine's block.
    repetitions : int
        Runs of each measurement, on a GPU after one that is not counted; medians count.
    sm_share : float
        Share of the SMs that the codec may take. Floors are for all of them.
    layers_per_group : int or None
        Layers with one basis; by default what calibration takes.
    entropy : str
        What chunks are coded with, ``"deflate"`` or ``"rans"``.
    disk : Path or None
        Folder on the disk to onboard from; the system's temporary folder if None.
    """

    profiles: tuple[str, ...] = ("rd", "kvtc")
    tokens: int = 8192
    tier_block_tokens: int = 256
    block_size: int = 16
    repetitions: int = 5
    sm_share: float = 1.0
    layers_per_group: int | None = None
    disk: Path | None = None
    entropy: str = "deflate"

    def __post_init__(self) -> None:
        if self.tokens % self.tier_block_tokens or self.tier_block_tokens % self.block_size:
            raise EvaluationError(
                f"{self.tokens} tokens, {self.tier_block_tokens} a stream, {self.block_size} a block: each "
                "must divide the one before it; choose other numbers"
            )


async def bench_gpu(
    shapes: Sequence[BenchShape],
    settings: GpuBenchSettings | None = None,
    gpu: GpuDevice | None = None,
    *,
    note: Callable[[str], None] = lambda _: None,
) -> GpuReport:
    """Measure every shape under every profile.

    Parameters
    ----------
    gpu : GpuDevice, optional
        By default the present CUDA device; the interpreter's measures nothing worth knowing, for tests.
    note : Callable
        Called with a line that says what happens next.

    Raises
    ------
    GpuUnavailableError, MissingDependencyError
        If there is no GPU, or a library is missing.
    EvaluationError
        If the disk folder cannot be used.
    """
    settings = settings or GpuBenchSettings()
    gpu = gpu or GpuDevice.open(sm_share=settings.sm_share)
    note("rates of the device")
    rates = measure_rates(gpu)
    reports = []
    for shape in shapes:
        for profile in settings.profiles:
            note(f"{shape.name}, {profile}")
            reports.append(await _bench_shape(shape, profile, gpu, rates, settings))
    plain = {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
    }
    return GpuReport(rates, describe_environment(), plain, tuple(reports))


async def _bench_shape(
    shape: BenchShape, profile: str, gpu: GpuDevice, rates: Rates, settings: GpuBenchSettings
) -> ShapeReport:
    made = make_up(shape, profile, layers_per_group=settings.layers_per_group, device=gpu.device)
    parameters, tokens = made.parameters, settings.tokens
    host = open_codec(parameters, ratio=RATIO, coder=RansCoder() if settings.entropy == "rans" else None)
    clock = StageClock()
    timed = replace(gpu, clock=clock)
    coder, step = default_coder(timed, host.coder, host.mapper), settings.tier_block_tokens
    token_bytes = max(
        encode_bytes_per_token(parameters, PLAN_ID, block_tokens=step, coder_bytes=coder.encode_bytes),
        decode_bytes_per_token(parameters, PLAN_ID, block_tokens=step),
    )
    # One batch takes half of a codec's budget at most; streams with sinks take a little more a token.
    staging_bytes = 3 * token_bytes * tokens
    codec = GpuCodec(host, timed, coder=coder, staging_bytes=staging_bytes, block_tokens=step)
    codec.warm_up()
    bench = _CodecBench(made, codec, timed, clock, settings)
    encode_stages, encode_s = bench.encode()
    decode_stages, decode_s = bench.decode()
    coded = sum(map(len, bench.streams)) / tokens
    work = stage_work(shape, describe_sides(parameters, PLAN_ID), coded, tokens, slots=coder.needs_slots)
    # The pipeline's threads must not share a clock.
    plain = GpuCodec(host, gpu, staging_bytes=staging_bytes, block_tokens=step)
    plain.warm_up()
    onboards = await measure_onboard(plain, bench.cache, bench.ids, step, settings.repetitions, settings.disk)
    return ShapeReport(
        shape.name,
        profile,
        tokens,
        shape.raw_bytes * tokens,
        shape.raw_bytes / coded,
        *describe_memory(parameters, token_bytes),
        coder.name,
        bench.relative_error(),
        direction(ENCODE_STAGES, work, encode_stages, rates, shape, tokens, encode_s),
        direction(DECODE_STAGES, work, decode_stages, rates, shape, tokens, decode_s),
        onboards,
        alternatives(shape, tokens, rates),
    )


class _CodecBench:
    """One codec with a cache to encode out of and one to decode into; streams lie in pinned host memory."""

    def __init__(
        self, made: MadeUp, codec: GpuCodec, gpu: GpuDevice, clock: StageClock, settings: GpuBenchSettings
    ) -> None:
        self._codec, self._gpu, self._clock, self._repetitions = codec, gpu, clock, settings.repetitions
        geometry, step = codec.geometry, settings.tier_block_tokens
        num_blocks = settings.tokens // settings.block_size
        self.ids = shuffled_blocks(num_blocks)
        self.cache = make_cache(geometry, num_blocks, settings.block_size, gpu.device)
        self._target = make_cache(geometry, num_blocks, settings.block_size, gpu.device)
        write_kv(made, self.cache.keys, self.cache.values, self.ids)
        each = step // settings.block_size
        self._blocks = [
            PagedBlock(
                self.ids[index * each : (index + 1) * each], step, index * step, _SINKS if index == 0 else 0
            )
            for index in range(settings.tokens // step)
        ]
        most = max(codec.max_stream_bytes(step, block.sink_tokens) for block in self._blocks)
        pinned = gpu.stream is not None
        self._memory = torch.empty((len(self._blocks), most), dtype=torch.uint8, pin_memory=pinned)
        self.streams: list[memoryview] = []

    def encode(self) -> tuple[dict[str, float], float]:
        """Return the median seconds of each stage, and of the whole; leaves the streams."""
        return self._repeat(self._encode_once)

    def decode(self) -> tuple[dict[str, float], float]:
        """Return the median seconds of each stage, and of the whole."""
        return self._repeat(self._decode_once)

    def relative_error(self) -> float:
        """Return the root-mean-square error of the first layer's decoded values over their deviation."""
        true, found = self.cache.values[0].float(), self._target.values[0].float()
        return float(
            (found - true).square().mean().sqrt() / (true - true.mean((0, 1))).square().mean().sqrt()
        )

    def _repeat(self, work: Callable[[], None]) -> tuple[dict[str, float], float]:
        if self._gpu.stream is not None:  # the first run compiles kernels; the interpreter compiles nothing
            work()
            self._clock.take()
        stages, whole = [], []
        for _ in range(self._repetitions):
            start = time.perf_counter()
            work()
            whole.append(time.perf_counter() - start)
            stages.append(self._clock.take())
        return (
            {name: statistics.median(run[name] for run in stages) for name in stages[0]},
            statistics.median(whole),
        )

    def _encode_once(self) -> None:
        streams = self._codec.begin_encode(self.cache.keys, self.cache.values, self._blocks).streams()
        self.streams = []
        for stream, memory in zip(streams, self._memory, strict=True):
            if isinstance(stream, Exception):
                raise stream
            view = memory.numpy().data[: stream.nbytes]
            stream.copy_into(view)
            self.streams.append(view)

    def _decode_once(self) -> None:
        codec = self._codec
        headers = [codec.read_header(stream) for stream in self.streams]
        for group, layers in enumerate(codec.layer_groups):
            payloads = [s[slice(*h.group_span(group))] for h, s in zip(headers, self.streams, strict=True)]
            opened = []
            for part in codec.open_groups(headers, group, payloads):
                if isinstance(part, Exception):
                    raise part
                opened.append(part)
            parts = codec.join(opened)
            done = codec.scatter(parts, layers, self._target.keys, self._target.values, self.ids)
        done[-1].wait()
