"""Hugging Face transformers as a host: a small engine with a paged G1 cache, for the demo and the tests.

Owns: the paged cache's blocks and block tables, prefill and greedy decoding of one sequence at a time.
Does not own: batching, scheduling or anything else a serving engine is for.
"""

from dynamo_kvtc.adapters.hf.engine import HfEngine, HfSession
from dynamo_kvtc.adapters.hf.hashing import sequence_hashes

__all__ = ["HfEngine", "HfSession", "sequence_hashes"]
