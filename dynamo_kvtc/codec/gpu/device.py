"""The device that a GPU codec works on: its streams, and how much of it the codec may take.

All work of a codec goes to one stream, and each kernel has a bounded grid, so that it never holds more than
a share of the SMs. Uploads have a stream of their own. Nothing here makes the host wait but
`DeviceEvent.wait` and `GpuDevice.download`, which belong in worker threads and have a deadline: a device that
does not answer is lost, and everything asked of it from then on is refused.
Without a GPU (`GpuDevice.interpreter`) everything runs in place, for tests: kernels in Triton's interpreter.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from dynamo_kvtc.codec.gpu.stages import StageClock
from dynamo_kvtc.errors import GpuUnavailableError, MissingDependencyError

__all__ = ["PRIORITIES", "DeviceEvent", "GpuDevice", "gpu_problem", "require_gpu"]

#: Priorities of the codec's streams. CUDA has none below a default stream's: low is that one.
PRIORITIES = ("low", "high")

#: Seconds without an answer after which a device is taken for lost.
_PATIENCE_S = 60.0

#: Seconds between two looks at an event, at first and at last.
_FIRST_LOOK_S, _LAST_LOOK_S = 20e-6, 500e-6


def gpu_problem(device: torch.device | str = "cuda") -> str | None:
    """Say why the GPU codec cannot run here; None if it can. Touches no device but through torch."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed: pip install triton (CUDA builds of torch bring it along)"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return (
            "torch finds no CUDA device (check nvidia-smi and CUDA_VISIBLE_DEVICES)"
            if built
            else "this build of torch is for CPUs; install one for CUDA"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}; bfloat16 tensor cores need 8.0"
    del triton
    return None


def _shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may have: what Triton checks kernels against."""
    import triton

    found = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(found["max_shared_mem"])


def require_gpu(device: torch.device | str = "cuda") -> None:
    """Raise unless the GPU codec can run here.

    Raises
    ------
    GpuUnavailableError
        With what to do about it.
    """
    if (problem := gpu_problem(device)) is not None:
        raise GpuUnavailableError(f"no usable GPU: {problem}")


class DeviceEvent:
    """A point in a stream's work. Made by `GpuDevice.record`; on a CPU it has always been reached."""

    def __init__(self, gpu: GpuDevice, event: torch.cuda.Event | None) -> None:
        self._gpu, self._event = gpu, event

    def reached(self) -> bool:
        """Tell whether everything before it is done; never blocks."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Block this thread until everything before it is done. Never call it on an event loop.

        Raises
        ------
        GpuUnavailableError
            If the device does not get there; it is lost then.
        """
        deadline, pause = time.monotonic() + _PATIENCE_S, _FIRST_LOOK_S
        while not self.reached():
            if time.monotonic() > deadline:
                self._gpu.lost = True
                raise GpuUnavailableError(
                    f"{self._gpu.device} has not answered for {_PATIENCE_S:g} s and is not used any more: "
                    "see nvidia-smi and the kernel's log, and restart the worker"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LAST_LOOK_S)

    def order(self, stream: torch.cuda.Stream | None) -> None:
        """Make later work of `stream` wait for it, without blocking the caller."""
        if self._event is not None and stream is not None:
            stream.wait_event(self._event)


