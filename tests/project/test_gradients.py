"""`normalised`: a gradient is divided by its norm over all tensors, whatever holds them."""

from __future__ import annotations

import pytest
import torch

from dmin_trace.project import normalised


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_of_any_dtype_has_norm_one_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(4, 3, 5, 5, generator=generator).contiguous(memory_format=torch.channels_last)
    given = [
        image.to(dtype),
        torch.zeros((), dtype=dtype).expand(7),
        torch.randn(300_000, generator=generator).to(dtype),
    ]
    kept = [tensor.clone() for tensor in given]
    found = list(normalised(iter(given)))
    flat = torch.cat([tensor.double().flatten() for tensor in kept])
    expected = flat / flat.norm()
    assert all(tensor.dtype == torch.float32 for tensor in found) and found[0].shape == (4, 3, 5, 5)
    assert (torch.cat([tensor.flatten() for tensor in found]) - expected).norm() <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))


def test_long_sums_are_right() -> None:
    # In one piece, the norm of so many numbers in float32 is wrong by 2e-4 on a CPU, and by more of more.
    (found,) = normalised(iter([torch.randn(2**23, generator=torch.Generator().manual_seed(1))]))
    assert float(found.double().norm()) == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_a_gradient_without_a_direction_gives_nan(value: float) -> None:
    found = torch.cat(list(normalised(iter([torch.full((2,), value), torch.full((1,), value)]))))
    assert found.isnan().all()
