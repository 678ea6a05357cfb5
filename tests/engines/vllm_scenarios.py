"""What the tests of the vLLM connector run, each in a process of its own: ``vllm_scenarios.py NAME FOLDER``.

Every scenario starts a real engine in-process (float32, eager) and prints one JSON object on its last line.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.local_dynamo.vllm_cpu import VLLM_ON_CPU

os.environ.update(VLLM_ON_CPU, VLLM_LOGGING_LEVEL="WARNING")

TIER_BLOCK = 64
BLOCK = 32
LONG = 520  # tokens; eight whole tier blocks
OUTPUT = 6

DISK = "  - {kind: disk, path: FOLDER/disk, capacity: 1GiB}\n"
HOST = "  - {kind: host, capacity: 256MiB}\n"


class Engine:
    """An engine with or without the connector."""

    def __init__(
        self,
        folder: Path,
        *,
        tiers: str | None = HOST + DISK,
        load: str = "async",
        onboard_timeout: str = "20s",
        codec: str = "{profile: raw}",
        artifact: str = "",
        dtype: str = "float32",
        decide: str = "always",  # tokens are counted, whatever is faster on a busy machine
        **options: Any,
    ) -> None:
        from vllm import LLM, SamplingParams
        from vllm.config import KVEventsConfig

        from dynamo_kvtc.calibration.models import resolve_model

        if tiers is not None:
            config = folder / "kvtc.yaml"
            config.write_text(
                f"{artifact}codec: {codec}\ntiers:\n{tiers.replace('FOLDER', str(folder))}"
                f"policy: {{tier_block_tokens: {TIER_BLOCK}, recent_window: 0, minimum_tokens: 0, "
                f"decide: {decide}}}\n"
                f"pipeline: {{onboard_timeout: {onboard_timeout}}}\n"
            )
            options["kv_transfer_config"] = {
                "kv_connector": "KvtcConnector",
                "kv_connector_module_path": "dynamo_kvtc.adapters.vllm",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"config": str(config), "load": load, "lookup_timeout": "10s"},
            }
            options["kv_events_config"] = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
        self.llm = LLM(
            model=str(resolve_model("builtin:smollm2")),
            dtype=dtype,
            enforce_eager=True,
            block_size=BLOCK,
            max_num_seqs=4,
            max_num_batched_tokens=128,  # so that prefills are chunked
            **{"max_model_len": 1024, **options},
        )
        self._sampling = SamplingParams
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.events: list[Any] = []
        self.preemptions = 0
        if tiers is not None:
            self._watch_events()
        self._watch_preemptions()

    def _watch_events(self) -> None:
        connector = self.scheduler.connector
        take = connector.take_events

        def taken() -> list[Any]:
            events = take()
            self.events += events
            return events

        connector.take_events = taken

    def _watch_preemptions(self) -> None:
        preempt = self.scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> None:
            self.preemptions += 1
            preempt(*args, **kwargs)

        self.scheduler._preempt_request = counted

    @property
    def adapter(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker._adapter

    def tokens(self, start: int, count: int) -> list[int]:
        from dynamo_kvtc import data

        text = (Path(data.__file__).parent / "text" / "prose-heldout.txt").read_text()
        ids: list[int] = self.llm.get_tokenizer().encode(text[:20_000])
        return ids[start : start + count]

    def generate(
        self,
        *prompts: list[int],
        salt: str | None = None,
        tokens: int = OUTPUT,
        prompt_logprobs: bool = False,
        lora: Any = None,
    ) -> list[dict[str, Any]]:
        extra = {"cache_salt": salt} if salt else {}
        sampling = self._sampling(
            temperature=0,
            max_tokens=tokens,
            logprobs=1,
            ignore_eos=True,
            prompt_logprobs=0 if prompt_logprobs else None,
        )
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt, **extra} for prompt in prompts],
            sampling,
            use_tqdm=False,
            lora_request=lora,
        )
        return [
            {
                "ids": list(output.outputs[0].token_ids),
                "logprobs": [
                    position[token].logprob
                    for position, token in zip(
                        output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True
                    )
                ],
                "cached": output.num_cached_tokens,
            }
            for output in outputs
        ]

    def settle(self) -> None:
        """Wait until every offload has ended, and let vLLM take note."""
        deadline = time.monotonic() + 60

        async def waiting(tiers: Any) -> int:
            return len(tiers._offloader._keys)

        while self.adapter.run(waiting):
            assert time.monotonic() < deadline, "offloads did not end"
            time.sleep(0.02)
        for _ in range(3):
            self.llm.llm_engine.step()

    def forget_local(self) -> None:
        """Drop vLLM's own prefix cache."""
        self.settle()
        assert self.llm.reset_prefix_cache()

    def counters(self) -> dict[str, Any]:
        snapshot: dict[str, Any] = self.adapter.counters.snapshot().to_dict()
        return snapshot

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def prompts(engine: Engine) -> dict[str, list[int]]:
    long = engine.tokens(0, LONG)
    return {
        "long": long,
        "turn": [*long, *engine.tokens(2000, 50)],
        "left": [*engine.tokens(1000, 200), *engine.tokens(1500, 40)],
        "right": [*engine.tokens(1000, 200), *engine.tokens(1600, 70)],
    }


