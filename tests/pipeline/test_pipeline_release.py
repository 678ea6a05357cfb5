"""What a request has opened goes with it: no error, however long it is kept, holds it."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from rig import GEOMETRY, PARAMETERS, Rig, open_rig

from dynamo_kvtc.codec.base import Buffer
from dynamo_kvtc.codec.bitstream import StreamHeader
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.codec.paged_codec import Completion, PagedBlock, PendingEncode
from dynamo_kvtc.errors import GpuUnavailableError, KvtcError, OnboardError, PayloadError
from dynamo_kvtc.pipeline.boundary import Boundary, Fence
from dynamo_kvtc.pipeline.encoders import Encoder
from dynamo_kvtc.pipeline.onboard import OnboardSettings
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.tracebacks import without_frames


@pytest.fixture(autouse=True)
def without_collector() -> Iterator[None]:
    """A device's memory must not wait for Python's collector either."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Opened:
    """Stands for what a device has opened."""

    def __init__(self, part: Any) -> None:
        self.part = part


class Unreached:
    """A point that the device gets to when the test says so, or never."""

    def __init__(self, boundary: Failing) -> None:
        self.boundary = boundary

    def reached(self) -> bool:
        return False

    def wait(self) -> None:
        if self.boundary.where == "landing":
            raise GpuUnavailableError("it does not answer")
        self.boundary.hold()

    def order(self, stream: object) -> None:
        return


class Failing(Boundary):
    """A cache's own boundary, up to where it fails."""

    def __init__(self, inner: Boundary, where: str, *, launches: bool) -> None:
        self.inner, self.where, self.launches = inner, where, launches
        self.opened: list[weakref.ref[Opened]] = []
        self.begun, self.go_on = threading.Event(), threading.Event()

    def begin_encode(
        self,
        cache: PagedKvCache,
        blocks: Sequence[PagedBlock],
        encoder: Encoder,
        after: Fence | None = None,
    ) -> PendingEncode:
        raise NotImplementedError

    def _note(self, parts: Sequence[Any]) -> list[Any]:
        noted = [Opened(part) for part in parts]
        self.opened += [weakref.ref(one) for one in noted]
        return noted

    def open_groups(
        self, headers: Sequence[StreamHeader], group: int, payloads: Sequence[Buffer]
    ) -> Sequence[Any | KvtcError]:
        opened = self._note(self.inner.open_groups(headers, group, payloads))
        if self.where == "open" and len(self.opened) > 4:
            return [*opened[:-1], self._fault(opened[-1])]
        return opened

    def _fault(self, opened: Opened) -> KvtcError:
        try:
            try:
                raise ValueError(f"{opened} is full of nonsense")
            except ValueError as error:
                raise PayloadError(f"the payload says nothing: {error}") from error
        except PayloadError as error:
            return error

    def join(self, parts: Sequence[Any]) -> list[Any]:
        return self._note(self.inner.join([one.part for one in parts]))

    def scatter(
        self,
        parts: Sequence[Any],
        layers: LayerRange,
        cache: PagedKvCache,
        block_ids: Sequence[int],
        after: Fence | None = None,
    ) -> list[Completion]:
        if self.where == "scatter":
            raise GpuUnavailableError("no memory is left")
        if self.where == "unexpected":
            raise RuntimeError("nobody has thought of this")
        if self.where == "cancelled":
            self.hold()
        done = self.inner.scatter([one.part for one in parts], layers, cache, block_ids, after)
        waits = self.where == "landing" or (
            self.where == "cancelled landing" and layers.stop == GEOMETRY.num_layers
        )
        return [Unreached(self)] * layers.count if waits else done

    def hold(self) -> None:
        self.begun.set()
        assert self.go_on.wait(60)


def gone(opened: Sequence[weakref.ref[Opened]]) -> None:
    """Wait for the threads, which let go of their work a moment after its end."""
    deadline = time.monotonic() + 5
    while any(ref() is not None for ref in opened):
        assert time.monotonic() < deadline, "something of the request holds what it has opened"
        time.sleep(0.001)


async def stored(rig: Rig) -> Any:
    blocks = rig.sequence(256)
    await rig.store(blocks)
    return blocks


@pytest.mark.parametrize(
    ("where", "launches"),
    [
        *product(["open", "scatter", "unexpected", "cancelled", "nowhere"], [False, True]),
        ("landing", True),
        ("cancelled landing", True),
    ],
)
async def test_what_was_opened_goes_when_the_request_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, launches: bool
) -> None:
    # Pytest keeps what is logged, tracebacks included.
    monkeypatch.setattr(logging.getLogger("dynamo_kvtc.pipeline.onboard"), "disabled", True)
    groups = len(PARAMETERS.groups)
    units = groups if where == "cancelled landing" else 2 * groups
    settings = OnboardSettings(timeout_s=60, units=units)
    async with open_rig(tmp_path, tiers=("host",), onboard=settings) as rig:
        blocks = await stored(rig)
        boundary = Failing(rig.adapter.boundaries.host, where, launches=launches)
        handle = rig.adapter.onboard(blocks, rig.destination, boundary=boundary)
        if where.startswith("cancelled"):
            while not boundary.begun.is_set():
                await asyncio.sleep(0.001)
            cancelling = asyncio.create_task(handle.cancel())
            await asyncio.sleep(0.001)
            boundary.go_on.set()
            await cancelling
        if where == "nowhere":
            await handle.wait()
        else:
            with pytest.raises(OnboardError) as caught:
                await handle.wait()
            assert caught.value is handle.error()
        assert len(boundary.opened) >= 4
        await asyncio.to_thread(gone, boundary.opened)


def test_errors_behind_errors_let_go_as_well() -> None:
    class Held:
        pass

    def fail() -> weakref.ref[Held]:
        held = Held()
        raise KeyError(weakref.ref(held))

    def fail_by(cause: bool) -> Exception:
        try:
            try:
                fail()
            except KeyError as error:
                if cause:
                    raise ValueError from error
                raise ValueError from None
        except ValueError as error:
            return error
        raise AssertionError

    for cause in (True, False):
        error = fail_by(cause)
        assert isinstance(error.__context__, KeyError)
        held = error.__context__.args[0]
        assert held() is not None
        assert without_frames(error) is error
        assert held() is None
        # Errors may go round in a circle.
        error.__context__.__context__ = error
        without_frames(error)
