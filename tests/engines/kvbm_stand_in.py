"""Stands in for KVBM's Rust half, which panics where there is no CUDA driver.

Real are kvbm's Python classes (connector, leader, worker) and its Rust `SchedulerOutput`. Replaced are
`PyKvConnectorLeader`, `PyKvConnectorWorker` and CUDA's events. The stand-ins keep what Dynamo's sources
(lib/bindings/kvbm/src/block_manager/vllm/connector) promise and assert what they assert:

* a slot per request; a match stays staged until it is triggered, whatever is asked meanwhile;
* a triggered load fills the last blocks of the table that is passed with it, starting after
  ``len(block_ids) * block_size - num_external_tokens`` tokens;
* blocks that a step completes are stored, those that were computed or loaded before are skipped;
* `request_finished` always holds the blocks until the worker reports the request;
* loads and stores end in a later step than the one that began them.

Host blocks live in a dictionary instead of pinned memory, bounded and evicted in order of use.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class HostPool:
    """KVBM's raw host pool: whole blocks of all layers by sequence hash."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.matched_tokens = 0
        self.stored: OrderedDict[bytes, list[torch.Tensor]] = OrderedDict()
        #: Blocks of triggered loads; they may leave the pool meanwhile.
        self.held: dict[bytes, list[torch.Tensor]] = {}

    def put(self, key: bytes, layers: list[torch.Tensor]) -> None:
        self.stored[key] = layers
        self.stored.move_to_end(key)
        while len(self.stored) > self.blocks:
            self.stored.popitem(last=False)


@dataclass
class Request:
    """kvbm's `KvbmRequest`, whose fields Python cannot read back."""

    request_id: str
    lora_name: str | None = None
    salt_hash: str | None = None


@dataclass
class _Slot:
    request: Request
    hashes: list[bytes]
    num_tokens: int
    table: list[int] = field(default_factory=list)
    staged: list[bytes] | None = None
    evaluated_blocks: int = 0
    position: int = 0
    operations: list[dict[str, Any]] = field(default_factory=list)


def sequence_hashes(tokens: list[int], block_size: int, salt: str) -> list[bytes]:
    """Hash each whole block with all that is before it."""
    hashes, parent = [], salt.encode()
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = hashlib.sha256(parent + json.dumps(tokens[start : start + block_size]).encode()).digest()
        hashes.append(parent)
    return hashes


