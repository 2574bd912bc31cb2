"""The compressor against a slow oracle, and its statistics against OPORP's formulas."""

from __future__ import annotations

import hashlib
import math
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmin_trace.errors import CaptureError, SettingsError
from dmin_trace.project import Plan, backend_c, compress, compress_gradient, make_plan, project
from dmin_trace.project.backend_torch import MAX_JOINED_SIZE
from dmin_trace.settings import Projection

KINDS: tuple[Projection, ...] = ("rotation", "uniform")

needs_kernel = pytest.mark.skipif(backend_c.KERNEL is None, reason="_rows was not built: is there a compiler?")


@pytest.fixture(params=[pytest.param("rotation", marks=needs_kernel), "rotation in torch", "uniform"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Projection:
    """Both kinds; rotation by the compiled kernel, and as where that is missing."""
    if request.param == "rotation in torch":
        monkeypatch.setattr(backend_c, "KERNEL", None)
    return "uniform" if request.param == "uniform" else "rotation"


def small_plan(kind: Projection, length: int = 1000, dimension: int = 16, seed: int = 0, width: int = 128) -> Plan:
    """A plan of many rows: those of `make_plan` are too wide for a quick test."""
    plan = make_plan(length, dimension, seed, kind)
    return replace(plan, width=width) if kind == "rotation" else plan


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(x: np.ndarray, plan: Plan) -> np.ndarray:
    """The definition, one element at a time, in float64."""
    if plan.kind == "uniform":
        # The published code: pad, permute, signs, sum groups; only the numbers are ours.
        seed = hashlib.sha256(f"dmin_trace uniform {plan.seed} order".encode()).digest()
        padded = np.zeros(-(-plan.length // plan.dimension) * plan.dimension)
        padded[: plan.length] = x * plan.signs()
        order = np.random.RandomState(np.frombuffer(seed, "<u4")).permutation(len(padded))
        return padded[order].reshape(plan.dimension, -1).sum(-1)
    sums, sketch = np.zeros(plan.width), np.zeros(plan.dimension)
    shifts, row_signs, column_signs, signs = plan.shifts(), plan.row_signs(), plan.column_signs(), plan.signs()
    for i, value in enumerate(x):
        r, c = divmod(i, plan.width)
        sums[(c + shifts[r]) % plan.width] += value * row_signs[r] * column_signs[c]
    for k, place in enumerate(plan.order()):
        sketch[k % plan.dimension] += sums[place] * signs[place]
    return sketch


@pytest.mark.parametrize(("length", "dimension", "width"), [(1000, 16, 128), (1024, 128, 128), (5, 16, 16), (1, 1, 1)])
def test_projects_as_the_oracle_does(kind: Projection, length: int, dimension: int, width: int) -> None:
    plan, x = small_plan(kind, length, dimension, 3, width), normal(length)
    sketch, square = project([x], plan)
    np.testing.assert_allclose(sketch.numpy(), oracle(x.numpy(), plan), atol=1e-5)
    assert (sketch.shape, sketch.dtype, square.shape) == ((dimension,), torch.float32, ())
    assert square.item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)


def test_projects_as_the_oracle_does_at_full_width() -> None:
    plan, x = make_plan(300_000, 4096, 1, "rotation", 2**17), normal(300_000)
    assert plan.width == 2**17
    np.testing.assert_allclose(project(x.split(70_001), plan)[0].numpy(), oracle(x.numpy(), plan), atol=1e-4)


def test_each_element_has_one_bin_and_one_sign(kind: Projection) -> None:
    plan = small_plan(kind, 300, 16, width=64)
    columns = torch.stack([project([unit], plan)[0] for unit in torch.eye(300)])
    assert set(columns.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert (columns != 0).sum(1).tolist() == [1] * 300
    # 300 fair signs: 60 from the middle is seven standard deviations.
    assert abs(columns.sum().item()) < 120


def test_bins_are_equally_full() -> None:
    assert np.bincount(make_plan(1024, 16, 0, "uniform").bins()).tolist() == [64] * 16
    # Two elements of one row of W = v never meet.
    plan = small_plan("rotation", 512, 128)
    rows = torch.ones(4, 128)
    for r in range(4):
        alone = torch.zeros_like(rows)
        alone[r] = rows[r]
        assert project([alone], plan)[0].abs().tolist() == [1.0] * 128


def test_no_two_rows_have_the_same_shift() -> None:
    shifts = small_plan("rotation", 64 * 150, 16, width=64).shifts()
    assert [len(set(part.tolist())) for part in (shifts[:64], shifts[64:128], shifts[128:])] == [64, 64, 22]


def test_is_linear(kind: Projection) -> None:
    plan, x, y = small_plan(kind), normal(1000), normal(1000, seed=1)
    (a, _), (b, _), (both, _) = project([x], plan), project([y], plan), project([2 * x - 3 * y], plan)
    torch.testing.assert_close(both, 2 * a - 3 * b, atol=1e-4, rtol=0)
    halves = [torch.cat([x[:333], torch.zeros(667)]), torch.cat([torch.zeros(333), x[333:]])]
    torch.testing.assert_close(sum(project([half], plan)[0] for half in halves), a, atol=1e-4, rtol=0)


def test_how_the_gradient_is_cut_into_tensors_plays_no_part(kind: Projection) -> None:
    plan, x = small_plan(kind), normal(1000)
    whole, square = project([x], plan)
    cut = [*x[:300].split([1, 126, 2, 0, 171]), x[300], x[301:701].reshape(4, 10, 10), x[701:].reshape(13, 23)]
    # A transposed parameter counts in the order of its elements, not of its memory.
    cut[-1] = cut[-1].t().contiguous().t()
    assert not cut[-1].is_contiguous()
    parts, parts_square = project(iter(cut), plan)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(parts_square, square, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "shape", [(7, 13, 3, 3), (5, 6, 5, 5), (1, 90, 1, 9), (3, 8, 4, 3), (2, 5, 9, 9), (11, 1, 3, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("signs", [False, True])
def test_channels_last_count_in_the_order_of_the_elements(
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


def test_long_pieces_of_the_uniform_kind() -> None:
    plan, x = make_plan(600_001, 256, 2, "uniform"), normal(600_001)
    np.testing.assert_allclose(project([x], plan)[0].numpy(), oracle(x.numpy(), plan), atol=1e-3)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [256, 2**17])
def test_the_kernel_and_torch_differ_in_rounding_alone(
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [True, False])
def test_signs_are_taken_on_the_way(dtype: torch.dtype, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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


@needs_kernel
def test_the_kernel_is_what_adds_up_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_the_kernel_checks_what_it_is_given() -> None:
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
def test_inner_products_are_unbiased_with_oporps_variance_and_so_are_those_of_folded_sketches(kind: Projection) -> None:
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


def test_many_rows_of_a_constant_gradient() -> None:
    # Of 32 rows, many pairs lie equally far apart: without the row signs the variance is several times as large.
    ones = torch.full((4096,), 1 / 64)
    squares = [
        project([ones], small_plan("rotation", 4096, 128, seed, 128))[0].square().sum().item() for seed in range(500)
    ]
    # All but the 128 of its row and the other 31 of its column meet an element, each with probability 1 / 127.
    assert np.mean(squares) == pytest.approx(1, abs=0.025)
    assert np.var(squares) == pytest.approx(2 / 127 * (4096 - 128 - 31) / 4096, rel=0.3)


def test_one_column_of_a_power_of_two_wide_layer_at_full_width() -> None:
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


def test_a_folded_rotation_is_that_of_the_smaller_plan() -> None:
    x = normal(1000)
    sketch, _ = project([x], small_plan("rotation", dimension=64))
    for dimension in (32, 16):
        sketch = sketch[:dimension] + sketch[dimension:]
        torch.testing.assert_close(sketch, project([x], small_plan("rotation", dimension=dimension))[0])


def test_compress_gives_the_direction_and_the_gradients_norm(kind: Projection) -> None:
    plan, x = small_plan(kind), 1e-6 * normal(1000)
    vector, norm = compress_gradient([x], plan)
    assert (vector.dtype, norm.shape) == (torch.float32, ())
    assert norm.item() == pytest.approx(torch.linalg.vector_norm(x.double()).item(), rel=1e-6)
    expected = oracle(x.numpy().astype(np.float64), plan)
    np.testing.assert_allclose(vector.numpy(), expected / np.linalg.norm(expected), atol=1e-5)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_a_zero_or_broken_gradient_is_zeros_with_its_norm(kind: Projection, value: float) -> None:
    x = torch.zeros(1000)
    x[123] = value
    vector, norm = compress_gradient([x[:100], x[100:]], small_plan(kind))
    assert vector.tolist() == [0.0] * 16
    np.testing.assert_equal(norm.item(), value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_float32_whatever_the_gradient_is(kind: Projection, dtype: torch.dtype) -> None:
    # In bfloat16, 256 + 1 is 256: sums of ones would stop there. A square of 300 is infinite in float16.
    plan, x = small_plan(kind, 4000, 1), (300 * normal(4000)).to(dtype)
    sketch, square = project([x], plan)
    assert sketch.dtype == torch.float32
    np.testing.assert_allclose(sketch.numpy(), oracle(x.double().numpy(), plan), rtol=1e-4)
    assert square.item() == pytest.approx(x.double().square().sum().item(), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(project([x], plan)[0], sketch)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_each_tensor_is_let_go_before_the_next_is_asked_for(kind: Projection, dtype: type) -> None:
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


def test_no_number_is_asked_for_on_the_way(kind: Projection) -> None:
    # Tensors of the meta device have no numbers: whatever would wait for a GPU raises here.
    vector, norm = compress_gradient([torch.ones(10, 100, device="meta")], small_plan(kind))
    assert (vector.shape, norm.shape, vector.device.type) == ((16,), (), "meta")


@pytest.mark.parametrize("sizes", [[], [999], [600, 401], [1000, 1]])
def test_a_gradient_of_another_length_is_an_error(kind: Projection, sizes: list[int]) -> None:
    with pytest.raises(CaptureError, match=rf"has {sum(sizes)} elements.*expected 1000.*all trained parameters"):
        project((torch.ones(size) for size in sizes), small_plan(kind))


def test_plans_that_cannot_be_meant() -> None:
    for length, dimension, kind in ((0, 16, "rotation"), (0, 16, "uniform"), (9, 12, "rotation"), (9, 16, "dense")):
        with pytest.raises(SettingsError, match="expected"):
            make_plan(length, dimension, 0, kind)  # type: ignore[arg-type]


def test_global_generators_stand_still(kind: Projection) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    plan = make_plan(1000, 16, 0, kind)
    compress_gradient([torch.ones(1000)], plan)
    assert plan.fingerprint
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_the_fingerprint_tells_plans_apart() -> None:
    plans = [(1000, 16, 0, "rotation"), (1000, 16, 0, "uniform"), (1000, 16, 1, "rotation"), (1000, 16, 1, "uniform")]
    plans += [(1000, 32, 0, "rotation"), (1000, 32, 0, "uniform"), (999, 16, 0, "rotation"), (999, 16, 0, "uniform")]
    fingerprints = [make_plan(*plan).fingerprint for plan in plans]  # type: ignore[arg-type]
    assert len(set(fingerprints)) == len(plans)
    assert fingerprints == [make_plan(*plan).fingerprint for plan in plans]  # type: ignore[arg-type]


UNIFORM = "6625919c9ca239d53736f7754493ab4b53beb48448c55c5f464ca45b98b4aa80", [197.0, -3.0, -667.0, 49.0]
GOLDEN: dict[tuple[str, int | None], tuple[str, list[float]]] = {
    ("rotation", 2**17): (
        "4f33c38fa06307f48cacb977f9717291ec3cba176798321828eb6bc68d74ba62",
        [115.0, 314.0, -197.0, -316.0],
    ),
    ("rotation", 2**14): (
        "97bb35a8cad13aa2f3783b1ec5ff15f3882f9bdb5ab3770bb4bed125e79fcb27",
        [-239.0, -191.0, 91.0, 486.0],
    ),
    ("uniform", None): UNIFORM,
    ("uniform", 300_000): UNIFORM,
}


@pytest.mark.parametrize("of", GOLDEN)
def test_a_plan_of_today_is_that_of_the_stores_there_are(of: tuple[Projection, int]) -> None:
    # If this fails, no store written before can be queried: do not mend the numbers, mend the change.
    plan = make_plan(300_000, 16, 7, *of)
    fingerprint, values = GOLDEN[of]
    assert plan.fingerprint == fingerprint
    assert project([torch.arange(300_000.0) % 7 - 3], plan)[0][:4].tolist() == values


def test_wide_gradients_get_wide_rows() -> None:
    lengths = (1, 16, 17, 2**14, 2**17, 2**20, 2**20 + 1, 2**21 + 1, 2**23, 2**28, 2**28 + 1, 2**31)
    widths = [make_plan(length, 16, 0, "rotation").width for length in lengths]
    narrow, wide = 2**14, 2**17
    assert widths == [16, 16, 32, narrow, narrow, narrow, 2**15, 2**16, wide, wide, 2**18, 2**20]
    assert make_plan(100, 4096, 0, "rotation").width == 4096


@pytest.mark.parametrize(
    ("kind", "width"),
    [
        ("rotation", 0),
        ("rotation", 8),
        ("rotation", 48),
        ("rotation", 2**40),
        ("uniform", 992),
        ("uniform", 1001),
        ("uniform", 2**40),
    ],
)
def test_a_width_that_does_not_fit_is_refused_before_anything_is_drawn(kind: Projection, width: int) -> None:
    with pytest.raises(SettingsError, match=f"width is {width}, which does not fit 1000 elements and 16 bins"):
        make_plan(1000, 16, 0, kind, width)


def test_what_was_compressed_before_leaves_nothing_behind() -> None:
    plan, x, y = make_plan(300_000, 64, 3, "rotation"), normal(300_000), normal(300_000) * 7
    fresh = compress_gradient([x], make_plan(300_000, 64, 3, "rotation"))
    compress_gradient([y], plan)
    with pytest.raises(CaptureError, match="expected 300000"):
        compress_gradient([y[:200_000]], plan)
    project([y], plan)
    again = compress_gradient([x], plan)
    assert torch.equal(again[0], fresh[0]) and torch.equal(again[1], fresh[1])