def crowd(engine: Engine) -> list[list[int]]:
    return [engine.tokens(3000 + 300 * index, 200) for index in range(3)]


def reference(folder: Path) -> dict[str, Any]:
    engine = Engine(folder, tiers=None)
    result: dict[str, Any] = {name: engine.generate(ids)[0] for name, ids in prompts(engine).items()}
    result["crowd"] = [engine.generate(ids, tokens=80)[0] for ids in crowd(engine)]
    engine.close()
    return result


def served(folder: Path) -> dict[str, Any]:
    engine = Engine(folder)
    text = prompts(engine)
    result: dict[str, Any] = {"first": engine.generate(text["long"])[0]}
    engine.forget_local()
    result["turn"] = engine.generate(text["turn"])[0]
    engine.forget_local()
    result["pair_first"] = engine.generate(text["left"], text["right"])
    engine.forget_local()
    result["pair"] = engine.generate(text["left"], text["right"])
    result["counters"] = engine.counters()
    stats = engine.scheduler.connector.get_kv_connector_stats()
    result["scheduler_stats"] = None if stats is None else stats.data
    engine.forget_local()
    result["salted"] = engine.generate(text["left"], salt="mine")[0]
    engine.forget_local()
    result["salted_other"] = engine.generate(text["left"], salt="another")[0]
    engine.forget_local()
    result["salted_again"] = engine.generate(text["left"], salt="mine")[0]
    engine.forget_local()
    result["events"] = [
        {
            "kind": type(event).__name__,
            "medium": event.medium,
            "hashes": [str(one) for one in event.block_hashes],
            "tokens": list(getattr(event, "token_ids", [])),
            "block_size": getattr(event, "block_size", None),
            "parent": str(getattr(event, "parent_block_hash", None)),
        }
        for event in engine.events
    ]
    assert engine.llm.llm_engine.reset_prefix_cache(reset_connector=True)
    engine.events.clear()
    result["after_reset"] = engine.generate(text["long"])[0]
    engine.forget_local()
    removed = [event for event in engine.events if type(event).__name__ == "BlockRemoved"]
    result["removed"] = {
        medium: sorted(str(one) for event in removed if event.medium == medium for one in event.block_hashes)
        for medium in ("CPU", "STORAGE")
    }
    engine.close()
    return result


def damage(folder: Path) -> None:
    """Invert 64 bytes in every MiB, so that no tier block is left sound."""
    for segment in folder.rglob("*"):
        size = segment.stat().st_size
        if segment.is_file() and size > 1 << 20:
            with segment.open("r+b") as file:
                for offset in range(1 << 16, size - 64, 1 << 20):
                    file.seek(offset)
                    found = file.read(64)
                    file.seek(offset)
                    file.write(bytes(byte ^ 0xFF for byte in found))


def restarted(folder: Path) -> dict[str, Any]:
    """Serve what `served` left on the disk, layer by layer; then what is damaged there."""
    engine = Engine(folder, tiers=DISK, load="layerwise")
    long = prompts(engine)["long"]
    result: dict[str, Any] = {"long": engine.generate(long)[0]}
    engine.forget_local()
    damage(folder / "disk")
    result["damaged"] = engine.generate(long)[0]
    result["counters"] = engine.counters()
    engine.forget_local()
    result["again"] = engine.generate(long)[0]
    engine.close()
    return result


