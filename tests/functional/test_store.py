"""A bounded memory of tensors."""

import copy
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fewshot_nlp.functional.store import TensorStore


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_does_not_fit_in_memory_comes_back_from_the_file(dtype):
    store = TensorStore(max_bytes=3 * 8 * dtype.itemsize)
    tensors = {
        str(i).encode(): torch.randn(2, 4, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(9)
    }
    for address, tensor in tensors.items():
        store.put(address, tensor)
    assert store.bytes == 3 * 8 * dtype.itemsize and store.file_bytes == 6 * 8 * dtype.itemsize
    for address, tensor in tensors.items():
        found = store.get(address)
        assert found.dtype == dtype and torch.equal(found, tensor)
    assert store.file_bytes == 9 * 8 * dtype.itemsize, "what is in the file already is not written again"
    assert store.bytes <= 3 * 8 * dtype.itemsize


def test_the_file_is_bounded():
    store = TensorStore(max_bytes=16, max_file_bytes=16)
    for i in range(4):
        store.put(bytes([i]), torch.full((4,), float(i)))
    assert store.file_bytes == 16
    known = [store.get(bytes([i])) for i in range(4)]
    assert [None if each is None else float(each[0]) for each in known] == [0.0, None, None, None]


def test_the_latest_used_stay_in_memory():
    store = TensorStore(max_bytes=32, max_file_bytes=0)
    for i in (0, 1):
        store.put(bytes([i]), torch.full((4,), float(i)))
    store.get(b"\0")
    store.put(b"\2", torch.zeros(4))
    assert store.get(b"\1") is None and store.get(b"\0") is not None and store.get(b"\2") is not None


def test_only_tensors_are_kept():
    store = TensorStore()
    store.put(b"a", (torch.zeros(1), None))
    assert store.get(b"a") is None
    store.put(b"b", torch.zeros(3, 2).T)
    assert store.get(b"b").shape == (2, 3)


def test_a_full_disk_makes_it_forget_and_not_fail():
    one = torch.arange(1000.0)
    store = TensorStore(max_bytes=one.nbytes)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * one.nbytes + 100, hard))
        for i in range(6):
            store.put(bytes([i]), one + i)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = [store.get(bytes([i])) for i in reversed(range(6))][::-1]
    # Two found room in the file, the last one is in memory, and those between are forgotten.
    assert [value is not None for value in found] == [True, True, False, False, False, True]
    assert all(value is None or torch.equal(value, one + i) for i, value in enumerate(found))


def test_threads_share_a_store_and_a_copy_starts_empty():
    store = TensorStore(max_bytes=40 * 4 * 8)
    addresses = [bytes([i]) for i in range(120)]

    def work(start):
        for _ in range(5):
            for i in (*range(start, 120), *range(start)):
                known = store.get(addresses[i])
                assert known is None or torch.equal(known, torch.full((8,), float(i)))
                if known is None:
                    store.put(addresses[i], torch.full((8,), float(i)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, (0, 30, 60, 90)))
    assert store.file_bytes > 0
    assert store.bytes == sum(tensor.nbytes for tensor in store._near.values()) <= store.max_bytes
    again = copy.deepcopy(store)
    assert again.get(addresses[0]) is None and again.max_bytes == store.max_bytes
