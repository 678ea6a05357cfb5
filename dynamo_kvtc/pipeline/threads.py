"""Threads that compute."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["single_threaded_pool"]

_START_TIMEOUT_S = 30.0


def single_threaded_pool(workers: int, name: str) -> ThreadPoolExecutor:
    """Return a running pool whose threads compute torch's operations each on one core.

    Several small products side by side use the cores better than one after the other on all cores, and do
    not wait at barriers for a core that the engine has taken. Other threads keep torch's own setting.
    """
    before = torch.get_num_threads()
    started = threading.Barrier(workers + 1)

    def start() -> None:
        # The first call makes torch note that this thread has its setting; the second changes it here.
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait(_START_TIMEOUT_S)

    pool = ThreadPoolExecutor(workers, thread_name_prefix=name, initializer=start)
    for _ in range(workers):
        pool.submit(lambda: None)
    started.wait(_START_TIMEOUT_S)
    # set_num_threads also changes what threads made later begin with: put that back.
    torch.set_num_threads(before)
    return pool
