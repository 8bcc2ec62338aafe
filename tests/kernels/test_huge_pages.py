"""Huge pages under tensors: only the pages change, not addresses or contents."""

import mmap
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from models import stock_model

import qvl_kernels
import qvl_model
from qvl_kernels import quantization
from qvl_kernels.memory import huge_pages, pages

HUGE = 1 << 21
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")


def smaps(address: int, field: str) -> int:
    """Kilobytes that /proc/self/smaps gives for the mapping of ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == f"{field}:":
            return int(line.split()[1])
    raise AssertionError(f"{address:#x} is not mapped")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights"
    generator = torch.Generator().manual_seed(0)
    path.write_bytes(
        torch.randint(0, 256, (9 * HUGE + 4096,), dtype=torch.uint8, generator=generator).numpy().tobytes()
    )
    return path


def mapped(file: Path, shared: bool = False) -> torch.Tensor:
    size = file.stat().st_size
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage.from_file(str(file), shared, size))


def huge_pages_work() -> bool:
    probe = torch.ones(4 * HUGE, dtype=torch.uint8)
    return qvl_kernels.use_huge_pages([probe]) > 0


def test_mapped_file_moves_and_nothing_else_changes(file):
    if not huge_pages_work():
        pytest.skip("the system gives no huge pages")
    contents = file.read_bytes()
    whole = mapped(file)
    tensor, view = whole[24 : 8 * HUGE + 24], whole[100:3000]
    whole[5 * HUGE] ^= 255  # a page of its own, which must move unchanged
    edited = whole.clone()
    address = tensor.data_ptr()
    moved = qvl_kernels.use_huge_pages([tensor])
    assert 7 * HUGE <= moved <= 8 * HUGE and moved % HUGE == 0
    assert tensor.data_ptr() == address and torch.equal(whole, edited) and torch.equal(view, edited[100:3000])
    middle = address + 4 * HUGE
    assert smaps(middle, "AnonHugePages") * 1024 >= 7 * HUGE and smaps(middle, "Shared_Clean") == 0
    whole.fill_(7)  # still writable, still private
    assert bool((view == 7).all()) and file.read_bytes() == contents
    assert qvl_kernels.use_huge_pages([tensor]) == moved  # a second call finds huge pages
    del tensor, view, whole
    with pytest.raises(AssertionError):
        smaps(middle, "Rss")  # freed with the map


def test_read_only_map_stays_read_only(file):
    if not huge_pages_work():
        pytest.skip("the system gives no huge pages")
    with file.open("rb") as handle:
        view = memoryview(mmap.mmap(handle.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))
    with pytest.warns(UserWarning, match="not writable"):
        tensor = torch.frombuffer(view, dtype=torch.uint8)
    before = tensor.clone()
    assert qvl_kernels.use_huge_pages([tensor]) >= 8 * HUGE
    middle = tensor.data_ptr() + 4 * HUGE
    assert torch.equal(tensor, before)
    assert not next(writable for begin, end, _, writable in huge_pages._private_maps() if begin <= middle < end)


def test_adjacent_tensors_share_huge_pages(file):
    if not huge_pages_work():
        pytest.skip("the system gives no huge pages")
    whole = mapped(file)
    parts = whole[: 8 * HUGE].split(HUGE // 2 + 96)
    before = whole.clone()
    assert qvl_kernels.use_huge_pages(parts) >= 7 * HUGE
    assert torch.equal(whole, before)


def test_shared_map_is_left_alone(file):
    whole = mapped(file, shared=True)
    assert qvl_kernels.use_huge_pages([whole]) == 0
    whole[0] ^= 255  # still the mapped file
    assert file.read_bytes()[0] == whole[0].item()


@pytest.mark.parametrize("value", ["no", "2", "false", " 0"])
def test_a_variable_that_says_nothing(monkeypatch, value):
    monkeypatch.setenv("QVL_HUGE_PAGES", value)
    with pytest.raises(ValueError, match=f"QVL_HUGE_PAGES={value} means nothing; 0 leaves"):
        qvl_kernels.use_huge_pages([torch.ones(3)])
    model = stock_model("small")
    with pytest.raises(ValueError, match="QVL_HUGE_PAGES"):
        qvl_model.accelerate(model)
    assert not qvl_model.is_accelerated(model)


@pytest.mark.parametrize("reason", ["variable", "memory", "never", "small", "none"])
def test_left_alone(file, monkeypatch, reason):
    tensors = [mapped(file)]
    if reason == "variable":
        monkeypatch.setenv("QVL_HUGE_PAGES", "0")
    elif reason == "memory":
        monkeypatch.setattr(huge_pages, "_available", lambda: 1 << 30)
    elif reason == "never":
        monkeypatch.setattr(huge_pages, "_enabled", lambda: False)
    elif reason == "small":
        tensors = [tensors[0][:HUGE], torch.empty(0), torch.ones(3)]
        tensors[0] = tensors[0][: HUGE - 1]
    else:
        tensors = []
    before = [tensor.clone() for tensor in tensors]
    assert qvl_kernels.use_huge_pages(tensors) == 0
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


def test_strided_meta_and_sparse_tensors_are_left_alone(file):
    whole = mapped(file)
    columns = whole[: 8 * HUGE].view(-1, 4096)[:, 1:]
    tensors = [columns, torch.empty(HUGE, device="meta"), torch.eye(3).to_sparse()]
    assert qvl_kernels.use_huge_pages(tensors) == 0


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, HUGE), torch.int8), ((3, HUGE // 2 + 40), torch.uint8), ((HUGE // 8, 5), torch.float32)],
    ids=str,
)
def test_large_memory_begins_at_a_huge_page(shape, dtype):
    like = torch.empty(2, dtype=torch.bfloat16)
    first, second = (pages.empty(like, shape, dtype) for _ in range(2))
    first.fill_(3)
    second.fill_(5)
    for x, value in ((first, 3), (second, 5)):
        assert x.shape == shape and x.dtype is dtype and x.is_contiguous() and bool((x == value).all())
        assert x.data_ptr() % HUGE == 0
        if huge_pages_work():
            assert smaps(x.data_ptr(), "AnonHugePages") * 1024 == x.nbytes // HUGE * HUGE
    address, copy = first.data_ptr(), first[1:].clone()
    row = first[1:]
    del first, x
    assert torch.equal(row, copy)  # a view keeps the memory
    del row
    with pytest.raises(AssertionError, match="is not mapped"):
        smaps(address, "Rss")


def test_smaller_memory_shares_huge_pages_and_goes_with_the_last_of_it(monkeypatch):
    monkeypatch.setattr(pages, "_shared", pages._Shared())  # without other tests' tensors
    like = torch.empty(2)
    tensors = [
        pages.empty(like, (3, 33_000 + i), torch.int16, shared=True) for i in range(200)
    ]  # 40 MB: more than one chunk of the move
    for i, x in enumerate(tensors):
        x.fill_(i)
    assert all(x.data_ptr() % 64 == 0 and x.is_contiguous() and bool((x == i).all()) for i, x in enumerate(tensors))
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors)
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:]))
    if huge_pages_work():
        assert smaps(tensors[0].data_ptr(), "AnonHugePages") * 1024 >= 8 * HUGE
    address, row = tensors[0].data_ptr(), tensors[0][1:]
    del tensors, x
    assert bool((row == 0).all()) and smaps(address, "Rss") > 0
    del row
    with pytest.raises(AssertionError, match="is not mapped"):
        smaps(address, "Rss")


def test_threads_share_memory_without_overlap():
    like = torch.empty(2)
    with ThreadPoolExecutor(8) as pool:
        tensors = list(
            pool.map(lambda i: pages.empty(like, (70_000 + i,), torch.int8, shared=True).fill_(i % 100), range(400))
        )
    assert all(bool((x == i % 100).all()) for i, x in enumerate(tensors))


def test_small_and_fake_memory_is_as_ever():
    like = torch.empty(0)
    assert pages.empty(like, (3, 0), torch.int8).shape == (3, 0) and pages.empty(like, (100,), torch.int8).shape == (
        100,
    )
    assert pages.empty(like.to("meta"), (2, HUGE), torch.int8).is_meta
    with torch._subclasses.FakeTensorMode():
        assert type(pages.empty(torch.empty(2), (2, HUGE), torch.int8)) is torch._subclasses.FakeTensor


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_lie_on_huge_pages(bits):
    if not huge_pages_work():
        pytest.skip("the system gives no huge pages")
    held = [torch.ones(HUGE // 4) for _ in range(8)]  # the allocator would reuse freed memory on its small pages
    del held
    values = quantization.quantize(torch.randn(2048, 4096), bits).values
    assert smaps(values.data_ptr(), "AnonHugePages") * 1024 == values.nbytes
