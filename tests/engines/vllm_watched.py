"""A worker of vLLM as its operator sees it: ``vllm_watched.py FOLDER``, in a process of its own.

Prints one JSON object: what `dynamo-kvtc status` and `top` showed, what our endpoint and
vLLM's registry said.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from vllm_scenarios import DISK, HOST, Engine, prompts

from benchmarks.local_dynamo.processes import free_port


def watched(folder: Path) -> dict[str, Any]:
    """Serve, forget, serve from the tiers, while the commands look on."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    os.environ["DYNAMO_KVTC__OBSERVABILITY__METRICS_PORT"] = str(port)
    engine = Engine(folder, tiers=HOST + DISK, disable_log_stats=False)
    text = prompts(engine)
    command = [sys.executable, "-m", "dynamo_kvtc"]
    look = [*command, "top", "--url", url, "--interval", "1"]
    top = subprocess.Popen([*look, "--json"], stdout=subprocess.PIPE, text=True)
    try:
        # The first line is for the second before the engine has anything to do.
        assert top.stdout is not None
        lines = [top.stdout.readline()]
        engine.generate(text["long"])
        engine.forget_local()
        engine.generate(text["turn"])
        engine.settle()
        until = time.monotonic() + 3
        while time.monotonic() < until:  # the newest status is told with a later step
            engine.llm.llm_engine.step()
            time.sleep(0.1)
    finally:
        top.terminate()
        rest, _ = top.communicate(timeout=30)
    lines += rest.splitlines()
    from prometheus_client import generate_latest

    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        own = answer.read().decode()

    def run(*arguments: str) -> str:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    result = {
        "own": own,
        "host": generate_latest().decode(),
        "status": run(*command, "status", "--url", url),
        "json": json.loads(run(*command, "status", "--url", url, "--json")),
        "top": run(*look, "--count", "1"),
        "lines": [json.loads(line) for line in lines if line.strip()],
    }
    engine.close()
    return result


if __name__ == "__main__":
    print("\n" + json.dumps(watched(Path(sys.argv[1]))))