def faults(folder: Path) -> dict[str, Any]:
    """A tier that fails, stops answering, or is closed in the middle of a load."""
    import asyncio

    import dynamo_kvtc.adapters.vllm.worker as worker
    from dynamo_kvtc.errors import TransferError
    from dynamo_kvtc.pipeline.assemble import open_adapter
    from dynamo_kvtc.testing.wrappers import TierWrapper

    mode = {"is": "sound", "gets": 0}

    class Broken(TierWrapper):
        async def get(self, reads: Any, *, timeout_s: float) -> None:
            mode["gets"] += 1
            if mode["is"] == "fails":
                raise TransferError("the tier is broken")
            if mode["is"] == "hangs" and mode["gets"] > 1:
                await asyncio.sleep(3600)
            if mode["is"] == "dies" and mode["gets"] > 1:
                await self.inner.close()
            await self.inner.get(reads, timeout_s=timeout_s)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return open_adapter(*args, **kwargs, wrap_tier=Broken)

    worker.open_adapter = wrapped  # type: ignore[assignment]
    engine = Engine(folder, tiers=HOST, onboard_timeout="2s")
    long = prompts(engine)["long"]
    result: dict[str, Any] = {"sound": engine.generate(long)[0]}
    for kind in ("fails", "hangs", "dies"):
        engine.forget_local()
        mode.update({"is": kind, "gets": 0})
        result[kind] = engine.generate(long)[0]
        mode["is"] = "sound"
        result[f"{kind}_counters"] = engine.counters()["missed_blocks"]
    engine.close()
    return result


def aborted(folder: Path) -> dict[str, Any]:
    """A request that is given up at each step of its load, and around it; then a stuck tier."""
    import asyncio

    import dynamo_kvtc.adapters.vllm.worker as worker
    from dynamo_kvtc.pipeline.assemble import open_adapter
    from dynamo_kvtc.testing.wrappers import TierWrapper

    class Slow(TierWrapper):
        takes_s = 0.01

        async def get(self, reads: Any, *, timeout_s: float) -> None:
            await asyncio.sleep(Slow.takes_s)
            await self.inner.get(reads, timeout_s=timeout_s)

    worker.open_adapter = lambda *args, **kwargs: open_adapter(*args, **kwargs, wrap_tier=Slow)  # type: ignore[assignment]
    engine = Engine(folder, tiers=HOST, onboard_timeout="4s")
    long = prompts(engine)["long"]
    result: dict[str, Any] = {"first": engine.generate(long)[0], "loading": 0}
    core, scheduler = engine.llm.llm_engine, engine.scheduler
    sampling = engine._sampling(temperature=0, max_tokens=4, ignore_eos=True)
    for steps in (0, 1, 2, 3, 5, 8, 13, 21, 34):
        engine.forget_local()
        core.add_request(f"abort {steps}", {"prompt_token_ids": long}, sampling)
        for _ in range(steps):
            core.step()
        result["loading"] += any("REMOTE" in str(one.status) for one in scheduler.requests.values())
        core.abort_request([f"abort {steps}"])
        for _ in range(2000):
            if not scheduler.requests and not scheduler.connector.has_pending_push_work():
                break
            core.step()
        result[f"left {steps}"] = len(scheduler.requests)
    # `forget_local` asserts that no block is held.
    engine.forget_local()
    result["after"] = engine.generate(long)[0]
    side = scheduler.connector._scheduler
    result["tracked"] = len(side._tracked) + len(side._finishing) + len(side._loads)
    result["active"] = engine.adapter.status().onboards_active
    failed = engine.counters()["onboards"]["failed"]
    Slow.takes_s = 3600
    result["stuck"] = []
    for _ in range(6):
        engine.forget_local()
        result["stuck"].append(engine.generate(long)[0])
    result["stuck failed"] = engine.counters()["onboards"]["failed"] - failed
    result["stuck pauses"] = engine.adapter.status().tiers["host0"].pauses
    engine.close()
    return result


