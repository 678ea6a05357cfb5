"""A Dynamo deployment on this machine: the real frontend, and real `dynamo.vllm` workers on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import requests
from counters import Counters

from benchmarks.local_dynamo.frontend import SESSION, Frontend, loopback_environment
from benchmarks.local_dynamo.processes import Managed, free_port

ROOT = Path(__file__).parents[2]
MODEL_NAME = "test-model"

#: Deadlines only: nothing is measured. A loaded machine takes minutes where an idle one takes one.
START_TIMEOUT_S = float(os.environ.get("E2E_START_TIMEOUT", "420"))
REQUEST_TIMEOUT_S = float(os.environ.get("E2E_REQUEST_TIMEOUT", "300"))

KvTransferConfig = dict[str, Any]


#: On top of what keeps Dynamo on the loopback.
_ENVIRONMENT = {
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "UCX_TLS": "tcp,self",
    "UCX_NET_DEVICES": "lo",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'engines'}",
}


@dataclass
class Answer:
    """One chat completion.

    Attributes
    ----------
    prompt_tokens, cached_tokens : int
        Tokens of the prompt, and how many of them the worker did not compute.
    logprobs : list of (str, float)
        Each token with its log-probability.
    """

    text: str
    prompt_tokens: int
    cached_tokens: int
    logprobs: list[tuple[str, float]]


class Worker:
    """One `python -m dynamo.vllm`.

    Parameters
    ----------
    kv_transfer : dict, optional
        ``--kv-transfer-config``.
    mode : str
        ``agg``, ``prefill`` or ``decode``.
    prefix_caching : bool
        Of vLLM; without it Dynamo publishes no KV events.
    environment : dict
        Added to the deployment's.
    """

    def __init__(
        self,
        deployment: Deployment,
        name: str,
        *,
        kv_transfer: KvTransferConfig | None = None,
        mode: str = "agg",
        dtype: str = "bfloat16",
        prefix_caching: bool = True,
        arguments: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name, self.system_port = name, free_port()
        command = [sys.executable, "-m", "dynamo.vllm", "--model", str(deployment.model)]
        command += ["--served-model-name", MODEL_NAME, "--max-model-len", "4096", "--max-num-seqs", "4"]
        command += ["--enforce-eager", "--dtype", dtype, *arguments]
        if mode != "agg":
            command += ["--disaggregation-mode", mode]
        if kv_transfer is not None:
            command += ["--kv-transfer-config", json.dumps(kv_transfer)]
        if not prefix_caching:
            command += ["--no-enable-prefix-caching"]
        else:
            publisher = {"enable_kv_cache_events": True, "publisher": "zmq", "topic": "kv-events"}
            endpoint = {"endpoint": f"tcp://*:{free_port()}"}
            command += ["--kv-events-config", json.dumps(publisher | endpoint)]
        own = {
            "DYN_SYSTEM_PORT": str(self.system_port),
            "DYN_FORWARDPASS_METRIC_PORT": str(free_port()),
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("E2E_CORES") or deployment.next_core(),
        }
        log = deployment.folder / f"{name}.log"
        self.process = Managed(name, command, deployment.environment | own | (environment or {}), log)
        deployment.own(self.process)

    def wait_ready(self) -> None:
        self.process.wait_for(self._healthy, "worker ready", timeout_s=START_TIMEOUT_S)

    def counters(self) -> Counters:
        """Read the worker's metrics."""
        reply = SESSION.get(f"http://127.0.0.1:{self.system_port}/metrics", timeout=30)
        reply.raise_for_status()
        return Counters(reply.text)

    def stop(self) -> None:
        self.process.stop()

    def kill(self) -> None:
        self.process.kill()

    def _healthy(self) -> bool:
        try:
            reply = SESSION.get(f"http://127.0.0.1:{self.system_port}/health", timeout=10)
        except requests.RequestException:
            return False
        return reply.status_code == 200


@dataclass
class Deployment:
    """A frontend with the KV router, and the workers that a test adds. Use it as a context manager.

    Parameters
    ----------
    folder : Path
        For logs and discovery; made anew.
    model : Path
        Hugging Face folder.
    router : tuple of str
        Arguments of the frontend.
    """

    folder: Path
    model: Path
    router: tuple[str, ...] = ()
    _processes: list[Managed] = field(default_factory=list)
    _cores: int = 0

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.environment = loopback_environment(self.folder) | _ENVIRONMENT

    def __enter__(self) -> Deployment:
        self.frontend = Frontend(self.folder, self.environment, *self.router)
        self.own(self.frontend.process)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Workers first: a frontend that loses them does not matter any more. Nothing waits for them to end in
        # order, which takes 15 s.
        for process in reversed(self._processes):
            process.kill()

    def print_logs(self) -> None:
        for process in self._processes:
            print(f"--- {process.log}\n{process.tail(30)}")

    def remove_logs(self) -> None:
        shutil.rmtree(self.folder)
        with contextlib.suppress(OSError):  # other deployments of the test left theirs
            self.folder.parent.rmdir()

    def own(self, process: Managed) -> None:
        self._processes.append(process)

    def next_core(self) -> str:
        """Give workers the cores in turn: two workers on one core wait for each other."""
        cores = sorted(os.sched_getaffinity(0))
        self._cores += 1
        return str(cores[self._cores % len(cores)])

    def worker(self, name: str, **settings: Any) -> Worker:
        """Start a worker and wait until the frontend knows it."""
        worker = self.start(name, **settings)
        self.wait_ready(worker)
        return worker

    def start(self, name: str, **settings: Any) -> Worker:
        """Start a worker; `wait_ready` waits for it."""
        return Worker(self, name, **settings)

    def wait_ready(self, *workers: Worker) -> None:
        for worker in workers:
            worker.wait_ready()
        self.frontend.wait_for_workers(timeout_s=120)

    def chat(self, messages: list[dict[str, str]], *, max_tokens: int = 8, **options: Any) -> Answer:
        """Ask for a greedy completion over HTTP."""
        body = {
            "model": MODEL_NAME,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "logprobs": True,
            **options,
        }
        reply = SESSION.post(self.frontend.url("/v1/chat/completions"), json=body, timeout=REQUEST_TIMEOUT_S)
        assert reply.status_code == 200, f"{reply.status_code}: {reply.text[:2000]}"
        answer = reply.json()
        choice, usage = answer["choices"][0], answer["usage"]
        details = usage.get("prompt_tokens_details") or {}
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        return Answer(
            choice["message"]["content"] or "",
            usage["prompt_tokens"],
            details.get("cached_tokens") or 0,
            [(token["token"], token["logprob"]) for token in logprobs],
        )
