"""Section 7 of docs/bitstream.md, profile rd, for `spec_decoder`: plain Python, slow, exact."""

from __future__ import annotations

import struct

from spec_error import require

LIMITS = (32767, 127, 7, 1)


def row_sizes(n: int) -> tuple[int, ...]:
    return 2 * n, n, (n + 1) // 2, (n + 4) // 5


def bounds(plan: dict, n: int) -> tuple[int, int]:
    """Section 7.2: least and most bytes of a payload."""
    least = (
        4 + (n + 1) // 2 + sum(count * size for count, size in zip(plan["counts"], row_sizes(n), strict=True))
    )
    return least, least + 6 * most_escapes(plan, n)


def most_escapes(plan: dict, n: int) -> int:
    return min(8192, 32 * n, n * sum(plan["counts"][1:]), (65536 - 4 - (n + 1) // 2) // 6)


def digits(data: bytes, n: int, per_byte: int, base: int) -> list[int]:
    require(all(byte < base**per_byte for byte in data), "PayloadError")
    found = [byte // base**place % base for byte in data for place in range(per_byte)]
    require(not any(found[n:]), "ReservedBitsError")
    return found[:n]


def signed(number: int, base: int) -> int:
    return number - base if 2 * number >= base else number


def read_rows(payload: bytes, plan: dict, n: int) -> dict[int, list[float]]:
    """Sections 7.2 and 7.3: {component: decoded coefficient of each coded token}."""
    least, most = bounds(plan, n)
    require(least <= len(payload) <= most, "ChunkTableError")
    (count,) = struct.unpack_from("<I", payload)
    require(len(payload) == least + 6 * count, "ChunkTableError")
    at = 4 + (n + 1) // 2
    levels = [digit - 5 for digit in digits(payload[4:at], n, 2, 16)]
    side, at = payload[at : at + 6 * count], at + 6 * count
    rows: list[list[int]] = []
    classes: list[int] = []
    for kind, components in enumerate(plan["counts"]):
        size = row_sizes(n)[kind]
        for row in range(components):
            if kind == 0:
                high = payload[at + row * n : at + (row + 1) * n]
                low = payload[at + (components + row) * n : at + (components + row + 1) * n]
                numbers = [
                    signed((256 * h + signed(b, 256)) % 65536, 65536) for h, b in zip(high, low, strict=True)
                ]
            else:
                per_byte, base = {1: (1, 256), 2: (2, 16), 3: (5, 3)}[kind]
                data = payload[at + row * size : at + (row + 1) * size]
                numbers = [signed(digit, base) for digit in digits(data, n, per_byte, base)]
            require(all(number >= -LIMITS[kind] for number in numbers), "PayloadError")
            rows.append(numbers)
            classes.append(kind)
        at += components * size
    restore(rows, classes, side, count, n)
    offsets = plan["offsets"]
    coefficients = {}
    for r, (component, numbers) in enumerate(zip(plan["components"], rows, strict=True)):
        coefficients[component] = []
        for q, level in zip(numbers, levels, strict=True):
            offset = offsets[r] if abs(q) == 1 else offsets[len(rows) + r]
            magnitude = (abs(q) + offset) * plan["step"] / 2 ** (level / 2)
            coefficients[component].append(0.0 if q == 0 else magnitude if q > 0 else -magnitude)
    return coefficients


def restore(rows: list[list[int]], classes: list[int], side: bytes, count: int, n: int) -> None:
    """Section 7.2: put escapes in the place of their clamped symbols."""
    index = -1
    for e in range(count):
        gap = side[e] + (side[2 * count + e] << 8) + (side[3 * count + e] << 16) + (side[4 * count + e] << 24)
        z = side[count + e] + (side[5 * count + e] << 8)
        q = z // 2 if z % 2 == 0 else -(z + 1) // 2
        index += gap + 1
        require(index < len(rows) * n, "PayloadError")
        row, token = divmod(index, n)
        limit = LIMITS[classes[row]]
        require(limit < abs(q) <= 32767, "PayloadError")
        require(rows[row][token] == (limit if q > 0 else -limit), "PayloadError")
        rows[row][token] = q


def reconstruct(coefficients: dict[int, list[float]], side: dict, n: int) -> list[list[float]]:
    """Section 7.4: rows of the coded tokens."""
    mean, basis, size = side["mean"], side["basis"], side["head_size"]
    width = len(mean)
    rows = [list(mean) for _ in range(n)]
    for component, numbers in coefficients.items():
        vector = basis[component * width : (component + 1) * width]
        turned = []
        for start in range(0, width, size):
            inverse = side["inverse"][start // size]
            turned += [sum(vector[start + c] * inverse[c][j] for c in range(size)) for j in range(size)]
        for row, number in zip(rows, numbers, strict=True):
            for j in range(width):
                row[j] += number * turned[j]
    return rows


def invert(matrix: list[list[float]]) -> list[list[float]]:
    """Gauss-Jordan elimination; the matrix is positive definite, so its pivots are positive."""
    size = len(matrix)
    work = [[*row, *(float(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for i in range(size):
        pivot = work[i][i]
        work[i] = [number / pivot for number in work[i]]
        for j in range(size):
            if j != i:
                factor = work[j][i]
                work[j] = [a - factor * b for a, b in zip(work[j], work[i], strict=True)]
    return [row[size:] for row in work]
