"""Settings of a `TransferAgent`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["AgentSettings"]


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """How a `TransferAgent` moves bytes. The defaults suit a serving worker.

    Attributes
    ----------
    name : str
        Prefix of the NIXL agent's name; a process-unique suffix is added.
    io_uring : bool
        Try io_uring for files. A real transfer at start decides whether it works; Linux AIO otherwise.
    gds : bool
        Move files through NIXL's GDS plugin instead of its POSIX backend; see `dynamo_kvtc.transfer.gds`.
    interface : str
        Network interface that UCX opens its sockets on; all copies stay within the process, so it is the
        loopback one. Empty leaves it to UCX, which listens on every interface; so do the variables
        ``UCX_NET_DEVICES`` and ``UCX_TLS`` if they are set.
    max_descriptors : int
        Descriptors in flight at any time; more than 65,536 kill NIXL's POSIX backend.
    max_post_bytes : int
        Bytes posted to NIXL at once. NIXL copies memory inside the call that posts it, so this bounds
        how long one large transfer keeps the others waiting.
    max_transfers : int
        Transfers in flight; callers beyond it wait, within their own deadlines.
    drain_limit_s : float
        How long an abandoned transfer may go on before NIXL's agent is taken for broken and replaced.
    close_timeout_s : float
        How long `TransferAgent.close` waits for transfers in flight.
    object_store : Mapping[str, str], optional
        Parameters of NIXL's OBJ backend; the agent then has this backend alone, see `ObjectAgent`.
    """

    name: str = "kvtc"
    io_uring: bool = True
    gds: bool = False
    interface: str = "lo"
    max_descriptors: int = 16_384
    max_post_bytes: int = 4 << 20
    max_transfers: int = 256
    drain_limit_s: float = 30.0
    close_timeout_s: float = 5.0
    object_store: Mapping[str, str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.max_descriptors <= 65_536:
            raise ValueError(f"max_descriptors must lie in 1..65536, not {self.max_descriptors}")
        if self.max_post_bytes < 4096 or self.max_transfers < 1:
            raise ValueError("max_post_bytes must be at least 4096 and max_transfers at least 1")
        if self.drain_limit_s <= 0 or self.close_timeout_s <= 0:
            raise ValueError("drain_limit_s and close_timeout_s must be positive")
