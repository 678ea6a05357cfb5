"""What the GPU codec should take, from operations, bytes and a data sheet: a prediction to be proved wrong.

python benchmarks/gpu_prediction.py
"""

from __future__ import annotations

from dataclasses import dataclass

#: NVIDIA H100 SXM and H200, data sheets: bf16 tensor cores without sparsity, and memory.
DEVICES = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}

#: Share of the peaks that good kernels reach.
PRODUCT_SHARE, COPY_SHARE = 0.6, 0.8

#: Raw KV per second while DEFLATE is read and written, from KVTC's published times on an H100 (10.7 GB in 64
#: and 137 ms at nominal 16x).
INFLATE, DEFLATE = 10.7e9 / 0.064, 10.7e9 / 0.137

#: Components stored per element of a row, and plain bytes (before DEFLATE) per raw byte: the demo's model
#: with rd at 20x, keys and values together.
STORED_SHARE, PLAIN_SHARE = 0.33, 0.1

#: Largest row that one basis spans with rd, in elements.
WIDEST_ROW = 8192


@dataclass(frozen=True)
class Shape:
    """A model's KV cache on one GPU."""

    name: str
    layers: int
    kv_heads: int
    head_size: int

    @property
    def row(self) -> int:
        """Elements of one side of a token."""
        return self.layers * self.kv_heads * self.head_size

    @property
    def group_row(self) -> int:
        """Elements of one side of a layer group."""
        per_layer = self.kv_heads * self.head_size
        return max(1, WIDEST_ROW // per_layer) * per_layer


SHAPES = (
    Shape("Llama-3.1-8B", 32, 8, 128),
    Shape("Mistral-NeMo-12B", 40, 8, 128),
    Shape("Qwen3-32B", 64, 8, 128),
    Shape("Llama-3.3-70B, one TP8 rank", 80, 1, 128),
)


def predict(shape: Shape, flops: float, bandwidth: float) -> dict[str, float]:
    """Return nanoseconds a token of each stage of decoding and encoding, and raw GB/s of both."""
    raw_bytes = 2 * shape.row * 2
    groups = max(1.0, shape.row / shape.group_row)
    width = min(shape.row, shape.group_row)
    product = 2 * (2 * groups * STORED_SHARE * width * width) / (PRODUCT_SHARE * flops)
    coefficients = 2 * shape.row * STORED_SHARE * 2
    copy = COPY_SHARE * bandwidth
    stages = {
        "inflate": raw_bytes / INFLATE,
        "unpack and dequantise": (PLAIN_SHARE * raw_bytes + coefficients) / copy,
        "inverse product and scatter": max(product, (coefficients + raw_bytes) / copy),
        "gather": 3 * raw_bytes / copy,  # read as bfloat16, written as centred rows
        "product, quantise and pack": max(product, (raw_bytes + PLAIN_SHARE * raw_bytes) / copy),
        "deflate": raw_bytes / DEFLATE,
    }
    names = list(stages)
    decode, encode = (sum(stages[name] for name in part) for part in (names[:3], names[3:]))
    rates = {"decode GB/s": raw_bytes / decode / 1e9, "encode GB/s": raw_bytes / encode / 1e9}
    return {**{name: seconds * 1e9 for name, seconds in stages.items()}, **rates}


def main() -> None:
    for device, (flops, bandwidth) in DEVICES.items():
        columns = [predict(shape, flops, bandwidth) for shape in SHAPES]
        print(f"| {device}, predicted, ns a token | {' | '.join(shape.name for shape in SHAPES)} |")
        print("|---|" + "---|" * len(SHAPES))
        for name in columns[0]:
            print(f"| {name} | {' | '.join(f'{column[name]:,.0f}' for column in columns)} |")
        print()


if __name__ == "__main__":
    main()
