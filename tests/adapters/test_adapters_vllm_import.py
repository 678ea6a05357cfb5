"""Without vLLM its adapter says what is missing; with it, tests/engines has the tests."""

import importlib
import importlib.util

import pytest

from dynamo_kvtc.errors import MissingDependencyError


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="needs an environment without vLLM")
def test_importing_the_adapter_without_vllm_names_the_extra() -> None:
    with pytest.raises(MissingDependencyError, match=r"dynamo-kvtc\[vllm\]"):
        importlib.import_module("dynamo_kvtc.adapters.vllm")
