"""Tile choices of the Triton kernels: pure functions of shapes, dtype and architecture. No sweep at a user's first
call.

Each function returns the constexpr arguments and launch options (num_warps, num_stages) of one kernel; ``variants``
says what it does beyond its plain form.
"""

import contextlib
import threading
from collections.abc import Iterator

__all__ = [
    "FASTER",
    "FASTER_FROM",
    "GEMV_ROWS",
    "OFFERED",
    "PROCESSORS",
    "SHARED_MEMORY",
    "attention",
    "attention_backward_keys",
    "attention_backward_queries",
    "cdiv",
    "cross_entropy",
    "cross_entropy_columns",
    "cross_entropy_rows",
    "decode_attention",
    "decoding",
    "elementwise",
    "gemv_dot",
    "gemv_fma",
    "int8_matmul",
    "next_power_of_2",
    "quantize_rows",
    "quantized_linear_route",
    "rope",
    "trying",
    "variants",
    "whole_rows",
]

PROCESSORS = {
    "sm_80": 108,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
}  # of the largest chip of each

# Bytes of shared memory that one thread block may use.
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
}

GEMV_ROWS = 16  # up to so many rows a linear layer is bound by reading its weight; one tile of the tensor cores has 16

PARTIAL_SUMS = 256  # programs that each sum a part of a weight's gradient: two per multiprocessor of large GPUs

# What kernels can do beyond their plain form, and where the audit finds that sound (Triton 3.9 and 3.6 fail to
# specialise the warps of attention).
# DESCRIPTORS: tiles are copied by tensor descriptors (TMA). PERSISTENT: one program a processor works through all
# tiles.
# WARP_SPECIALIZE: some warps copy while others multiply. DEPENDENT_LAUNCH: a kernel is launched while the one before it
# still runs, and waits for its results itself (programmatic dependent launch); "decoding" are the kernels of a decoding
# step.
OFFERED = {
    "attention": {"DESCRIPTORS": ("sm_90", "sm_100")},
    "int8_matmul": {
        "DESCRIPTORS": ("sm_90", "sm_100"),
        "PERSISTENT": ("sm_90", "sm_100", "sm_120"),
        "WARP_SPECIALIZE": ("sm_100",),
    },
    "decoding": {"DEPENDENT_LAUNCH": ("sm_90", "sm_100", "sm_120")},
}

# (kernel, architecture) -> variants that a device has shown to be faster there than the plain form (make bench-gpu
# measures both).
FASTER: dict[tuple[str, str], tuple[str, ...]] = {
    ("attention", "sm_90"): ("DESCRIPTORS",),
    ("decoding", "sm_90"): ("DEPENDENT_LAUNCH",),
}

# Rows of a call from which on: a descriptor costs the host 5 us, more than it saves the device before.
FASTER_FROM = {"attention": 2048}

