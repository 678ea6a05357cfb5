"""What an artifact costs and saves, measured: quality on held-out text, and speed on this machine.

Owns the evaluation protocol, the comparison of decoded rows, the attribution of stored bytes,
the measurements behind ``evaluate``, ``bench`` and the scripts in ``benchmarks/``. Does not own how anything
is encoded, stored or served: it only calls the other rooms, as a user would.
"""

from __future__ import annotations

from dynamo_kvtc.evaluation.codecs import PROFILES, CodecUnderTest, codecs_under_test
from dynamo_kvtc.evaluation.protocol import EvaluationProtocol
from dynamo_kvtc.evaluation.report import EvaluationReport, EvaluationRow
from dynamo_kvtc.evaluation.run import evaluate, evaluate_codecs

__all__ = [
    "PROFILES",
    "CodecUnderTest",
    "EvaluationProtocol",
    "EvaluationReport",
    "EvaluationRow",
    "codecs_under_test",
    "evaluate",
    "evaluate_codecs",
]
