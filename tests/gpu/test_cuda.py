"""On a CUDA device: projection, capture by both drivers, queries. `tools/gpu/check` runs these where there is one."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import slot_seed
from points import Denoiser
from projections import normal, oracle, small_plan
from torch.nn.functional import mse_loss

import dmin_trace
from dmin_trace.project import Plan, backend_triton, compress_gradient, make_plan, project
from dmin_trace.store import open_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both backends of a CUDA device."""
    if request.param == "torch":
        monkeypatch.setattr(backend_triton, "load_kernels", lambda: None)
    elif backend_triton.load_kernels() is None:
        pytest.skip("Triton is not installed")
    return str(request.param)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raises where the processor waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_the_processor(tensors: list[torch.Tensor], plan: Plan, *, signs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return compress_gradient([tensor.cpu() for tensor in tensors], plan, signs=signs)


@pytest.mark.parametrize("width", [16, 128, 2048])
def test_projection_equals_the_oracle(backend: str, width: int) -> None:
    plan, x = small_plan("rotation", 5000, 16, 3, width), normal(5000)
    sums, square = project([x.to(CUDA)], plan)
    np.testing.assert_allclose(sums.cpu().numpy(), oracle(x.numpy(), plan), atol=1e-4)
    assert square.item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("length", "dimension"), [(3_000_000, 2**12), (20_000_000, 2**14), (1_500_000, 2**20)])
