"""Rows of a quantised embedding: those of ``dequantize``, bit for bit, by the extension and by PyTorch operations."""

import pytest
import torch
from weight_formats import FORMATS

from qvl_kernels import quantization
from qvl_kernels.ops.quantized_linear import embedding
from qvl_kernels.ops.quantized_linear.embedding import embedding_rows

VOCABULARY = 41


def _weight(k: int, bits: int, group: int, **options) -> quantization.QuantizedWeight:
    torch.manual_seed(k)
    return quantization.quantize(torch.randn(VOCABULARY, k), bits, group, **options)


@pytest.fixture(params=["extension", "pytorch"])
def path(request, monkeypatch):
    """Which of the two ways is taken."""
    if request.param == "pytorch":
        monkeypatch.setattr(embedding, "_extension_takes", lambda *_: False)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [1, 31, 64, 100, 2048])
@pytest.mark.parametrize(("bits", "group", "options"), FORMATS)
@torch.no_grad()
def test_rows_are_those_of_dequantize(path, bits, group, options, k, dtype):
    weight = _weight(k, bits, group, **options)
    ids = torch.randint(VOCABULARY, (77,))
    assert torch.equal(embedding_rows(weight, ids, dtype), quantization.dequantize(weight, dtype)[ids])


@torch.no_grad()
def test_the_extension_is_called(monkeypatch):
    weight = _weight(64, 4, 64)
    seen, module = [], embedding.dispatch.extension()

    class Spy:
        def quantized_embedding(self, *args):
            seen.append(args)
            return module.quantized_embedding(*args)

        def __getattr__(self, name):
            return getattr(module, name)

    monkeypatch.setattr(embedding.dispatch, "extension", Spy)
    embedding_rows(weight, torch.tensor([1]), torch.bfloat16)
    assert len(seen) == 1
    for ids, dtype in ((torch.tensor([1], dtype=torch.int32), torch.bfloat16), (torch.tensor([1]), torch.float64)):
        expected = quantization.dequantize(weight, dtype)[1:2]
        assert torch.equal(embedding_rows(weight, ids, dtype), expected)
    strided = torch.tensor([1, 9, 2, 9])[::2]
    assert torch.equal(
        embedding_rows(weight, strided, torch.float32), quantization.dequantize(weight)[torch.tensor([1, 2])]
    )
    assert len(seen) == 1  # those are left to PyTorch


@pytest.mark.parametrize(("bits", "options"), [(8, {}), (4, {}), (4, {"zero_points": True})])
@torch.no_grad()
def test_strided_rows_and_no_ids(path, bits, options):
    weight = _weight(96, bits, 32, **options)
    strided = weight.apply(lambda x: torch.cat((x, x), 1)[:, : x.shape[1]])
    ids = torch.tensor([5, 0, 40])
    assert not strided.values.is_contiguous()
    assert torch.equal(embedding_rows(strided, ids, torch.float32), quantization.dequantize(weight)[ids])
    assert embedding_rows(weight, ids[:0], torch.float32).shape == (0, 96)


@pytest.mark.parametrize("bad", [-1, VOCABULARY, 2**62])
@torch.no_grad()
def test_ids_outside_of_the_vocabulary_are_refused(path, bad):
    with pytest.raises(IndexError):
        embedding_rows(_weight(64, 4, 64), torch.tensor([3, bad]), torch.float32)


@torch.no_grad()
def test_a_weight_that_is_not_well_formed_is_refused(path):
    weight = _weight(64, 4, 64)
    with pytest.raises(ValueError, match="do not describe rows"):
        embedding_rows(weight._replace(values=weight.values[:, :16]), torch.tensor([3]), torch.float32)
    with pytest.raises(TypeError, match=r"weight\.scales"):
        embedding_rows(weight._replace(scales=weight.scales.float()), torch.tensor([3]), torch.float32)