@dataclass(eq=False)
class GpuDevice:
    """Where kernels run.

    Attributes
    ----------
    device : torch.device
        A CUDA device, or the CPU for the interpreter.
    programs : int
        SMs that the codec's kernels may occupy at a time.
    shared_bytes : int
        Shared memory that a program may have: 227 KiB on Hopper, 163 on an A100, 99 on other GPUs.
    clock : StageClock or None
        Times the stages of the codec's work, for measurements.
    stream, upload_stream : torch.cuda.Stream or None
        For kernels, and for copies to the device; None on a CPU.
    lost : bool
        Set when the device did not answer.
    """

    device: torch.device
    programs: int
    stream: torch.cuda.Stream | None = None
    upload_stream: torch.cuda.Stream | None = None
    shared_bytes: int = 99 << 10
    clock: StageClock | None = None
    lost: bool = False
    _interpreted: bool = field(default=False, repr=False)
    _workspace: torch.Tensor | None = field(default=None, repr=False)
    _workspace_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    #: Programs on an SM: of matrix products, which fill one each, and of kernels that only move bytes.
    MATRIX = 1
    STREAMING = 8

    @classmethod
    def open(
        cls, device: torch.device | str = "cuda", *, sm_share: float = 0.5, priority: str = "low"
    ) -> GpuDevice:
        """Open a CUDA device.

        Parameters
        ----------
        sm_share : float
            Largest share of the SMs that the codec's kernels take, above 0 and at most 1.
        priority : str
            One of `PRIORITIES`.

        Raises
        ------
        GpuUnavailableError
            If there is no usable one.
        ValueError
            If `sm_share` or `priority` is out of range.
        """
        if not 0 < sm_share <= 1:
            raise ValueError(f"sm_share is {sm_share}; it must lie above 0 and at most at 1")
        if priority not in PRIORITIES:
            raise ValueError(f"priority is {priority!r}; choose one of {', '.join(PRIORITIES)}")
        require_gpu(device)
        found = torch.device(device)
        if found.index is None:
            found = torch.device("cuda", torch.cuda.current_device())
        sms = torch.cuda.get_device_properties(found).multi_processor_count
        # Numbers fall as priorities rise: (0, -5), say. A CPU build of torch does not have this method.
        least, greatest = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]
        number = least if priority == "low" else greatest
        return cls(
            found,
            max(1, int(sms * sm_share)),
            torch.cuda.Stream(found, priority=number),  # type: ignore[no-untyped-call]
            torch.cuda.Stream(found, priority=number),  # type: ignore[no-untyped-call]
            shared_bytes=_shared_memory(found),
        )

    @classmethod
    def interpreter(cls, *, programs: int = 2) -> GpuDevice:
        """Return the CPU as a device, with kernels in Triton's interpreter; slow, for tests.

        Raises
        ------
        GpuUnavailableError
            If the environment does not choose the interpreter.
        MissingDependencyError
            If Triton is not installed.
        """
        try:
            import triton
        except ImportError as error:
            raise MissingDependencyError("Triton is not installed: pip install --no-deps triton") from error
        del triton
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise GpuUnavailableError(
                "kernels run on a CPU in Triton's interpreter only: set TRITON_INTERPRET=1 before the start"
            )
        return cls(torch.device("cpu"), programs, _interpreted=True)

    @property
    def is_interpreter(self) -> bool:
        """Whether kernels run in Triton's interpreter."""
        return self._interpreted

    def grid(self, tiles: int, per_sm: int) -> tuple[int]:
        """Return the grid of a kernel that walks over `tiles` tiles."""
        return (max(1, min(tiles, self.programs * per_sm)),)

    def stages(self, rows: int, columns: int, depth: int) -> int:
        """Return how many steps of a product of bfloat16 tiles are in shared memory at a time: 2 to 4."""
        return max(2, min(4, self.shared_bytes // (2 * depth * (rows + columns))))

    def layers_at_once(self, tiles: int, layers: int) -> int:
        """Return how many layers of `tiles` tiles one launch of a product should take.

        Enough for two rounds over the SMs, where a layer has fewer tiles than that: narrow layers (one rank
        of eight) and short sequences would leave most SMs idle.
        """
        return max(1, min(layers, 2 * self.programs * self.MATRIX // max(1, tiles)))

    def tile(self, size: int, block: int) -> int:
        """Return the edge of a tile: `block`, or less in the interpreter, whose time is that of the elements.

        On a GPU it does not depend on `size`, so that kernels are compiled once.
        """
        if not self._interpreted:
            return block
        return min(block, max(16, 1 << max(0, size - 1).bit_length()))

    # --- streams ---------------------------------------------------------------------------------

    @contextmanager
    def active(self) -> Iterator[None]:
        """Send what the block launches to this device's stream.

        Raises
        ------
        GpuUnavailableError
            If the device is lost, or has no memory left for what the block allocates.
        """
        if self.lost:
            raise GpuUnavailableError(f"{self.device} did not answer and is not used any more")
        if self.stream is None:
            yield
            return
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                yield
        except torch.cuda.OutOfMemoryError as error:
            raise GpuUnavailableError(
                f"no memory is left on {self.device} for the codec: let the engine take less of it "
                "(--gpu-memory-utilization), or lower codec.gpu.memory"
            ) from error

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Name what the block puts on this device's stream; see `dynamo_kvtc.codec.gpu.stages`."""
        return nullcontext() if self.clock is None else self.clock.interval(name, self.stream)

    def record(self, stream: torch.cuda.Stream | None = None) -> DeviceEvent:
        """Mark the present end of a stream's work, by default that of the kernels'."""
        chosen = stream or self.stream
        if chosen is None:
            return DeviceEvent(self, None)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(chosen)
        return DeviceEvent(self, event)

    def after_engine(self, event: torch.cuda.Event | None) -> None:
        """Order the codec's next work behind an event of the engine's, or behind its default stream."""
        if self.stream is None:
            return
        if event is not None:
            self.stream.wait_event(event)
        else:
            self.stream.wait_stream(torch.cuda.default_stream(self.device))

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """Copy a host tensor of any shape to the device, ordered before the kernels that are launched next.

        Asynchronous where `host` is pinned, which then must not change until those kernels have begun;
        small unpinned tensors are staged by CUDA itself.
        """
        if self.stream is None or self.upload_stream is None:
            return host.clone()
        with torch.cuda.device(self.device), torch.cuda.stream(self.upload_stream):
            copy = host.to(self.device, non_blocking=True)
        self.stream.wait_stream(self.upload_stream)
        copy.record_stream(self.stream)
        return copy

    def upload_all(self, parts: Sequence[torch.Tensor], starts: Sequence[int], total: int) -> torch.Tensor:
        """Copy host tensors of bytes into a new one on the device, uint8 ``[total]``; see `upload`.

        Each begins at its start.
        """
        if self.stream is None or self.upload_stream is None:
            return self._fill(torch.empty(total, dtype=torch.uint8), parts, starts)
        with torch.cuda.device(self.device), torch.cuda.stream(self.upload_stream):
            target = torch.empty(total, dtype=torch.uint8, device=self.device)
            self._fill(target, parts, starts)
        self.stream.wait_stream(self.upload_stream)
        target.record_stream(self.stream)
        return target

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor of any shape to the host behind what is launched; blocks until it is there.

        Raises
        ------
        GpuUnavailableError
            If the device does not answer.
        """
        if self.stream is None:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with self.active():
            host.copy_(tensor, non_blocking=True)
            done = self.record()
        done.wait()
        return host

    @contextmanager
    def workspace(self, nbytes: int) -> Iterator[torch.Tensor]:
        """Lend kernels that the block launches `nbytes` bytes on the device, uint8, of any content.

        All launches get the same memory, kept from one to the next: they follow one another on one stream,
        and in the interpreter they end before the lock is given back. Its bytes are not of any budget.
        """
        with self._workspace_lock:
            if self._workspace is None or self._workspace.numel() < nbytes:
                self._workspace = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
            yield self._workspace[:nbytes]

    def reserve(self, nbytes: int) -> None:
        """Take memory from the device into torch's pool for this stream, so that it is there when needed.

        Raises
        ------
        GpuUnavailableError
            If so much is not free.
        """
        if self.stream is not None:
            with self.active():
                torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    @staticmethod
    def _fill(target: torch.Tensor, parts: Sequence[torch.Tensor], starts: Sequence[int]) -> torch.Tensor:
        for part, start in zip(parts, starts, strict=True):
            target[start : start + part.numel()].copy_(part, non_blocking=True)
        return target