def test_projection_is_that_of_the_processor(
    backend: str, dtype: torch.dtype, signs: bool, length: int, dimension: int
) -> None:
    plan = make_plan(length, dimension, 1, "rotation")
    x = normal(length).to(dtype).to(CUDA)
    x[::5] = 0
    # Small and large tensors, one that is transposed, and one in channels-last order.
    sizes = [1, 77, 70_001, 999_424, 64 * 32 * 9, 3000]
    *parts, rest = x.split([*sizes, length - sum(sizes)])
    parts[3] = parts[3].view(1024, -1).t().contiguous().t()
    parts[4] = parts[4].view(64, 32, 3, 3).to(memory_format=torch.channels_last)
    ours, norm = compress_gradient([*parts, rest], plan, signs=signs)
    theirs, expected = on_the_processor([*parts, rest], plan, signs=signs)
    assert ours.device.type == "cuda" and norm.device.type == "cuda"
    assert float(ours.cpu().double() @ theirs.double()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(ours.cpu(), theirs, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(norm.cpu(), expected, rtol=1e-5, atol=0)
    again, _ = compress_gradient([*parts, rest], plan, signs=signs)
    assert torch.equal(ours, again), "the order of additions must not change from call to call"


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_gradient_without_a_direction_gives_zeros(backend: str, value: float) -> None:
    plan = make_plan(100_000, 256, 0, "rotation")
    x = torch.full((100_000,), 0.0 if value == 0 else 1.0, device=CUDA)
    x[5] = value
    for signs in (False, True):
        projected, norm = compress_gradient([x], plan, signs=signs)
        assert not projected.any()
        assert norm == 0 or not torch.isfinite(norm)


def test_projection_of_the_uniform_kind_runs_on_the_device() -> None:
    plan, x = make_plan(300_001, 256, 2, "uniform"), normal(300_001)
    ours, _ = compress_gradient([x.to(CUDA)], plan)
    torch.testing.assert_close(ours.cpu(), compress_gradient([x], plan)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("signs", [False, True])
def test_projection_never_waits_for_the_device(backend: str, signs: bool) -> None:
    plan, x = make_plan(2**22, 2**14, 0, "rotation"), torch.randn(2**22, device=CUDA)
    compress_gradient([x], plan, signs=signs)
    with no_synchronisation():
        compress_gradient(list(x.split(100_003)), plan, signs=signs)
        compress_gradient([x.bfloat16()], plan, signs=signs)


def test_projection_takes_more_than_two_thousand_million_elements(backend: str) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 30e9:
        pytest.skip("needs 30 GB of device memory")
    length = 2**31 + 12_345
    plan = make_plan(length, 2**12, 0, "rotation")
    x = torch.zeros(length, dtype=torch.bfloat16, device=CUDA)
    places = [0, 5, 2**30 + 1, 2**31 - 1, 2**31, 2**31 + 77, length - 1]
    x[torch.tensor(places, device=CUDA)] = 1
    sums, square = project([x], plan)
    expected = np.zeros(plan.width)
    shifts, rows, columns = plan.shifts(), plan.row_signs(), plan.column_signs()
    for place in places:
        r, c = divmod(place, plan.width)
        expected[(c + shifts[r]) % plan.width] += float(rows[r]) * float(columns[c])
    folded = np.zeros(plan.dimension)
    np.add.at(folded, np.arange(plan.width) % plan.dimension, (expected * plan.signs())[plan.order()])
    assert square.item() == len(places)
    np.testing.assert_array_equal(sums.cpu().numpy(), folded)


POINTS = 6


def trained_points(dtype: torch.dtype | None) -> tuple[Denoiser, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """A denoiser on the device, its data, and its loss, under autocast to `dtype` if there is one."""
    torch.manual_seed(0)
    model, data = Denoiser().to(CUDA), torch.randn(POINTS, 16, device=CUDA)
    data[4] = data[1]

    def loss_of(clean: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=CUDA)
        with torch.autocast("cuda", dtype or torch.float32, enabled=dtype is not None):
            return mse_loss(model(clean + noise * t.reshape(-1, 1) / 1000, t).float(), noise)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        loss_of(data).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, data, loss_of


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_recording_on_the_device(tmp_path: Path, dtype: torch.dtype | None) -> None:
    """Rows are those of plain autograd; copies and queries find each other; nothing waits; nothing stays behind."""
    model, data, loss_of = trained_points(dtype)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    out = tmp_path / "trace.zarr"
    settings: dict[str, Any] = {"timesteps": [50, 500, 900], "dimension": 2**12, "dtype": "float32"}
    states = torch.cuda.get_rng_state(), torch.get_rng_state()
    gc.collect()
    before = torch.cuda.memory_allocated()
    recording_of = dmin_trace.recording(model, samples=POINTS, out=out, transform="none", **settings)
    with recording_of as recording:
        for i in recording.samples:
            for k in recording.timesteps:
                # After a sample's last timestep its row is copied to the processor, once.
                waits = k == 2 or i == 0
                with nullcontext() if waits else no_synchronisation(), recording.step(i, k):
                    loss = loss_of(data[i : i + 1])
                    (scaler.scale(loss) if dtype == torch.float16 else loss).backward()
                    del loss
    del recording, recording_of
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert torch.equal(states[0], torch.cuda.get_rng_state()) and torch.equal(states[1], torch.get_rng_state())
    trace = open_store(out)
    rows = trace.gradients(np.arange(POINTS))
    np.testing.assert_allclose(rows[4], rows[1], atol=1e-6)
    assert (rows[0] * rows[1]).sum(-1).max() < 0.999
    for sample in (0, 3):
        for k, timestep in enumerate((50, 500, 900)):
            torch.manual_seed(slot_seed(0, k))
            noise = torch.randn_like(data[:1])
            t = torch.full((1,), timestep, device=CUDA)
            with torch.autocast("cuda", dtype or torch.float32, enabled=dtype is not None):
                clean = data[sample : sample + 1]
                model.eval()
                # Scaled as the recorder does, so that float16 rounds alike.
                loss = mse_loss(model(clean + noise * t.reshape(-1, 1) / 1000, t).float(), noise)
            scale = 1024.0 if dtype == torch.float16 else 1.0
            gradients = torch.autograd.grad(loss * scale, list(model.parameters()))
            flat = torch.cat([g.float().flatten() for g in gradients]) / scale
            plan = make_plan(flat.numel(), 2**12, 0, "rotation", trace.header.projection.width)
            expected = oracle(flat.cpu().numpy(), plan)
            expected /= np.linalg.norm(expected)
            found = rows[sample, k] / np.linalg.norm(rows[sample, k])
            assert np.linalg.norm(found - expected) <= 1e-5, (sample, k)
            assert trace.loss[sample, k] == pytest.approx(loss.item(), rel=1e-5)
    opened = dmin_trace.open_trace(out)
    with dmin_trace.recording(model, samples=2, like=opened) as again:
        for i in again.samples:
            for k in again.timesteps:
                with again.step(i, k):
                    loss = loss_of(data[(3, 5)[i]][None])
                    (scaler.scale(loss) if dtype == torch.float16 else loss).backward()
    hits = opened.top_k(again.queries, 2, "dmin").hits
    assert [row[0].sample for row in hits] == [3, 5]
    assert all(row[0].score == pytest.approx(3, abs=1e-4) for row in hits)
