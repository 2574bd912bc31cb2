"""backend_c: the compiled kernel adds up what torch does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from projections import KIND_PARAMS, kind_of, needs_kernel, normal, small_plan

from dmin_trace.project import backend_c, compress, project
from dmin_trace.settings import Projection


@pytest.fixture(params=KIND_PARAMS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Projection:
    """Each kind of projection, rotation by both backends."""
    return kind_of(request.param, monkeypatch)


@pytest.mark.parametrize(
    "shape", [(7, 13, 3, 3), (5, 6, 5, 5), (1, 90, 1, 9), (3, 8, 4, 3), (2, 5, 9, 9), (11, 1, 3, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("signs", [False, True])
def test_project_reads_channels_last_tensors_in_element_order(
    kind: Projection, shape: tuple[int, ...], dtype: torch.dtype, signs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several rows, and blocks of rows, that begin and end inside a channel.
    monkeypatch.setattr("dmin_trace.project.backend_c.MIN_CHANNELS_LAST_SIZE", 1)
    count = math.prod(shape)
    x = normal(count + 300).to(dtype)
    inner = x[37 : 37 + count].view(shape).contiguous(memory_format=torch.channels_last)
    plan = small_plan(kind, len(x))
    expected, square = project([x], plan, signs=signs)
    found, found_square = project([x[:37], inner, x[37 + count :]], plan, signs=signs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found_square, square, rtol=1e-6, atol=0)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [256, 2**17])
def test_c_sums_and_torch_sums_differ_by_rounding_only(
    width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ten rows or more than five, most of them whole; a tensor within a row, and views that must be laid out.
    length = 10 * width if width < 1000 else 700_001
    plan, x = small_plan("rotation", length, 64, 4, width), normal(length).to(dtype)
    tensors = [x[:77], x[77 : width - 1], *x[width - 1 : 2 * width].split(1), x[2 * width : -150]]
    tensors += [x[-150:-50].view(10, 10).t(), torch.ones((), dtype=dtype).expand(5, 9), x[-5:]]
    tensors = tensors if width < 1000 else [x]
    ours, square = project(tensors, plan)
    monkeypatch.setattr(backend_c, "KERNEL", None)
    theirs, _ = project(tensors, plan)
    torch.testing.assert_close(ours, theirs, atol=1e-6 * length**0.5, rtol=0)
    exact = sum(tensor.double().square().sum() for tensor in tensors)
    torch.testing.assert_close(square, exact, rtol=1e-6, atol=0)


@needs_kernel
def test_project_uses_the_kernel_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("in torch")

    monkeypatch.setattr(compress, "TorchSums", fail)
    project([torch.ones(500), torch.ones(500, dtype=torch.float16)], small_plan("rotation"))
    with pytest.raises(AssertionError, match="in torch"):
        project([torch.ones(1000)], small_plan("uniform"))
    monkeypatch.setattr(backend_c, "KERNEL", None)
    with pytest.raises(AssertionError, match="in torch"):
        project([torch.ones(1000)], small_plan("rotation"))


@needs_kernel
def test_kernel_checks_its_arguments() -> None:
    from dmin_trace.project import _rows

    x, columns, rows = np.ones(8, np.float32), np.ones(4, np.int8), np.zeros(2, np.uint32)
    sums = np.zeros(4, np.float32)
    assert _rows.add(sums, columns, rows, 1, [(x.ctypes.data, 3), (x.ctypes.data, 4)], 4, False) == 7
    for groups in ((4, 3, 3), (8, 2, 3), (4, 0, 2), (4, -1, 4), (4, 2**62, 4), (4, 2, 0)):
        with pytest.raises(ValueError, match="in whole groups where there are channels"):
            _rows.add(sums, columns, rows, 0, [(x.ctypes.data, *groups)], 4, False)
    with pytest.raises(ValueError, match="in whole groups where there are channels"):
        _rows.add(sums, columns, rows, 0, [(x.ctypes.data, 4, 2, 2)], 2, False)
    assert sums.tolist() == [1, 2, 2, 2]
    for at, count, size in ((1, 8, 4), (-1, 2, 4), (2**62, 2**62, 4), (0, -1, 4), (0, 1, 8)):
        with pytest.raises(ValueError, match="within the rows"):
            _rows.add(sums, columns, rows, at, [(x.ctypes.data, 0), (x.ctypes.data, count)], size, False)
    with pytest.raises(ValueError, match="a sign for each sum"):
        _rows.add(sums, columns[:3].copy(), rows, 0, [(x.ctypes.data, 1)], 4, False)
    for tensors in ([x.ctypes.data], [(x.ctypes.data,)], [(x.ctypes.data, 1.5)], (x.ctypes.data, 1)):
        with pytest.raises(TypeError):
            _rows.add(sums, columns, rows, 0, tensors, 4, False)
    # Places beyond the sums are taken within them.
    sketch, places = np.zeros(2, np.float32), np.array([0, 1, 6, 3 + 2**31], np.uint32)
    _rows.fold(sketch, sums, places)
    assert sketch.tolist() == [1 + 2, 2 - 2]
    for lengths in ((3, 4, 4), (2, 4, 3), (2, 6, 6)):
        with pytest.raises(ValueError, match="a place for each sum"):
            _rows.fold(
                np.zeros(lengths[0], np.float32), np.zeros(lengths[1], np.float32), np.zeros(lengths[2], np.uint32)
            )
    with pytest.raises(ValueError, match="elements of 4"):
        _rows.fold(np.zeros(0, np.float32), sums, places)
    sums.flags.writeable = False
    with pytest.raises((BufferError, ValueError), match="read-only"):
        _rows.add(sums, columns, rows, 0, [(x.ctypes.data, 8)], 4, False)
