"""Our `DynamoConnector` in the real engine; `kvbm_stand_in` says what stands in for KVBM's Rust, and why."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make engine has an environment with it")
pytest.importorskip("kvbm", reason="kvbm is not installed: make engine has an environment with it")

import kvbm_stand_in
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

from dynamo_kvtc.adapters.vllm import worker as worker_module
from dynamo_kvtc.calibration.models import BUILTIN_SMOLLM2, resolve_model
from dynamo_kvtc.data import HELDOUT_TEXTS

pytestmark = pytest.mark.filterwarnings("ignore")

#: Tokens: of a block of vLLM's, of the prompt, and of those that whole tier blocks of 256 hold.
BLOCK, PROMPT, WHOLE = 128, 1400, 1280

#: Tokens with their log-probabilities.
Answer = list[tuple[int, float]]


@dataclass
class Served:
    """An engine with both connectors, which has seen the prompt once, and what a plain engine answers.

    Attributes
    ----------
    computed, cached : list of (int, float)
        Answers to the prompt, computed as a whole, and from its first `WHOLE` tokens on: where vLLM goes on
        from counts for the last bits.
    tier : Path
        Our disk tier.
    hot : dict
        The prompt's blocks in KVBM's pool.
    """

    llm: LLM
    pool: kvbm_stand_in.HostPool
    tokens: list[int]
    computed: Answer
    cached: Answer
    tier: Path
    hot: dict[bytes, Any]

    def ask(self, **prompt: Any) -> tuple[Answer, int]:
        return ask(self.llm, self.tokens, **prompt)

    def forget(self, hot_blocks: int) -> None:
        """Empty vLLM's own cache; leave the first blocks of the prompt in KVBM's pool."""
        settle(self.llm)
        self.pool.stored = OrderedDict(list(self.hot.items())[:hot_blocks])
        self.pool.matched_tokens = 0


def start(transfer: KVTransferConfig | None = None) -> LLM:
    return LLM(
        model=str(resolve_model(BUILTIN_SMOLLM2)),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=4,
        block_size=BLOCK,
        distributed_executor_backend="uni",
        kv_transfer_config=transfer,
    )


def prompt_tokens() -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(BUILTIN_SMOLLM2))
    text = HELDOUT_TEXTS[0].read_text(encoding="utf-8")[:20_000]
    return list(tokenizer(text)["input_ids"][:PROMPT])


def ask(llm: LLM, tokens: list[int], **prompt: Any) -> tuple[Answer, int]:
    """Return the greedy answer, and how many tokens of the prompt were not computed."""
    sampling = SamplingParams(temperature=0, max_tokens=12, logprobs=0)
    (output,) = llm.generate({"prompt_token_ids": tokens, **prompt}, sampling, use_tqdm=False)
    steps: Any = output.outputs[0].logprobs
    ids = output.outputs[0].token_ids
    answer = [(token, step[token].logprob) for token, step in zip(ids, steps, strict=True)]
    return answer, output.num_cached_tokens or 0


def settle(llm: LLM) -> None:
    """Step until vLLM's cache can be emptied: blocks of finished requests are held until both report them."""
    for _ in range(2000):
        llm.llm_engine.step()
        if llm.reset_prefix_cache():
            return
    raise AssertionError("blocks of finished requests are never given back")


def same(answer: Answer, expected: Answer) -> bool:
    """Tell whether answers are the same but for the last bits."""
    return [token for token, _ in answer] == [token for token, _ in expected] and all(
        abs(found - wanted) < 2e-4 for (_, found), (_, wanted) in zip(answer, expected, strict=True)
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("kvbm")
    config = folder / "kvtc.yaml"
    tiers = [{"kind": "disk", "path": str(folder / "tier"), "capacity": "1GiB"}]
    policy = {"recent_window": 0, "minimum_tokens": 0, "decide": "always"}  # tokens are counted
    config.write_text(json.dumps({"codec": {"profile": "raw"}, "tiers": tiers, "policy": policy}))
    transfer = KVTransferConfig(
        kv_connector="DynamoConnector",
        kv_connector_module_path="dynamo_kvtc.adapters.kvbm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"config": str(config)},
    )
    tokens = prompt_tokens()
    with pytest.MonkeyPatch.context() as patch:
        # Scheduler and worker in this process, so that they share the stand-ins.
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("DYN_KVBM_CPU_CACHE_GB", "0.1")
        plain = start()
        computed, _ = ask(plain, tokens)
        cached, count = ask(plain, tokens)
        assert count == WHOLE
        plain.llm_engine.engine_core.shutdown()
        pool = kvbm_stand_in.install(patch, blocks=64)
        llm = start(transfer)
        assert ask(llm, tokens) == (computed, 0)
        assert len(pool.stored) == PROMPT // BLOCK
        yield Served(llm, pool, tokens, computed, cached, folder / "tier", dict(pool.stored))
        llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("hot", [0, 1, 3, 7, 10])
def test_kvbm_serves_what_it_has_and_our_tiers_what_follows(served: Served, hot: int) -> None:
    served.forget(hot_blocks=hot)
    assert served.ask() == (served.cached, WHOLE)
    assert served.pool.matched_tokens == hot * BLOCK


def test_steps_that_only_wait_for_our_loads_are_held_back(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here as in our own connector: the worker's side is the same, and sees what the step is."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        time.sleep(seconds)

    stand_in = SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
    served.forget(hot_blocks=0)
    monkeypatch.setattr(worker_module, "time", stand_in)
    assert served.ask() == (served.cached, WHOLE)
    assert slept and set(slept) == {0.002}
    # Served from vLLM's own cache now: no step waits.
    slept.clear()
    served.ask()
    assert slept == []


def test_a_salted_request_meets_nobody_elses_blocks(served: Served) -> None:
    served.forget(hot_blocks=64)
    answer, count = served.ask(cache_salt="tenant")
    assert (same(answer, served.computed), count, served.pool.matched_tokens) == (True, 0, 0)


def test_nothing_is_held_after_an_abort_at_any_moment(served: Served) -> None:
    engine = served.llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=4)
    for hot in (0, 3):
        for steps in range(10):
            served.forget(hot_blocks=hot)
            engine.add_request(f"{hot}-{steps}", {"prompt_token_ids": served.tokens}, sampling)
            for _ in range(steps):
                engine.step()
            engine.abort_request([f"{hot}-{steps}"])
            settle(served.llm)
    assert same(served.ask()[0], served.computed)


def test_what_our_tier_has_lost_is_computed(served: Served) -> None:
    served.forget(hot_blocks=3)
    for path in served.tier.glob("segment-*"):
        with path.open("r+b") as file:
            for offset in range(4096, path.stat().st_size, 65_536):
                file.seek(offset)
                file.write(b"damage")
    answer, _ = served.ask()
    assert same(answer, served.computed)
    served.forget(hot_blocks=0)
    assert same(served.ask()[0], served.computed)
