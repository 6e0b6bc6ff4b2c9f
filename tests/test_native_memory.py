"""Results on memory that earlier results have given back."""

import gc
import os
from pathlib import Path

import pytest
import torch

from fastcam import backends

if backends.needs_cpp(torch.zeros(1)) is not None:
    pytest.skip("C++ extension not built", allow_module_level=True)
from fastcam.native._memory import empty

LARGE = 1 << 21


@pytest.mark.parametrize("shape", [(0, 3), (2, 5), (3, 1024, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_gives_contiguous_tensors_of_any_size(shape, dtype):
    x = empty(shape, dtype)
    assert (x.shape, x.dtype, x.is_contiguous()) == (shape, dtype, True)
    assert x.data_ptr() % 64 == 0 or x.numel() == 0


def test_living_results_do_not_share_memory_and_dead_ones_give_it_back():
    a = empty((LARGE,), torch.float32).fill_(1)
    b = empty((LARGE,), torch.float32).fill_(2)
    view, address = a[10:20], a.data_ptr()
    del a
    gc.collect()
    c = empty((LARGE,), torch.float32).fill_(3)
    assert view.unique().tolist() == [1]  # a view keeps the whole alive
    assert b.unique().tolist() == [2]
    assert c.unique().tolist() == [3]
    del view
    gc.collect()
    assert empty((LARGE,), torch.float32).data_ptr() == address


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux")
def test_keeps_no_more_than_its_limit():
    before = resident()
    arrays = [empty((size, LARGE), torch.uint8).fill_(1) for size in range(20, 28)]
    assert resident() - before >= 200 << 20
    del arrays
    gc.collect()
    assert resident() - before <= 140 << 20  # 128 are kept


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_may_use_what_is_kept():
    empty((LARGE,), torch.float32).fill_(1)
    child = os.fork()
    if child == 0:
        x = empty((LARGE,), torch.float32)
        x[:9] = 5  # so few that torch starts no threads, which it cannot after a fork
        os._exit(0 if x[8].item() == 5 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