_tried: dict[str, tuple[str, ...]] = {}
_thread = threading.local()


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Inside the block kernels are steps of decoding: one after the other in this thread, over weights that none of
    them writes. That is what the variants of "decoding" need; elsewhere they are off.

    Example:
        >>> with tuning.decoding():
        ...     tuning.variants("decoding", "sm_90")
        {'DEPENDENT_LAUNCH': True}
    """
    before = getattr(_thread, "decoding", False)
    _thread.decoding = True
    try:
        yield
    finally:
        _thread.decoding = before


@contextlib.contextmanager
def trying(kernel: str, *names: str) -> Iterator[None]:
    """Inside the block, ``kernel`` runs with these variants of OFFERED where its architecture has them, and no others.

    Example:
        >>> with tuning.trying("attention", "DESCRIPTORS"):
        ...     tuning.variants("attention", "sm_90")
        {'DESCRIPTORS': True}
    """
    unknown = set(names) - set(OFFERED[kernel])
    if unknown:
        raise ValueError(f"{kernel} has no variants {sorted(unknown)}; choose from {sorted(OFFERED[kernel])}")
    previous = _tried.get(kernel)
    _tried[kernel] = names
    try:
        yield
    finally:
        del _tried[kernel]
        if previous is not None:
            _tried[kernel] = previous


def variants(kernel: str, arch: str, rows: int | None = None) -> dict[str, bool]:
    """Constexpr arguments: which of its variants ``kernel`` uses for so many rows (None: many)."""
    on = _tried.get(kernel)
    if on is None:
        enough = rows is None or rows >= FASTER_FROM.get(kernel, 0)
        on = (
            FASTER.get((kernel, arch), ())
            if enough and (kernel != "decoding" or getattr(_thread, "decoding", False))
            else ()
        )
    return {name: name in on and arch in where for name, where in OFFERED[kernel].items()}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes the host 3 us."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def elementwise(size: int) -> dict:
    """Independent elements of rows of ``size``: 8 elements a thread, 16-byte loads of 16-bit data."""
    block = min(2048, next_power_of_2(size))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def whole_rows(size: int) -> dict:
    """Rows of ``size`` elements that stay in registers: 16 to 32 elements a thread, several rows a program if they are
    short.
    """
    block = next_power_of_2(size)
    rows = max(1, min(16, 2048 // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(2, rows * block // 512))}


def rope(heads: int, kv_heads: int, half: int) -> dict:
    """Heads of one token, both halves of ``half`` elements in registers: 4 elements of each a thread.

    No more heads than k has, so that grouped-query attention leaves no thread idle.
    """
    block = next_power_of_2(half)
    rows = min(next_power_of_2(min(heads, kv_heads)), max(1, 1024 // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, min(8, rows * block // 128))}


def gemv_fma(rows: int, n: int, k: int, size: int, bits: int, pair: bool, arch: str) -> dict | None:
    """Few rows times a weight [n, k] on the FMA units, or None where the tensor cores are better (``gemv_dot``).

    ``size``: bytes per element of x; ``bits``: 8 or 4 if quantised, else 0; ``pair``: gate and up weights.
    """
    # Tiles of the tensor cores have 16 rows whatever the number; on FMA units each row costs. At 3.35 TB/s an H100 has
    # 18 instruction slots per bf16 weight, 9 per int8 and 4.5 per int4 weight. fp32 has no tensor cores of its
    # accuracy.
    limit = {0: 4, 8: 3, 4: 1}[bits]
    if rows > limit and (size == 2 or bits == 4):
        return None
    per_block = {0: 16 // size, 8: 16, 4: 32}[bits]  # inputs in 16 bytes of a weight row
    lanes = 64 if arch.startswith("gfx") else 32
    # Twice as many of 16-bit weights, whose rows are long; half of it where more rows of x need registers. Of three
    # sizes the one that covers k with the fewest idle lanes.
    largest = 4 * lanes * (2 if bits == 0 and rows <= 2 else 1)
    blocks = min(
        (largest, largest // 2, largest // 4), key=lambda count: (-(-k // (per_block * count)) * count, -count)
    )
    # 8 loads of 16 bytes in flight per thread, and at least 512 programs (4 per processor of an H100) while n allows
    # it. Measured on an H100: fewer loads, the next ones under way, and more threads are better, but for int4, whose
    # pairs want 16.
    measured = arch == "sm_90"
    loads, each, most = {0: (2, 1, 8), 8: (4, 2, 4), 4: (8 * (2 if pair else 1), 1, 4)}[bits] if measured else (8, 1, 4)
    warps = max(1, min(most, blocks // each // lanes))
    together = max(1, loads * warps * lanes // blocks // (2 if pair else 1) // (1 if rows <= 2 else 2))
    block_n = next(b for b in (8, 4, 2, 1) if b == 1 or (b <= together and n >= 512 * b))
    tile = {"ROWS": min(rows, limit), "BLOCK_N": block_n, "BLOCKS": blocks, "num_warps": warps, "num_stages": 1}
    return tile if bits == 4 else {**tile, "AHEAD": measured}


def gemv_dot(size: int, bits: int, group: int, pair: bool, arch: str) -> dict:
    """Up to 16 rows times a weight in tiles of 16 rows: 16 outputs a program, so that a layer's 1,024 still fill half
    the chip.
    """
    block_n, parts = 16, 4
    # Columns of w, 64 to 128 bytes of a row; or those of one int4 group. Two 16-bit weights at once spill 16 bytes on
    # sm_120 with 64.
    block = group // 2 if bits == 4 else 32 if bits == 0 and size == 2 and pair and arch == "sm_120" else 64
    stage = parts * block * (block_n * (2 if pair else 1) * (1 if bits else size) + 16 * size * (2 if bits == 4 else 1))
    # A third of shared memory, so that two programs and more run on a processor.
    stages = 2 if arch.startswith("gfx") else max(2, min(5, SHARED_MEMORY[arch] // 3 // stage))
    # fp32 products keep both operands in registers: more warps share a slice.
    warps = parts * (1 if size == 2 else 2 if block <= 32 else 4)
    return {"BLOCK_N": block_n, "PARTS": parts, "BLOCK": block, "num_warps": warps, "num_stages": stages}


def _attention_stages(resident: int, stage: int, most: int, arch: str) -> int:
    """Stages of what streams that fit beside the resident tiles (bytes); gfx942 loads through registers."""
    return 1 if arch.startswith("gfx") else max(1, min(most, (SHARED_MEMORY[arch] - resident) // stage))


def attention(queries: int, head_dim: int, size: int, arch: str, dropout: bool = False) -> dict:
    """Forward: blocks of queries stay, keys and values stream. The largest tiles of 16-bit data that the audit finds
    without spills; ``dropout``: its random numbers need registers too.
    """
    block_d = max(16, next_power_of_2(head_dim))
    if size == 4:  # products of full precision keep their operands in registers
        block_m, block_n, warps = (16, 16, 4) if block_d > 64 else (32, 32, 8 if dropout else 4)
    elif block_d > 128:
        block_m, block_n, warps = 128 if arch in ("sm_90", "sm_100") else 64, 32, 8
    elif arch == "sm_90" and not dropout:  # measured on an H100
        block_m, block_n, warps = 128, 64 if block_d <= 64 else 128, 8
    else:
        block_m, block_n, warps = 128, 64, 4 if block_d <= 64 and arch not in ("sm_89", "sm_120") and not dropout else 8
    if dropout and arch.startswith("gfx"):
        block_n, warps = 16, 4
    block_m = min(block_m, max(16, next_power_of_2(queries)))
    most = 1 if dropout and arch == "sm_100" else 2 if dropout or size == 4 else 3
    stages = _attention_stages(block_m * block_d * size, 2 * block_n * block_d * size, most, arch)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}


def attention_backward_queries(queries: int, head_dim: int, size: int, arch: str, dropout: bool = False) -> dict:
    """Gradient of q: as the forward, with one more operand of each side."""
    block_d = max(16, next_power_of_2(head_dim))
    wide = arch in ("sm_90", "sm_100")  # products that leave their operands in shared memory
    if size == 4:
        block_m, block_n, warps = (16, 16, 4) if block_d > 128 else (32, 16, 4) if block_d > 64 else (32, 32, 4)
    elif block_d > 128:
        block_m, block_n, warps = 64, 32, 8
    elif arch.startswith("gfx"):
        block_m, block_n, warps = (64, 32, 4) if block_d > 64 else (64, 64, 4)
    elif arch == "sm_90" and block_d <= 64 and not dropout:  # measured on an H100, the third stage of others too
        block_m, block_n, warps = 64, 64, 4
    else:
        block_m, block_n, warps = 128, 64 if wide or block_d <= 64 else 32, 8
    if dropout and arch.startswith("gfx"):
        block_m, block_n, warps = 128, 16, 4
    block_m = min(block_m, max(16, next_power_of_2(queries)))
    most = 3 if arch == "sm_90" and size == 2 and block_d <= 128 and not dropout else 2
    stages = _attention_stages(2 * block_m * block_d * size, 2 * block_n * block_d * size, most, arch)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}


def attention_backward_keys(keys: int, head_dim: int, size: int, arch: str, dropout: bool = False) -> dict:
    """Gradients of k and v: blocks of keys stay, queries and their gradients stream."""
    block_d = max(16, next_power_of_2(head_dim))
    wide = arch in ("sm_90", "sm_100")
    if size == 4:
        block_m, block_n, warps = (16, 16, 4) if block_d > 64 else (32, 32, 8 if dropout else 4)
    elif block_d > 128:
        block_m, block_n, warps = 32, 64, 8
    elif arch == "sm_90" and not dropout:  # measured on an H100
        block_m, block_n, warps = 32 if block_d > 64 else 64, 64, 4
    elif block_d > 64:  # two accumulators of 128 columns
        block_m, block_n, warps = (32, 128, 8) if wide else (32, 64, 8) if arch.startswith("gfx") else (64, 64, 8)
    else:
        block_m = 32 if dropout or arch in ("sm_89", "sm_120") else 64
        block_n, warps = 128, 4 if dropout and arch.startswith("gfx") else 8
    block_n = min(block_n, max(16, next_power_of_2(keys)))
    resident = 2 * block_n * block_d * size + (16 << 10)  # k and v, and room to change the layout of a tile
    most = 1 if size == 4 else 3 if arch == "sm_90" and block_d <= 128 and not dropout else 2
    stages = _attention_stages(resident, 2 * block_m * block_d * size, most, arch)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": stages}


def decode_attention(
    heads: int, rows: int, head_dim: int, size: int, capacity: int | None, arch: str, int8: bool = False
) -> dict:
    """``heads``: kv heads of all sequences; ``rows``: queries times query heads of each; ``size``: bytes per element of
    q; ``int8``: the cache.

    Four programs a processor hide the latency of memory and even out sequences of different lengths, up to 64 splits;
    none is smaller than a block of keys. A function of the capacity, not of the lengths: the launch is the same at
    every step of a graph. None: of a cache that may grow to any.
    """
    block_d = max(16, next_power_of_2(head_dim))
    largest = 16 if block_d > 128 or size == 4 or arch.startswith("gfx") else 64
    block_m = max(16, min(next_power_of_2(rows), largest))
    block_n = 16 if size == 4 or block_d > 256 else (64 if block_d <= 128 else 32)
    programs = heads * -(-rows // block_m)
    splits = next_power_of_2(-(-4 * PROCESSORS[arch] // max(1, programs)))
    splits = max(1, min(64, splits if capacity is None else min(splits, next_power_of_2(-(-capacity // block_n)))))
    stage = 2 * block_n * block_d * size
    # fp32 products need their registers for operands; with prefetched addresses on top they spill. So does the third
    # stage of an int8 cache, whose scales are fetched too, on sm_100.
    most = 2 if int8 else 3
    stages = 1 if arch.startswith("gfx") or size == 4 else max(1, min(most, SHARED_MEMORY[arch] // 2 // stage))
    joined = 512 if arch == "sm_89" else 2048  # elements of partial results at once; sm_89 spills with more
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "SPLITS": splits,
        "JOIN_STEP": min(splits, max(1, joined // block_d)),
        "num_warps": 4,
        "num_stages": stages,
    }


def quantized_linear_route(rows: int, bits: int) -> str:
    """ "gemv", "int8" or "dequantize" (once to x's dtype, then PyTorch's product). Measured on an H100 with 17 to 4,096
    rows:

    int8 tensor cores win whatever the rows. int4 has none; a product that unpacked its weights for each 128 rows was up
    to 3.8 times slower than this, and faster (by 0.005 ms) only with fewer than 64 rows.
    """
    if rows <= GEMV_ROWS:
        return "gemv"
    return "int8" if bits == 8 else "dequantize"


def quantize_rows(k: int) -> dict:
    """A row in one pass where it has at most 8,192 elements: 16 a thread."""
    block = min(8192, next_power_of_2(k))
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 512))}


def int8_matmul(m: int, n: int, arch: str) -> dict:
    """int8 [m, k] times int8 [n, k]: 128 bytes of k at a time."""
    # Enough programs for every processor first, and for two rounds of them before tiles are as large as 128 x 128
    # (measured on an H100).
    block_m = 32 if m <= 32 else 64 if m * n < 2 * PROCESSORS[arch] * 128 * 128 else 128
    block_n = 128 if m * n >= PROCESSORS[arch] * block_m * 128 else 64
    stage = (block_m + block_n) * 128
    most = 3 if block_m * block_n == 128 * 128 else 4
    stages = 2 if arch.startswith("gfx") else max(2, min(most, (SHARED_MEMORY[arch] - 2048) // stage))
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": 128,
        "num_warps": 8 if block_m * block_n >= 128 * 128 else 4,
        "num_stages": stages,
    }


def cross_entropy(vocabulary: int) -> dict:
    """Passes over a row of logits: 32 elements a thread, so that 4 loads of 16 bytes are in flight."""
    block = min(8192, next_power_of_2(vocabulary))
    return {"BLOCK": block, "num_warps": max(1, block // 1024)}


def cross_entropy_rows() -> int:
    """Rows of logits held at once where they need memory of their own: 311 MB of 16-bit logits with 151,936 words."""
    return 1024


def cross_entropy_columns(tokens: int, width: int, free: int) -> int:
    """How many columns of logits [tokens, V] come next where ``free`` rows of dweight [V, width] are neither written
    nor needed: as many as fit behind their own rows, a fifth of them with 8,192 tokens and 2,048 wide. 0 where these
    would be too few for a product.
    """
    columns = free * width // (tokens + width) // 64 * 64
    return columns if columns >= 1024 else 0
