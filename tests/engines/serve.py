"""Runs vLLM in a process of its own: reads requests from standard input, writes what it answers.

Input, one JSON object: ``model``, ``connector`` (or null), ``prompts`` (lists of token ids), ``rounds``,
``tokens``. Output, a line of its own: per round and prompt the generated token ids, their log-probabilities
and the number of prompt tokens that were served from a cache; and the counters of the compressed tier.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    asked = json.load(sys.stdin)
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    options: dict[str, Any] = {}
    if asked["connector"] is not None:
        options["kv_transfer_config"] = KVTransferConfig(**asked["connector"])
    llm = LLM(
        model=asked["model"],
        dtype=asked.get("dtype", "float32"),
        max_model_len=2048,
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=asked.get("prefix_caching", True),
        disable_log_stats=False,
        **options,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=asked["tokens"], logprobs=0)
    rounds = []
    for number in range(asked["rounds"]):
        if number and not llm.reset_prefix_cache():
            raise RuntimeError("vLLM's own prefix cache could not be reset")
        prompts = [
            {"prompt_token_ids": ids, **({"cache_salt": asked["salt"]} if asked.get("salt") else {})}
            for ids in asked["prompts"]
        ]
        answers = []
        for prompt in prompts:
            (output,) = llm.generate([prompt], sampling, use_tqdm=False)
            completion = output.outputs[0]
            answers.append(
                {
                    "tokens": list(completion.token_ids),
                    "logprobs": [
                        step[token].logprob
                        for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
                    ],
                    "cached": output.num_cached_tokens,
                }
            )
        rounds.append(answers)
    counters = {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if "kvtc" in metric.name and not getattr(metric, "labels", {}).get("reason")
    }
    print("\n" + json.dumps({"rounds": rounds, "metrics": counters}), flush=True)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
