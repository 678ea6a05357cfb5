"""Writes golden streams that do not exist yet: ``python tests/golden/make.py``.

``<parameters>.json`` holds codec parameters (arrays as base64 of little-endian float16),
``<parameters>.<case>.kvtc`` a stream made with them, and ``<parameters>.<case>.npz`` what the specification's
decoder made of it: ``keys`` and ``values``, float32 ``[token][layer][head][channel]``, not rounded to the
cache's dtype.

Existing files are never overwritten: a stream that was written once must decode for as long as its version
is supported. A change of format adds cases under new names.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "codec")]

import spec_decoder  # noqa: E402
from golden_files import GOLDEN, from_json, parameter_file, plan, to_json  # noqa: E402
from synthetic import make_block, make_parameters, make_rd_parameters  # noqa: E402

from dynamo_kvtc.codec.base import KvCodec  # noqa: E402
from dynamo_kvtc.codec.entropy import DeflateCoder, RansCoder  # noqa: E402
from dynamo_kvtc.codec.geometry import KvGeometry  # noqa: E402
from dynamo_kvtc.codec.open import open_codec  # noqa: E402
from dynamo_kvtc.codec.parameters import AnyParameters, GroupParameters, SideParameters  # noqa: E402
from dynamo_kvtc.codec.raw import RawCodec  # noqa: E402
from dynamo_kvtc.codec.rope import RopeParameters  # noqa: E402

MIXED = plan(
    (0, 1, "FP8"), (1, 1, "INT4"), (2, 16, "FP8"), (18, 16, "INT4"), (36, 16, "INT2"), (60, 1, "INT2")
)
WIDE = plan((0, 64, "INT4"))
SMALL = plan((0, 1, "FP8"), (1, 1, "INT2"), (3, 16, "INT4"))
EMPTY = plan()

#: Geometry, layer groups, RoPE, and (plan of keys, plan of values) by plan id.
PARAMETERS = {
    "gqa": (
        KvGeometry(4, 2, 8, "bfloat16"),
        1,
        RopeParameters(10_000.0, 8),
        {1: (MIXED, WIDE), 2: (WIDE, MIXED)},
    ),
    "groups": (
        KvGeometry(5, 2, 6, "float16"),
        2,
        RopeParameters(500_000.0, 4, scaling="llama3", factor=8.0, original_max_position_embeddings=64),
        {7: (SMALL, SMALL), 9: (EMPTY, SMALL)},
    ),
    "yarn": (
        KvGeometry(3, 1, 8, "float32"),
        1,
        RopeParameters(
            10_000.0, 8, style="interleaved", scaling="yarn", factor=4.0, original_max_position_embeddings=128
        ),
        {1: (SMALL, SMALL)},
    ),
    "linear": (
        KvGeometry(2, 3, 4, "bfloat16"),
        2,
        RopeParameters(10_000.0, 4, scaling="linear", factor=2.0),
        {1: (plan((0, 1, "INT4")), plan((1, 1, "FP8")))},
    ),
}

#: Geometry, layer groups and steps by plan of the parameters of profile rd.
RD_PARAMETERS = {
    "rd-gqa": (KvGeometry(4, 2, 8, "bfloat16"), 1, (0.02, 2.0)),
    "rd-groups": (KvGeometry(3, 1, 6, "float16"), 2, (0.25,)),
    "rd-tiny": (KvGeometry(1, 1, 2, "float32"), 1, (0.5, 1e9)),
}

#: Plan id (None for profile raw), tokens, first position, sink tokens, sink bits.
CASES = {
    "gqa.plan1": (1, 32, 64, 0, 8),
    "gqa.plan2-sinks8": (2, 13, 0, 4, 8),
    "gqa.one-token": (1, 1, 1_000_000, 0, 8),
    "gqa.raw": (None, 9, 0, 4, 16),
    "groups.plan7": (7, 31, 128, 0, 8),
    "groups.plan9-sinks16": (9, 6, 0, 4, 16),
    "groups.plan7-sinks8": (7, 7, 0, 1, 8),
    "groups.raw-deflate": (None, 40, 3, 0, 16),
    "yarn.far": (1, 17, 4_096, 0, 8),
    "yarn.sinks16": (1, 5, 0, 4, 16),
    "yarn.raw": (None, 2, 7, 0, 16),
    "gqa.raw-as-artifact": (None, 12, 32, 0, 16),
    "linear.only-sinks": (1, 4, 0, 4, 8),
    "linear.plan1": (1, 10, 20, 0, 8),
    "rd-gqa.plan1": (1, 33, 64, 0, 8),
    "rd-gqa.plan2-sinks8": (2, 16, 0, 4, 8),
    "rd-gqa.only-sinks": (2, 4, 0, 4, 16),
    "rd-groups.plan1": (1, 12, 128, 0, 8),
    "rd-tiny.one-token": (1, 1, 1_000_000, 0, 8),
    "rd-tiny.plan2-sinks8": (2, 7, 0, 1, 8),
    "groups.raw-rans": (None, 41, 3, 0, 16),
    "rd-groups.plan1-rans": (1, 301, 0, 4, 8),
}


def codec_parameters(name: str) -> AnyParameters:
    if name in RD_PARAMETERS:
        return rd_parameters(name)
    geometry, groups, rope, plans = PARAMETERS[name]
    parameters = make_parameters(geometry, groups=groups, rope=rope, ratios=(1.0,), seed=len(name))
    generator = torch.Generator().manual_seed(1)

    def side(row: int, index: int) -> SideParameters:
        own = {plan_id: pair[index] for plan_id, pair in plans.items()}
        rank = max(each.rank for each in own.values())
        basis = torch.linalg.qr(torch.randn(row, row, generator=generator))[0][:rank]
        return SideParameters(
            (3 * torch.randn(row, generator=generator)).half().float(), basis.half().float(), own
        )

    made = []
    for group in parameters.groups:
        row = group.layers.count * geometry.layer_size
        made.append(GroupParameters(group.layers, side(row, 0), side(row, 1)))
    ratios = {plan_id: float(plan_id) for plan_id in plans}
    artifact_id = name.encode().ljust(32, b".")
    return replace(parameters, groups=tuple(made), ratios=ratios, artifact_id=artifact_id)


def rd_parameters(name: str) -> AnyParameters:
    geometry, groups, steps = RD_PARAMETERS[name]
    artifact_id = name.encode().ljust(32, b".")
    return replace(make_rd_parameters(geometry, groups=groups, steps=steps), artifact_id=artifact_id)


def codec_for(case: str, parameters: AnyParameters) -> KvCodec:
    plan_id, _, _, _, sink_bits = CASES[case]
    if plan_id is None:
        coder = DeflateCoder() if case.endswith("deflate") else RansCoder() if case.endswith("rans") else None
        layer_groups = [group.layers for group in parameters.groups] if "as-artifact" in case else None
        return RawCodec(parameters.geometry, parameters.artifact_id, coder, layer_groups)
    return open_codec(
        parameters,
        ratio=parameters.ratios[plan_id],
        sink_bits=sink_bits,
        compute_dtype="float32",
        threads=1,
        coder=RansCoder() if case.endswith("rans") else None,
    )


def main() -> None:
    for name in (*PARAMETERS, *RD_PARAMETERS):
        path = parameter_file(name)
        if not path.exists():
            path.write_text(to_json(codec_parameters(name)))
    for case, (_, tokens, position, sinks, _) in CASES.items():
        path = GOLDEN / f"{case}.kvtc"
        if path.exists():
            continue
        parameters = from_json(parameter_file(case).read_text())
        block = make_block(parameters, tokens, first_position=position, sink_tokens=sinks, seed=len(case))
        if case.endswith(("raw-deflate", "raw-rans")):
            # Two bits of each number, so that coders have something to do.
            block = replace(block, keys=block.keys.sign(), values=block.values.sign())
        (stream,) = codec_for(case, parameters).encode(
            [replace(block, binding=case.encode().ljust(32, b"-"))]
        )
        path.write_bytes(stream)
        _, kv = spec_decoder.decode(stream, spec_decoder.load_parameters(parameter_file(case)))
        arrays = {side: np.array(kv[side], np.float32).reshape(block.keys.shape) for side in kv}
        np.savez_compressed(path.with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    main()
