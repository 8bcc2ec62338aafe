"""Measured peaks of the processor's units."""

import functools
import statistics
import time

import pytest
import torch

import qvl_kernels
from qvl_kernels import quantization, tuning
from qvl_kernels.dispatch import extension

FORMATS = {  # units that multiply a format
    "fp32": {"fma"},
    "bf16": {"fma", "bf16_dot", "bf16_tiles"},
    "int8": {"fma", "bf16_dot", "bf16_tiles", "int8_dot", "int8_tiles"},
}
INT8 = {"fma", "int8_dot"}
UNITS = {
    "portable": {"fma"},
    "avx2": INT8,
    "avx512": INT8,
    "avx512_vnni": INT8,
    "avx512_bf16": INT8 | {"bf16_dot"},
    "amx": INT8 | {"bf16_dot", "bf16_tiles", "int8_tiles"},
}


def test_units_are_those_of_the_instruction_set():
    peaks = extension().unit_peaks(10)
    assert peaks.keys() == UNITS[qvl_kernels.cpu_info()["isa"]]
    assert all(peak > 0 for peak in peaks.values())


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_no_product_is_faster_than_its_unit(weights, monkeypatch):
    """Of our kernels: PyTorch's use units that a forced instruction set lacks. In turns, since other programs slow
    either down: the highest peak, and the median product.
    """
    monkeypatch.setattr(tuning, "chosen", lambda kind: tuning.QVL)
    rows, n, k = 256, 1024, 2048
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    x, weight = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
    if weights == "int8":
        run = functools.partial(qvl_kernels.quantized_linear, x, quantization.quantize(weight, bits=8))
    else:
        run = functools.partial(qvl_kernels.linear, x, weight)
    peaks, rates = [], []
    with torch.inference_mode(), qvl_kernels.use_backend("cpp"):
        run()
        for _ in range(15):
            peaks.append(max(peak for unit, peak in extension().unit_peaks(10).items() if unit in FORMATS[weights]))
            start = time.perf_counter()
            run()
            rates.append(2 * rows * n * k / (time.perf_counter() - start) / 1e9)
    assert 0 < statistics.median(rates) <= 1.1 * max(peaks)
