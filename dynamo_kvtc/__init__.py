"""dynamo_kvtc: a compressed tier for the KV cache of LLM clusters that run NVIDIA Dynamo.

The data's way: block -> coefficients -> symbols -> bytes -> tier -> bytes -> coefficients -> layer.
Each sub-package is a room with one task; its docstring says what it owns and does not own.
"""

__version__ = "0.1.0"