class Leader:
    """`PyKvConnectorLeader`."""

    pool: HostPool

    def __init__(self, engine_id: str, drt: object, block_size: int, leader: object, **named: object) -> None:
        self._block_size = block_size
        self._slots: dict[str, _Slot] = {}
        self._onboarding: list[str] = []
        self._iteration = 0

    def has_slot(self, request_id: str) -> bool:
        return request_id in self._slots

    def create_slot(self, request: Request, tokens: Any) -> None:
        ids = [int(token) for token in tokens]
        salt = f"{request.salt_hash} {request.lora_name}"
        hashes = sequence_hashes(ids, self._block_size, salt)
        self._slots[request.request_id] = _Slot(request, hashes, len(ids))

    def get_num_new_matched_tokens(self, request_id: str, num_tokens: int, computed: int) -> tuple[int, bool]:
        slot = self._slots[request_id]
        assert computed % self._block_size == 0
        if slot.num_tokens - computed < self._block_size:
            return 0, False
        if slot.staged is None:
            found = []
            for key in slot.hashes[computed // self._block_size :]:
                if key not in self.pool.stored:
                    break
                found.append(key)
            if found and computed + len(found) * self._block_size == slot.num_tokens:
                found.pop()
            slot.staged = found or None
        matched = len(slot.staged or ()) * self._block_size
        self.pool.matched_tokens += matched
        return matched, matched > 0

    def update_state_after_alloc(self, request_id: str, block_ids: list[int], external: int) -> None:
        slot = self._slots[request_id]
        slot.table = list(block_ids)
        if not external:
            return
        assert slot.staged is not None, "slot must be in the OnboardStaged state"
        assert len(slot.staged) * self._block_size == external
        computed = len(block_ids) * self._block_size - external
        assert computed >= 0
        first = computed // self._block_size
        pairs = list(zip(slot.staged, block_ids[first:], strict=True))
        assert [key for key, _ in pairs] == slot.hashes[first : first + len(pairs)], "blocks of other tokens"
        slot.operations += [{"load": True, "key": key.hex(), "block": block} for key, block in pairs]
        self.pool.held |= {key: self.pool.stored[key] for key in slot.staged}
        slot.staged = None
        slot.position = computed + external
        slot.evaluated_blocks = slot.position // self._block_size
        self._onboarding.append(request_id)

    def build_connector_metadata(self, output: Any) -> bytes:
        self._iteration += 1
        steps = json.loads(output.serialize())
        operations: dict[str, list[dict[str, Any]]] = {}
        for request_id in self._onboarding:
            operations[request_id] = self._take(request_id)
        self._onboarding = []
        scheduled = steps["num_scheduled_tokens"]
        for step in steps["new_requests"] + steps["cached_requests"]:
            request_id = step["request_id"]
            slot = self._slots[request_id]
            slot.table += step.get("new_block_ids", [])
            self._apply(slot, step["num_computed_tokens"], scheduled.get(request_id, 0))
            operations[request_id] = self._take(request_id)
        return json.dumps({"iteration": self._iteration, "operations": operations}).encode()

    def request_finished(self, request_id: str, block_ids: list[int]) -> bool:
        return self._slots.pop(request_id, None) is not None

    def reset_cache(self) -> bool:
        self.pool.stored.clear()
        return True

    def _apply(self, slot: _Slot, computed: int, scheduled: int) -> None:
        slot.position = max(slot.position, computed)
        slot.evaluated_blocks = max(slot.evaluated_blocks, computed // self._block_size)
        end = slot.position + scheduled
        assert end <= len(slot.table) * self._block_size
        if end > slot.num_tokens:
            return  # a decoded token, which the slot is not told of
        for index in range(slot.evaluated_blocks, end // self._block_size):
            key = slot.hashes[index].hex()
            slot.operations.append({"load": False, "key": key, "block": slot.table[index]})
        slot.evaluated_blocks = max(slot.evaluated_blocks, end // self._block_size)
        slot.position = end

    def _take(self, request_id: str) -> list[dict[str, Any]]:
        slot = self._slots[request_id]
        operations, slot.operations = slot.operations, []
        return operations


class Worker:
    """`PyKvConnectorWorker`."""

    pool: HostPool

    def __init__(self, drt: object, engine_id: str) -> None:
        self._caches: list[torch.Tensor] = []
        self._layers_done = 0
        self._stores: list[dict[str, Any]] = []
        self._loads: dict[str, list[dict[str, Any]]] = {}
        self._finished: set[str] = set()
        self._known: set[str] = set()
        self._steps_left: dict[str, int] = {}

    def register_kv_caches(
        self,
        num_blocks: int,
        block_size: int,
        device: object,
        width: int,
        caches: list[tuple[str, torch.Tensor]],
        events: list[int],
        **named: object,
    ) -> None:
        self._caches = [cache for _, cache in caches]

    def bind_connector_metadata(self, metadata: bytes) -> None:
        self._layers_done = 0
        for request_id, operations in json.loads(metadata)["operations"].items():
            self._known.add(request_id)
            loads = [operation for operation in operations if operation["load"]]
            if loads:
                self._loads[request_id] = loads
                self._steps_left[request_id] = 2
            self._stores += [operation for operation in operations if not operation["load"]]

    def clear_connector_metadata(self) -> None:
        pass

    def save_kv_layer(self, layer_name: str, layer: torch.Tensor) -> None:
        self._layers_done += 1
        if self._layers_done == len(self._caches):
            for store in self._stores:
                layers = [cache[store["block"]].clone() for cache in self._caches]
                self.pool.put(bytes.fromhex(store["key"]), layers)
            self._stores = []

    def get_finished(self, finished: set[str]) -> tuple[set[str], set[str]]:
        # What is aborted while it loads is reported as loaded, and no more.
        self._finished |= (finished & self._known) - self._loads.keys()
        received = set()
        for request_id in list(self._loads):
            self._steps_left[request_id] -= 1
            if not self._steps_left[request_id]:
                for load in self._loads.pop(request_id):
                    stored = self.pool.held[bytes.fromhex(load["key"])]
                    for cache, layer in zip(self._caches, stored, strict=True):
                        cache[load["block"]].copy_(layer)
                received.add(request_id)
        sent, self._finished = self._finished, set()
        self._known -= sent | received
        return sent, received


class _Event:
    cuda_event = 0

    def __init__(self, **named: object) -> None: ...

    def record(self, stream: object = None) -> None: ...


def install(monkeypatch: pytest.MonkeyPatch, *, blocks: int) -> HostPool:
    """Put the stand-ins where kvbm's Python looks for its Rust; returns their host pool."""
    from kvbm.vllm_integration import connector_leader, connector_worker

    pool = HostPool(blocks)
    leader, worker = type("_Leader", (Leader,), {"pool": pool}), type("_Worker", (Worker,), {"pool": pool})
    monkeypatch.setattr(connector_leader, "KvbmLeader", lambda world_size, drt=None: object())
    monkeypatch.setattr(connector_leader, "RustKvConnectorLeader", leader)
    monkeypatch.setattr(connector_leader, "KvbmRequest", Request)
    monkeypatch.setattr(connector_worker, "RustKvConnectorWorker", worker)
    cuda = SimpleNamespace(Event=_Event, current_stream=lambda: None)
    monkeypatch.setattr(connector_worker, "torch", SimpleNamespace(cuda=cuda))
    return pool
