"""Quality of compressed KV against its bytes: tasks, codecs and models under one set of rules.

The rules, the same for every codec:

- A document is a context and the probes behind it. The model computes the context's KV once; every codec
  gets the same KV, keys with RoPE applied, positions from 0.
- The last `RECENT_WINDOW` tokens of a context are the recent window. They stay as they are and are outside
  both sides of the ratio. Everything a probe asks for lies before them.
- A codec returns what it decodes and the bytes it stored: ``ratio = 16-bit bytes of the tokens handed over /
  stored bytes``. Every byte counts: headers, chunk tables, padding, scales, zero points, norms, side data,
  and the `SINK_TOKENS` leading tokens, which a codec may keep as it likes. What no object carries (an
  artifact, a fixed rotation, a code book) does not count, since it does not grow with what is stored.
- Probes run behind the decoded cache and behind the uncompressed one, teacher-forced: a run over the probe's
  tokens and its answer gives the prediction before each token of the answer. An answer is right where each
  of its tokens is the most likely one, which is what greedy decoding would have produced.
- Scores are kept for each document. Intervals are 95 % bootstrap intervals over documents, and a change
  against the uncompressed cache is taken document by document before it is resampled.
- Models and caches are in float32: in bfloat16 rounding alone moves predictions by a divergence of about
  .0016, more than the differences to be seen here.

Owns the tasks, the baseline codecs, the models and the reports. The codecs under test, the comparison of
predictions and the intervals are the package's own (`dynamo_kvtc.codec`, `dynamo_kvtc.evaluation`).
"""

from __future__ import annotations

__all__ = ["RECENT_WINDOW", "SINK_TOKENS"]

#: Last tokens of a context that are never stored.
RECENT_WINDOW = 128

#: Leading tokens of a context that codecs may keep at high precision.
SINK_TOKENS = 4