def write_adapter(folder: Path, seed: int) -> Path:
    """Write a LoRA adapter of random weights for the demo's model."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    folder.mkdir()
    sizes = {"q_proj": 576, "v_proj": 192}
    tensors = {}
    for layer in range(30):
        for name, size in sizes.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = 0.2 * torch.randn(8, 576)
            tensors[f"{at}.lora_B.weight"] = 0.2 * torch.randn(size, 8)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": list(sizes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def lora(folder: Path) -> dict[str, Any]:
    """Two adapters and none: each is served what it stored itself, and nothing else."""
    from vllm.lora.request import LoRARequest

    paths = [write_adapter(folder / f"adapter-{name}", seed) for seed, name in enumerate("ab", 1)]
    engine = Engine(folder, tiers=HOST, enable_lora=True, max_loras=2, max_lora_rank=8)
    left = prompts(engine)["left"]
    models = {
        "plain": None,
        "a": LoRARequest("a", 1, str(paths[0])),
        "b": LoRARequest("b", 2, str(paths[1])),
    }
    result: dict[str, Any] = {}
    for turn in ("first", "second"):
        for name, adapter in models.items():
            result[f"{name} {turn}"] = engine.generate(left, lora=adapter)[0]
            engine.forget_local()
    engine.close()
    return result


def speculative(folder: Path, drafts: str) -> dict[str, Any]:
    """Drafts from the prompt itself, so that many are accepted and many are not; or none, to compare."""
    ngram = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    engine = Engine(folder, tiers=HOST, **({"speculative_config": ngram} if drafts == "ngram" else {}))
    text = engine.tokens(0, 100)
    prompt = [*text, *text]
    result: dict[str, Any] = {"first": engine.generate(prompt, tokens=150)[0]}
    engine.forget_local()
    # Its own answer is in the tiers too: what is asked now begins with it.
    result["turn"] = engine.generate([*prompt, *result["first"]["ids"]], tokens=40)[0]
    engine.close()
    return result


def costs(folder: Path) -> dict[str, Any]:
    """A tier that is slower than the engine: what is decided once both have been measured."""
    import dynamo_kvtc.adapters.vllm.worker as worker
    from dynamo_kvtc.pipeline.assemble import open_adapter
    from dynamo_kvtc.testing.wrappers import ThrottledTier

    link: list[ThrottledTier] = []

    def slow(tier: Any) -> Any:
        link.append(ThrottledTier(tier, 1e12))
        return link[0]

    worker.open_adapter = lambda *args, **kwargs: open_adapter(*args, **kwargs, wrap_tier=slow)  # type: ignore[assignment]
    engine = Engine(folder, tiers=HOST, decide="measured", onboard_timeout="60s", disable_log_stats=False)
    text = prompts(engine)
    result: dict[str, Any] = {"first": engine.generate(text["left"])[0]}
    result["prefill"] = engine.adapter.status().speeds["prefill"]
    # As fast as memory: a prefix is loaded, which measures reading and decoding.
    engine.forget_local()
    start = time.perf_counter()
    result["fast"] = engine.generate(text["left"])[0]
    result["fast seconds"] = time.perf_counter() - start
    # So slow that recomputing is faster by far, on any machine: one load measures it, then none is promised.
    link[0]._bytes_per_s = 5e5
    for turn in range(6):
        engine.forget_local()
        start = time.perf_counter()
        result[f"slow {turn}"] = engine.generate(text["left"])[0]
        result[f"slow seconds {turn}"] = time.perf_counter() - start
    result["decisions"] = engine.counters()["decisions"]["onboard"]
    result["speeds"] = engine.adapter.status().speeds
    from prometheus_client import generate_latest

    engine.settle()
    names = ("vllm:kvtc_prefill_tokens_per_second", "vllm:kvtc_decisions_total")
    result["port"] = [line for line in generate_latest().decode().splitlines() if line.startswith(names)]
    engine.close()
    return result


def crowded(folder: Path) -> dict[str, Any]:
    """More requests than the cache has room for."""
    engine = Engine(folder, tiers=HOST, num_gpu_blocks_override=24, max_model_len=640)
    texts = crowd(engine)
    result: dict[str, Any] = {"crowd": engine.generate(*texts, tokens=80), "preemptions": engine.preemptions}
    engine.forget_local()
    result["again"] = [engine.generate(ids, tokens=2)[0] for ids in texts]
    result["counters"] = engine.counters()
    engine.close()
    return result


def compressed(folder: Path, artifact: str) -> dict[str, Any]:
    """Next-token distributions behind a prefix as vLLM computed it and as the tier gave it back."""
    engine = Engine(
        folder,
        tiers=HOST,
        codec="{profile: rd, ratio: 20}",
        artifact=f"artifact: {artifact}\n",
        dtype="bfloat16",
    )
    prefix = engine.tokens(0, 512)
    tails = [engine.tokens(1000 + 100 * index, 12 + 8 * index) for index in range(6)]
    sampling = engine._sampling(temperature=0, max_tokens=1, logprobs=20)

    def ask() -> tuple[list[dict[int, float]], list[int]]:
        tops, cached = [], []
        for tail in tails:
            output = engine.llm.generate([{"prompt_token_ids": [*prefix, *tail]}], sampling, use_tqdm=False)[
                0
            ]
            tops.append({token: one.logprob for token, one in output.outputs[0].logprobs[0].items()})
            cached.append(output.num_cached_tokens)
        return tops, cached

    exact, _ = ask()
    engine.forget_local()
    lossy, cached = ask()
    divergences = [
        sum(math.exp(p) * (p - there[token]) for token, p in here.items() if token in there)
        for here, there in zip(exact, lossy, strict=True)
    ]
    result = {
        "cached": cached,
        "divergence": sum(divergences) / len(divergences),
        "same_first": sum(
            max(a, key=a.__getitem__) == max(b, key=b.__getitem__) for a, b in zip(exact, lossy, strict=True)
        ),
        "counters": engine.counters(),
    }
    engine.close()
    return result


if __name__ == "__main__":
    outcome = globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
    print("\n" + json.dumps(outcome))
