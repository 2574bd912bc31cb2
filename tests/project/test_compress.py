"""project and compress_gradient against a slow oracle, and their statistics against the formulas of OPORP."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from projections import KIND_PARAMS, kind_of, normal, oracle, small_plan

from dmin_trace.errors import CaptureError
from dmin_trace.project import backend_c, compress_gradient, make_plan, project
from dmin_trace.project.backend_torch import MAX_JOINED_SIZE
from dmin_trace.settings import Projection

KINDS: tuple[Projection, ...] = ("rotation", "uniform")


@pytest.fixture(params=KIND_PARAMS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Projection:
    """Each kind of projection, rotation by both backends."""
    return kind_of(request.param, monkeypatch)


@pytest.mark.parametrize(("length", "dimension", "width"), [(1000, 16, 128), (1024, 128, 128), (5, 16, 16), (1, 1, 1)])
def test_project_equals_the_oracle(kind: Projection, length: int, dimension: int, width: int) -> None:
    plan, x = small_plan(kind, length, dimension, 3, width), normal(length)
    sketch, square = project([x], plan)
    np.testing.assert_allclose(sketch.numpy(), oracle(x.numpy(), plan), atol=1e-5)
    assert (sketch.shape, sketch.dtype, square.shape) == ((dimension,), torch.float32, ())
    assert square.item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)


def test_project_equals_the_oracle_at_full_width() -> None:
    plan, x = make_plan(300_000, 4096, 1, "rotation", 2**17), normal(300_000)
    assert plan.width == 2**17
    np.testing.assert_allclose(project(x.split(70_001), plan)[0].numpy(), oracle(x.numpy(), plan), atol=1e-4)


def test_project_gives_each_element_one_bin_and_one_sign(kind: Projection) -> None:
    plan = small_plan(kind, 300, 16, width=64)
    columns = torch.stack([project([unit], plan)[0] for unit in torch.eye(300)])
    assert set(columns.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert (columns != 0).sum(1).tolist() == [1] * 300
    # 300 fair signs: 60 from the middle is seven standard deviations.
    assert abs(columns.sum().item()) < 120


def test_project_is_linear(kind: Projection) -> None:
    plan, x, y = small_plan(kind), normal(1000), normal(1000, seed=1)
    (a, _), (b, _), (both, _) = project([x], plan), project([y], plan), project([2 * x - 3 * y], plan)
    torch.testing.assert_close(both, 2 * a - 3 * b, atol=1e-4, rtol=0)
    halves = [torch.cat([x[:333], torch.zeros(667)]), torch.cat([torch.zeros(333), x[333:]])]
    torch.testing.assert_close(sum(project([half], plan)[0] for half in halves), a, atol=1e-4, rtol=0)


def test_project_does_not_depend_on_how_the_gradient_is_cut(kind: Projection) -> None:
    plan, x = small_plan(kind), normal(1000)
    whole, square = project([x], plan)
    cut = [*x[:300].split([1, 126, 2, 0, 171]), x[300], x[301:701].reshape(4, 10, 10), x[701:].reshape(13, 23)]
    # A transposed parameter counts in the order of its elements, not of its memory.
    cut[-1] = cut[-1].t().contiguous().t()
    assert not cut[-1].is_contiguous()
    parts, parts_square = project(iter(cut), plan)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(parts_square, square, rtol=1e-6, atol=0)


def test_project_takes_long_tensors_of_the_uniform_kind() -> None:
    plan, x = make_plan(600_001, 256, 2, "uniform"), normal(600_001)
    np.testing.assert_allclose(project([x], plan)[0].numpy(), oracle(x.numpy(), plan), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [True, False])
def test_project_takes_signs(dtype: torch.dtype, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr(backend_c, "KERNEL", None)
    plan, x = small_plan("rotation", 2560, 64, 4, 256), normal(2560).to(dtype)
    x[::7] = 0
    tensors = [x[:77], x[77:300], x[300:2400], x[2400:2500].view(10, 10).t(), x[2500:]]
    for kind in (plan, small_plan("uniform", 2560, 64, 4)):
        ours, square = project(tensors, kind, signs=True)
        expected, _ = project([torch.sign(t.float()) for t in tensors], kind)
        torch.testing.assert_close(ours, expected)
        assert square == int((x != 0).sum())
    for wrong in (torch.nan, torch.inf, -torch.inf):
        x[5] = wrong
        sketch, norm = compress_gradient([x], plan, signs=True)
        assert torch.isnan(norm) and not sketch.any()


LENGTH, DIMENSION, WIDTH, SEEDS = 1024, 32, 128, 1000


def gradients_with_structure() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs with a cosine near 0.6, random or as regular as can be; each pair of unit vectors."""
    dense, noise = normal(2, LENGTH, seed=5).double().numpy()
    masks = {"dense": np.ones(LENGTH)}
    for stride in (DIMENSION // 2, DIMENSION, WIDTH):
        masks[f"stride {stride}"] = (np.arange(LENGTH) % stride == 3).astype(float)
    pairs = {name: (mask * dense, mask * (0.6 * dense + 0.8 * noise)) for name, mask in masks.items()}
    pairs["ones"] = np.ones(LENGTH), np.ones(LENGTH)
    pairs["ones at stride"] = masks[f"stride {DIMENSION}"], masks[f"stride {DIMENSION}"]
    return {name: (x / np.linalg.norm(x), y / np.linalg.norm(y)) for name, (x, y) in pairs.items()}


def expected_variance(x: np.ndarray, y: np.ndarray, kind: Projection, dimension: int) -> float:
    """The sum, over the pairs i and j, of the chance that they meet times x_i^2 y_j^2 + x_i y_i x_j y_j."""

    def pairs(x: np.ndarray, y: np.ndarray) -> float:
        return float((x**2).sum() * (y**2).sum() + (x * y).sum() ** 2 - 2 * (x**2 * y**2).sum())

    if kind == "uniform":
        return pairs(x, y) * (LENGTH / dimension - 1) / (LENGTH - 1)
    x_rows, y_rows = x.reshape(-1, WIDTH), y.reshape(-1, WIDTH)
    # Two of one row, or of one column since no two rows have one shift, are never added to the same of the W sums.
    apart = sum(pairs(a, b) for a, b in [*zip(x_rows, y_rows, strict=True), *zip(x_rows.T, y_rows.T, strict=True)])
    meet = (WIDTH / dimension - 1) / (WIDTH - 1)
    return apart * meet + (pairs(x, y) - apart) * (1 + (WIDTH - 2) * meet) / (WIDTH - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_project_keeps_inner_products_with_the_variance_of_oporp_folded_or_not(kind: Projection) -> None:
    pairs = gradients_with_structure()
    found: dict[tuple[str, int], list[float]] = {}
    tensors = {name: [torch.from_numpy(z).float() for z in pair] for name, pair in pairs.items()}
    for seed in range(SEEDS):
        plan = small_plan(kind, LENGTH, DIMENSION, seed, WIDTH)
        for name, pair in tensors.items():
            a, b = (project([z], plan)[0] for z in pair)
            for dimension in (DIMENSION, DIMENSION // 2, DIMENSION // 4):
                a, b = (z.view(-1, dimension).sum(0) for z in (a, b))
                found.setdefault((name, dimension), []).append(float(a @ b))
    for (name, dimension), products in found.items():
        x, y = pairs[name]
        variance = expected_variance(x, y, kind, dimension)
        error = np.mean(products) - x @ y
        # Four and a half standard errors, for 18 cases a kind.
        assert abs(error) < 4.5 * np.sqrt(variance / SEEDS), (name, dimension, error)
        # The standard error of a variance from 1000 products is 5 to 7 %; two rows whose shifts differ by
        # W / 2 add 1 or 2 %.
        assert np.var(products) == pytest.approx(variance, rel=0.2), (name, dimension)


def test_project_of_a_constant_gradient_keeps_its_norm() -> None:
    # Of 32 rows, many pairs lie equally far apart: without the row signs the variance is several times as large.
    ones = torch.full((4096,), 1 / 64)
    squares = [
        project([ones], small_plan("rotation", 4096, 128, seed, 128))[0].square().sum().item() for seed in range(500)
    ]
    # All but the 128 of its row and the other 31 of its column meet an element, each with probability 1 / 127.
    assert np.mean(squares) == pytest.approx(1, abs=0.025)
    assert np.var(squares) == pytest.approx(2 / 127 * (4096 - 128 - 31) / 4096, rel=0.3)


def test_project_of_one_column_keeps_its_norm() -> None:
    layer = torch.zeros(256, 4096)
    layer[:, 17] = 1 / 16
    squares = []
    for seed in range(40):
        plan = make_plan(2**20, 4096, seed, "rotation")
        assert plan.width < plan.length
        squares.append(project([layer], plan)[0].square().sum().item())
    # The standard deviation is sqrt(2 / 4096) = 0.022; that of the mean of 40, 0.0035.
    assert np.mean(squares) == pytest.approx(1, abs=0.015)
    assert 0.012 < np.std(squares) < 0.032


def test_project_folds_to_the_plan_of_a_smaller_dimension() -> None:
    x = normal(1000)
    sketch, _ = project([x], small_plan("rotation", dimension=64))
    for dimension in (32, 16):
        sketch = sketch[:dimension] + sketch[dimension:]
        torch.testing.assert_close(sketch, project([x], small_plan("rotation", dimension=dimension))[0])


def test_compress_gradient_returns_the_direction_and_the_norm(kind: Projection) -> None:
    plan, x = small_plan(kind), 1e-6 * normal(1000)
    vector, norm = compress_gradient([x], plan)
    assert (vector.dtype, norm.shape) == (torch.float32, ())
    assert norm.item() == pytest.approx(torch.linalg.vector_norm(x.double()).item(), rel=1e-6)
    expected = oracle(x.numpy().astype(np.float64), plan)
    np.testing.assert_allclose(vector.numpy(), expected / np.linalg.norm(expected), atol=1e-5)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_compress_gradient_of_zeros_or_nan_is_zeros(kind: Projection, value: float) -> None:
    x = torch.zeros(1000)
    x[123] = value
    vector, norm = compress_gradient([x[:100], x[100:]], small_plan(kind))
    assert vector.tolist() == [0.0] * 16
    np.testing.assert_equal(norm.item(), value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_project_sums_in_float32_for_every_dtype(kind: Projection, dtype: torch.dtype) -> None:
    # In bfloat16, 256 + 1 is 256: sums of ones would stop there. A square of 300 is infinite in float16.
    plan, x = small_plan(kind, 4000, 1), (300 * normal(4000)).to(dtype)
    sketch, square = project([x], plan)
    assert sketch.dtype == torch.float32
    np.testing.assert_allclose(sketch.numpy(), oracle(x.double().numpy(), plan), rtol=1e-4)
    assert square.item() == pytest.approx(x.double().square().sum().item(), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(project([x], plan)[0], sketch)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_project_frees_each_tensor_before_the_next(kind: Projection, dtype: type) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def make() -> torch.Tensor:
        array = np.ones((10, MAX_JOINED_SIZE // 10 + 1), dtype)
        alive.append(weakref.ref(array))
        # The tensor's memory is the array's, and so are the views of it.
        return torch.from_numpy(array)

    def stream() -> Iterator[torch.Tensor]:
        for _ in range(4):
            assert all(array() is None for array in alive)
            yield make()

    project(stream(), small_plan(kind, 40 * (MAX_JOINED_SIZE // 10 + 1)))
    assert len(alive) == 4


def test_compress_gradient_does_not_synchronise_the_device(kind: Projection) -> None:
    # Tensors of the meta device have no numbers: whatever would wait for a GPU raises here.
    vector, norm = compress_gradient([torch.ones(10, 100, device="meta")], small_plan(kind))
    assert (vector.shape, norm.shape, vector.device.type) == ((16,), (), "meta")


@pytest.mark.parametrize("sizes", [[], [999], [600, 401], [1000, 1]])
def test_project_refuses_a_gradient_of_another_length(kind: Projection, sizes: list[int]) -> None:
    with pytest.raises(CaptureError, match=rf"has {sum(sizes)} elements.*expected 1000.*all trained parameters"):
        project((torch.ones(size) for size in sizes), small_plan(kind))


def test_compress_gradient_leaves_nothing_behind() -> None:
    plan, x, y = make_plan(300_000, 64, 3, "rotation"), normal(300_000), normal(300_000) * 7
    fresh = compress_gradient([x], make_plan(300_000, 64, 3, "rotation"))
    compress_gradient([y], plan)
    with pytest.raises(CaptureError, match="expected 300000"):
        compress_gradient([y[:200_000]], plan)
    project([y], plan)
    again = compress_gradient([x], plan)
    assert torch.equal(again[0], fresh[0]) and torch.equal(again[1], fresh[1])
