"""Decoder layers composed of Triton kernels: a decode step with positions on the device, every weight format."""

import pytest
import torch

import qvl_kernels
from qvl_kernels.ops.decoder_layer.decode_step import decode_step
from qvl_kernels.ops.decoder_layer.growing_caches import GrowingCaches
from qvl_kernels.ops.decoder_layer.reference import decoder_layer_reference
from qvl_kernels.ops.decoder_layer.unfused import unfused_decoder_layer
from qvl_kernels.quantization import QuantizedWeight, dequantize, quantize
from qvl_kernels.testing import assert_close_to_fp64, random_tensor

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, CAPACITY = 64, 4, 2, 32, 96, 40
LENGTHS = [7, 0, 39]


def _weights(dtype, generator) -> qvl_kernels.DecoderWeights:
    def matrix(n, k):
        return random_tensor((n, k), dtype, generator, scale=k**-0.5)

    def norm(n):
        return 1.0 + 0.1 * random_tensor((n,), dtype, generator)

    return qvl_kernels.DecoderWeights(
        norm(HIDDEN),
        matrix(HEADS * HEAD_DIM, HIDDEN),
        matrix(KV_HEADS * HEAD_DIM, HIDDEN),
        matrix(KV_HEADS * HEAD_DIM, HIDDEN),
        norm(HEAD_DIM),
        norm(HEAD_DIM),
        matrix(HIDDEN, HEADS * HEAD_DIM),
        norm(HIDDEN),
        matrix(MLP, HIDDEN),
        matrix(MLP, HIDDEN),
        matrix(HIDDEN, MLP),
    )


class _Layer:
    """What ``decode_step`` reads of a PreparedDecoderLayer, which takes tensors of its device only."""

    num_heads, kv_heads, head_dim, eps, scale = HEADS, KV_HEADS, HEAD_DIM, 1e-6, HEAD_DIM**-0.5

    def __init__(self, weights):
        self.weights = weights


def _arguments(dtype, time=1):
    generator = torch.Generator().manual_seed(0)
    batch = len(LENGTHS)
    angles = torch.rand(batch, time, HEAD_DIM // 2, generator=generator) * 50
    angles = torch.cat((angles, angles), -1)
    caches = [random_tensor((batch, KV_HEADS, CAPACITY, HEAD_DIM), dtype, generator) for _ in range(2)]
    return (
        random_tensor((batch, time, HIDDEN), dtype, generator),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        *caches,
        _weights(dtype, generator),
    )


def _golden(x, cos, sin, keys, values, weights, visible):
    """Reference, row by row, each with its own past: (outputs, keys, values)."""
    outs = []
    for row, past in enumerate(LENGTHS):
        part = slice(row, row + 1)
        mask = visible[part, ..., : past + 1]
        out = decoder_layer_reference(
            x[part], weights, cos[part], sin[part], keys[part], values[part], past, mask, HEADS, 1e-6, HEAD_DIM**-0.5
        )
        outs.append(out)
    return torch.cat(outs), keys, values


def _map(function, weights):
    return type(weights)(*(None if x is None else function(x) for x in weights))


@pytest.mark.parametrize(("bits", "zeros"), [(16, False), (8, False), (4, False), (4, True)])
def test_decode_step(bits, zeros, dtype, device):
    x, cos, sin, keys, values, weights = _arguments(dtype)
    for cache, fill in ((keys, float("nan")), (values, float("nan"))):
        for row, length in enumerate(LENGTHS):
            cache[row, :, length:] = fill  # unwritten slots may hold anything
    visible = torch.ones(len(LENGTHS), 1, 1, CAPACITY, dtype=torch.bool)
    visible[0, ..., :3] = False  # left padding
    exact = weights
    if bits < 16:
        quantised = _map(lambda w: quantize(w, bits, 32, zero_points=zeros) if w.dim() == 2 else w, weights)
        exact = _map(lambda w: dequantize(w, dtype) if isinstance(w, QuantizedWeight) else w, quantised)
        golden_weights = _map(
            lambda w: dequantize(w, torch.float64) if isinstance(w, QuantizedWeight) else w.double(),
            quantised,
        )
        weights = quantised
    else:
        golden_weights = _map(torch.Tensor.double, weights)
    tensors = (x, cos, sin, keys, values)
    golden = _golden(*(t.double() for t in tensors), golden_weights, visible)
    baseline = _golden(*(t.clone() for t in tensors), exact, visible)
    moved = [t.clone().to(device) for t in tensors]
    caches = GrowingCaches(1, len(LENGTHS), KV_HEADS, HEAD_DIM, dtype, device)
    caches.take(0, *moved[3:], length=CAPACITY)
    caches.set_mask(visible[:, 0, 0].to(device))
    weights = _map(
        lambda w: w.apply(lambda x: x.to(device)) if isinstance(w, QuantizedWeight) else w.to(device),
        weights,
    )
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    with torch.no_grad(), qvl_kernels.use_backend("triton"):
        out = decode_step(moved[0], _Layer(weights), *moved[1:3], caches, 0, lengths, lengths + 1)
    for ours, plain, true in zip((out, *caches.give(0, len(LENGTHS), CAPACITY)), baseline, golden):
        assert_close_to_fp64(ours.cpu().nan_to_num(), plain.nan_to_num(), true.nan_to_num())


@pytest.mark.parametrize("time", [1, 9], ids=["few rows", "many rows"])
def test_composed_layer(time, dtype, device):
    x, cos, sin, keys, values, weights = _arguments(dtype, time)
    past = 5

    def reference(convert):
        k, v = convert(keys), convert(values)
        w = _map(convert, weights)
        return (
            decoder_layer_reference(
                convert(x), w, convert(cos), convert(sin), k, v, past, None, HEADS, 1e-6, HEAD_DIM**-0.5
            ),
            k,
            v,
        )

    golden, baseline = reference(lambda t: t.double() if t.is_floating_point() else t), reference(torch.clone)
    moved, w = [t.clone().to(device) for t in (x, cos, sin, keys, values)], _map(lambda t: t.to(device), weights)
    with torch.no_grad(), qvl_kernels.use_backend("triton"):
        out = unfused_decoder_layer(
            moved[0],
            [w.input_norm, w.q_norm, w.k_norm, w.post_norm],
            [w.q, w.k, w.v, w.o, w.gate, w.up, w.down],
            [None] * 4,
            *moved[1:],
            past,
            None,
            HEADS,
            1e-6,
            HEAD_DIM**-0.5,
        )
    for ours, plain, true in zip((out, *moved[3:]), baseline, golden):
        assert_close_to_fp64(ours.cpu(), plain, true)
