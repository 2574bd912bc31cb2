"""Each method that DMin is compared with against the same equation written another way, in small dense float64."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from dmin_trace.errors import QueryError, SettingsError, WeightsError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "reproduce"))

import baselines

N, Q, T, P = 12, 3, 4, 20


def vectors(*shape: int, seed: int = 0) -> np.ndarray:
    """Random vectors that, as gradients do, share a direction and differ in length."""
    generator = np.random.default_rng([seed, *shape])
    common = np.random.default_rng(7).standard_normal(shape[-1])
    lengths = generator.uniform(0.3, 3, size=(*shape[:-1], 1))
    return lengths * (common + generator.standard_normal(shape))


def close(scores: np.ndarray, expected: np.ndarray, tolerance: float = 1e-10) -> None:
    """Equal to the tolerance, relative to the largest score; of the same shape; not all alike."""
    assert scores.dtype == np.float64
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(scores, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def inverse_scores(train: np.ndarray, query: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """g(q)' matrix^-1 g(i), by the inverse and two loops."""
    inverse = np.linalg.inv(matrix)
    return np.array([[float(q @ inverse @ i) for i in train] for q in query])


def fisher(train: np.ndarray) -> np.ndarray:
    """The mean outer product."""
    return sum(np.outer(g, g) for g in train) / len(train)


# Chance and likeness


def test_random_scores_are_normal_and_repeat() -> None:
    scores = baselines.random_scores(40, 500, seed=3)
    assert scores.shape == (40, 500)
    assert abs(scores.mean()) < 0.03 and abs(scores.std() - 1) < 0.03
    assert np.array_equal(scores, baselines.random_scores(40, 500, seed=3))
    assert not np.array_equal(scores, baselines.random_scores(40, 500, seed=4))


def images(count: int, channels: int = 1, side: int = 8, seed: int = 0) -> np.ndarray:
    """(count, channels, side, side) in [0, 1], of 8 bits."""
    generator = np.random.default_rng([seed, count, channels, side])
    return (generator.integers(0, 256, (count, channels, side, side)) / 255).astype(np.float32)


def slow_ssim(a: np.ndarray, b: np.ndarray, window: int) -> float:
    """Wang et al., equation 13, one window after another."""
    c1, c2 = 0.01**2, 0.03**2
    values = []
    for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        for top in range(x.shape[0] - window + 1):
            for left in range(x.shape[1] - window + 1):
                u = x[top : top + window, left : left + window].ravel()
                v = y[top : top + window, left : left + window].ravel()
                (var_u, both), (_, var_v) = np.cov(u, v)
                up = (2 * u.mean() * v.mean() + c1) * (2 * both + c2)
                values.append(up / ((u.mean() ** 2 + v.mean() ** 2 + c1) * (var_u + var_v + c2)))
    return float(np.mean(values))


@pytest.mark.skipif(find_spec("skimage") is None, reason="ssim needs scikit-image")
@pytest.mark.parametrize(("channels", "side", "window", "used"), [(1, 8, None, 3), (3, 8, 5, 5), (1, 17, None, 7)])
def test_ssim_is_that_of_every_window(channels: int, side: int, window: int | None, used: int) -> None:
    train, query = images(4, channels, side), images(2, channels, side, seed=1)
    query[1] = train[2]
    expected = np.array([[slow_ssim(q, i, used) for i in train] for q in query])
    scores = baselines.ssim(train, query, window)
    close(scores, expected, 1e-5)
    assert scores[1].argmax() == 2 and scores[1, 2] == pytest.approx(1)


@pytest.mark.skipif(find_spec("skimage") is None, reason="ssim needs scikit-image")
def test_ssim_refuses_what_it_would_answer_wrongly() -> None:
    with pytest.raises(QueryError, match=r"values from -0\.99\d* to 1;"):
        baselines.ssim(images(2) * 2 - 1, images(1))
    with pytest.raises(QueryError, match="both must be alike"):
        baselines.ssim(images(2), images(1, side=9))
    for window in (4, 9, 1):
        with pytest.raises(SettingsError, match="an odd number from 3 to 8"):
            baselines.ssim(images(2), images(1), window)


def clip_folder(folder: Path) -> Path:
    """A tiny random CLIP with its processor, as transformers writes them."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = {**small, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**small, "image_size": 24, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    pixels = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    CLIPProcessor(image_processor=pixels, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_clip_similarity_is_the_cosine_of_image_features(
    channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baselines.likeness.BATCH", 2)
    folder = clip_folder(tmp_path / "clip")
    train, query = images(5, channels, side=9), images(2, channels, side=9, seed=1)
    query[1] = train[4]
    model = CLIPModel.from_pretrained(folder).eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)

    def features(image: np.ndarray) -> torch.Tensor:
        grey_or_not = np.broadcast_to((image * 255).round().astype(np.uint8), (3, 9, 9)).transpose(1, 2, 0)
        shown = Image.fromarray(grey_or_not.copy()).resize((24, 24), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(shown, dtype=np.float32) / 255).permute(2, 0, 1)
        with torch.no_grad():
            found = model.get_image_features(pixel_values=((pixels - mean) / deviation)[None])
        return (found if isinstance(found, torch.Tensor) else found.pooler_output)[0]

    seen = [features(image) for image in train]
    expected = [[torch.cosine_similarity(features(q), i, dim=0).item() for i in seen] for q in query]
    scores = baselines.clip_similarity(train, query, folder)
    close(scores, np.array(expected), 1e-5)
    assert scores[1].argmax() == 4 and scores[1, 4] == pytest.approx(1)


def test_clip_similarity_says_that_it_has_no_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere has no config\.json: clip_similarity needs a local folder"):
        baselines.clip_similarity(images(2), images(1), tmp_path / "nowhere")
    folder = clip_folder(tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"lacks weights of a CLIP model: visual_projection\.weight"):
        baselines.clip_similarity(images(2), images(1), folder)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="no CLIP model that transformers can load"):
        baselines.clip_similarity(images(2), images(1), folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no CLIP model that transformers can load"):
        baselines.clip_similarity(images(2), images(1), folder)


# DMin without compression


@pytest.mark.parametrize("normalised", [False, True])
def test_inner_products_are_those_of_each_timestep(normalised: bool) -> None:
    train, query = vectors(N, T, P), vectors(Q, T, P, seed=1)
    expected = np.zeros((Q, N))
    for q in range(Q):
        for i in range(N):
            for t in range(T):
                product = math.fsum(query[q, t] * train[i, t])
                lengths = math.sqrt(math.fsum(query[q, t] ** 2)) * math.sqrt(math.fsum(train[i, t] ** 2))
                expected[q, i] += product / lengths if normalised else product
    close(baselines.inner_products(train, query, normalised), expected, 1e-13)


def test_a_gradient_of_zero_adds_nothing() -> None:
    train, query = vectors(N, T, P), vectors(Q, T, P, seed=1)
    train[3, 1] = 0
    rest = [0, 2, 3]
    scores = baselines.inner_products(train, query, normalised=True)
    without = baselines.inner_products(train[:, rest], query[:, rest], normalised=True)
    np.testing.assert_allclose(scores[:, 3], without[:, 3], atol=1e-13)


def test_float32_and_tensors_lose_nothing_but_their_own_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    # As at noisy timesteps: cosines of 0.9999, told apart after the fourth digit; in blocks, the last of them shorter.
    monkeypatch.setattr("baselines.products.ELEMENTS", 1 << 15)
    common = np.random.default_rng(1).standard_normal(70_000)
    train = (common + 0.01 * np.random.default_rng(2).standard_normal((5, 1, 70_000))).astype(np.float32)
    exact = baselines.inner_products(train.astype(np.float64), train.astype(np.float64), normalised=True)
    scores = baselines.inner_products(torch.from_numpy(train), torch.from_numpy(train), normalised=True)
    assert np.array_equal(scores, exact)
    np.testing.assert_allclose(np.diag(scores), 1, rtol=0, atol=1e-13)
    by_hand = np.array([[a[0].astype(np.longdouble) @ b[0].astype(np.longdouble) for a in train] for b in train])
    unnormalised = baselines.inner_products(train, train, normalised=False)
    np.testing.assert_allclose(unnormalised, by_hand.astype(np.float64), rtol=1e-13)


# A ridge over all training samples


@pytest.mark.parametrize("length", [P, N, 5])
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10])
def test_trak_is_the_explicit_inverse(length: int, ridge: float) -> None:
    train, query = vectors(N, length), vectors(Q, length, seed=1)
    strength = ridge * np.mean([phi @ phi for phi in train])
    expected = inverse_scores(train, query, train.T @ train + strength * np.eye(length))
    close(baselines.trak(train, query, ridge), expected)
    close(baselines.d_trak(train, query, ridge), expected)


def test_trak_is_influence_on_a_linear_model() -> None:
    # Least squares with a ridge: leaving a sample out moves the prediction by its score times its residual, and by the
    # leverage that TRAK leaves away.
    features, targets = vectors(N, 5), np.random.default_rng(5).standard_normal(N)
    query = vectors(1, 5, seed=1)
    penalty = 0.1 * np.mean([phi @ phi for phi in features]) * np.eye(5)

    def prediction(kept: np.ndarray) -> float:
        return float(
            query[0] @ np.linalg.solve(features[kept].T @ features[kept] + penalty, features[kept].T @ targets[kept])
        )

    scores = baselines.trak(features, query, 0.1)[0]
    leverage = np.diag(baselines.trak(features, features, 0.1))
    whole = np.linalg.solve(features.T @ features + penalty, features.T @ targets)
    residuals = targets - features @ whole
    moved = [prediction(np.arange(N)) - prediction(np.delete(np.arange(N), i)) for i in range(N)]
    np.testing.assert_allclose(scores * residuals / (1 - leverage), moved, atol=1e-12)


def test_journey_trak_is_the_mean_of_the_steps_scores() -> None:
    train, journey = vectors(N, P), vectors(Q, 6, P, seed=1)
    matrix = train.T @ train + 0.01 * np.mean([phi @ phi for phi in train]) * np.eye(P)
    steps = [inverse_scores(train, journey[:, s], matrix) for s in range(6)]
    close(baselines.journey_trak(train, journey, 0.01), sum(steps) / 6)
    close(baselines.journey_trak(train, journey[:, 2:3], 0.01), steps[2])


# The inverse Hessian, approximated


def test_lissa_is_its_series_step_for_step() -> None:
    train, query = vectors(N, P), vectors(Q, P, seed=1)
    strength = 0.1 * np.mean(train**2)
    hessian = fisher(train) + strength * np.eye(P)
    for depth, scale in ((1, 50.0), (2, 50.0), (7, 200.0)):
        expected = np.zeros((Q, N))
        for q in range(Q):
            r = query[q]
            for _ in range(depth):
                r = query[q] + r - hessian @ r / scale
            expected[q] = [r @ g / scale for g in train]
        close(baselines.lissa(train, query, 0.1, depth=depth, scale=scale), expected)


def test_lissa_converges_to_the_closed_form() -> None:
    train, query = vectors(N, P), vectors(Q, P, seed=1)
    expected = inverse_scores(train, query, fisher(train) + 0.5 * np.mean(train**2) * np.eye(P))
    close(baselines.lissa(train, query, 0.5, depth=5000), expected)
    close(N * baselines.trak(train, query, 0.5 * N / P), expected)
    early = baselines.lissa(train, query, 0.5, depth=3)
    assert np.abs(early - expected).max() > 0.1 * np.abs(expected).max()


def test_lissa_with_batches_comes_near_the_closed_form() -> None:
    train, query = vectors(N, P), vectors(Q, P, seed=1)
    expected = inverse_scores(train, query, fisher(train) + 5 * np.mean(train**2) * np.eye(P))

    def error(repeats: int) -> float:
        scores = baselines.lissa(train, query, 5, depth=40, batch=4, repeats=repeats)
        return float(np.linalg.norm(scores - expected) / np.linalg.norm(expected))

    assert error(30) < 0.04 < 0.1 < error(1) < 1
    whole = baselines.lissa(train, query, 5, depth=30, batch=N, scale=1000.0)
    close(whole, baselines.lissa(train, query, 5, depth=30, scale=1000.0))


def test_lissa_says_when_it_diverges() -> None:
    with pytest.raises(QueryError, match="diverged at a scale of 1e-06"):
        baselines.lissa(vectors(N, P), vectors(Q, P), depth=500, scale=1e-6)


@pytest.mark.parametrize("blocks", [None, [P], [3, 10, 7]])
def test_datainf_is_the_mean_of_inverses(blocks: list[int] | None) -> None:
    train, query = vectors(N, P), vectors(Q, P, seed=1)
    # Layers have gradients of other sizes, and each its own damping.
    train[:, 3:13] *= 100
    query[:, 3:13] *= 100
    expected = np.zeros((Q, N))
    start = 0
    for size in blocks or [P]:
        g, v = train[:, start : start + size], query[:, start : start + size]
        strength = 0.1 * np.mean(g**2)
        inverse = sum(np.linalg.inv(np.outer(j, j) + strength * np.eye(size)) for j in g) / N
        expected += np.array([[a @ inverse @ b for b in g] for a in v])
        start += size
    close(baselines.datainf(train, query, 0.1, blocks), expected)


def test_datainf_and_lissa_agree_where_nothing_is_swapped() -> None:
    # One training sample: the mean of inverses is the inverse of the mean.
    train, query = vectors(1, P), vectors(Q, P, seed=1)
    close(baselines.datainf(train, query, 1), baselines.lissa(train, query, 1, depth=100))


def test_a_layer_without_gradient_has_no_influence() -> None:
    train, query = vectors(N, P), vectors(Q, P, seed=1)
    train[:, :5] = 0
    scores = baselines.datainf(train, query, 0.1, [5, P - 5])
    close(scores, baselines.datainf(train[:, 5:], query[:, 5:], 0.1))


def test_the_identity_is_plain_inner_products() -> None:
    train, query = vectors(N, P), vectors(Q, P, seed=1)
    close(baselines.datainf_identity(train, query), np.array([[math.fsum(q * i) for i in train] for q in query]), 1e-13)


def test_large_damping_leaves_the_identity() -> None:
    train, query = vectors(N, P), vectors(Q, P, seed=1)
    plain = baselines.datainf_identity(train, query)
    mean_square, mean_norm = np.mean(train**2), np.mean([g @ g for g in train])
    close(1e9 * mean_square * baselines.datainf(train, query, 1e9), plain, 1e-6)
    close(1e9 * mean_norm * baselines.trak(train, query, 1e9), plain, 1e-6)


# Bad input


def test_bad_input_gets_one_clear_error() -> None:
    train, query = vectors(N, P), vectors(Q, P, seed=1)
    with pytest.raises(QueryError, match="19 and of 20 elements"):
        baselines.trak(train, query[:, 1:], 0.1)
    with pytest.raises(QueryError, match=r"train has the shape \(12, 20, 1\); \(N, P\) is expected"):
        baselines.trak(train[..., None], query, 0.1)
    with pytest.raises(QueryError, match="query is int64"):
        baselines.datainf(train, np.ones((Q, P), dtype=np.int64))
    with pytest.raises(QueryError, match="not finite"):
        baselines.datainf_identity(np.where(train > 2, np.nan, train), query)
    with pytest.raises(QueryError, match="are zero"):
        baselines.trak(0 * train, query, 0.1)
    with pytest.raises(QueryError, match="4 timesteps, query 3"):
        baselines.inner_products(vectors(N, T, P), vectors(Q, T - 1, P), normalised=True)
    with pytest.raises(SettingsError, match="ridge is 0"):
        baselines.trak(train, query, 0)
    with pytest.raises(SettingsError, match="damping is nan"):
        baselines.datainf(train, query, math.nan)
    with pytest.raises(SettingsError, match="20 together"):
        baselines.datainf(train, query, 0.1, [5, 5])
    with pytest.raises(SettingsError, match="depth is 0"):
        baselines.lissa(train, query, depth=0)
    with pytest.raises(SettingsError, match="A batch of 13"):
        baselines.lissa(train, query, depth=1, batch=13)


# What DMin's published code computes: the numbers are those of a run of it, at commit a550120


def published_unet() -> UNet2DModel:
    """A small model with the weights of that run, 0.3 sin k in the k-th."""
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        add_attention=False,
    ).eval()
    start = 0
    with torch.no_grad():
        for parameter in unet.parameters():
            numbers = torch.arange(start, start + parameter.numel(), dtype=torch.float64)
            parameter.copy_(0.3 * torch.sin(numbers).reshape(parameter.shape))
            start += parameter.numel()
    return unet


IMAGE = torch.from_numpy((np.arange(64) * 37 % 256).astype(np.float32).reshape(1, 8, 8) / 255)
NOISE = (torch.cos(torch.arange(64, dtype=torch.float64) * 1.7) * 1.4).float().reshape(1, 8, 8)


def published_scheduler() -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")


def test_the_published_timesteps_are_cubic() -> None:
    schedule = published_scheduler().timesteps
    assert baselines.published_timesteps(4, schedule) == [999, 984, 874, 578]
    assert baselines.published_timesteps(5, schedule) == [999, 991, 935, 783, 487]
    assert baselines.published_timesteps(10, schedule) == [999, 998, 991, 972, 935, 874, 783, 656, 487, 270]
    assert baselines.published_timesteps(12, schedule) == [999, 999, 995, 984, 962, 927, 874, 801, 703, 578, 421, 229]
    with pytest.raises(SettingsError, match="must go down"):
        baselines.published_timesteps(4, range(1000))
    with pytest.raises(SettingsError, match="count is 0"):
        baselines.published_timesteps(0, schedule)


def test_the_published_loss_is_that_of_the_published_code() -> None:
    unet, scheduler = published_unet(), published_scheduler()
    for timestep, expected in ((999, 1.03719783), (984, 1.03727579), (874, 1.03750622), (578, 1.03670740)):
        loss = baselines.published_loss(unet, scheduler, IMAGE, timestep, NOISE)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(SettingsError, match=r"takes \[0, 1\]"):
        baselines.published_loss(unet, scheduler, IMAGE * 2 - 1, 0, NOISE)
    with pytest.raises(SettingsError, match=r"both must be one \(C, H, W\)"):
        baselines.published_loss(unet, scheduler, IMAGE[None], 0, NOISE[None])


def test_the_published_gradients_are_those_of_the_published_code() -> None:
    unet = published_unet()
    gradients = baselines.published_gradients(unet, published_scheduler(), IMAGE, [999, 984, 874, 578], NOISE)
    assert gradients.shape == (4, 10405) and gradients.dtype == torch.float32
    norms = [0.42551273, 0.42594942, 0.42836872, 0.42740589]
    np.testing.assert_allclose(gradients.norm(dim=1), norms, rtol=1e-5)
    np.testing.assert_allclose(gradients.abs().sum(dim=1), [8.9725876, 8.9864235, 8.8797455, 8.6455546], rtol=1e-4)
    np.testing.assert_allclose(gradients[3, [0, 100, -1]], [-0.00896342, 0.00043182, -0.30860567], rtol=1e-3)
    scores = baselines.inner_products(gradients[None], gradients[None].flip(1), normalised=True)
    np.testing.assert_allclose(scores, 2 * 0.98843741 + 2 * 0.99917805, rtol=1e-5)
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_published_gradients_are_of_adapters_where_there_are_any() -> None:
    unet = published_unet()
    unet.conv_out.register_parameter("lora_unused", torch.nn.Parameter(torch.zeros(3)))
    unet.conv_out.lora_scale = torch.nn.Parameter(torch.ones(1))
    unet.conv_out.register_forward_hook(lambda layer, _, out: out * layer.lora_scale)
    gradients = baselines.published_gradients(unet, published_scheduler(), IMAGE, [500], NOISE)
    shift = 1e-2
    losses = []
    for value in (1 + shift, 1 - shift):
        torch.nn.init.constant_(unet.conv_out.lora_scale, value)
        losses.append(baselines.published_loss(unet, published_scheduler(), IMAGE, 500, NOISE).item())
    assert gradients.shape == (1, 1)
    assert gradients.item() == pytest.approx((losses[0] - losses[1]) / (2 * shift), rel=1e-3)


def test_the_published_compression_is_that_of_the_published_code() -> None:
    numbers = torch.arange(1, 23, dtype=torch.float32)[None]
    length = math.sqrt(3795)  # of 1 to 22
    eight = baselines.published_compression(numbers, 8)
    np.testing.assert_allclose(eight[0] * length, [-10, -15, -45, -2, 10, 16, 14, -11], rtol=1e-5)
    four = baselines.published_compression(numbers, 4, largest=8)
    np.testing.assert_allclose(four[0] * length, [-25, -47, 26, 3], rtol=1e-5)
    with pytest.raises(SettingsError, match="3000 does not divide 4096"):
        baselines.published_compression(numbers, 3000, largest=4096)


def test_the_published_noise_repeats_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    noise = baselines.published_noise((3, 32, 32))
    assert torch.equal(noise, baselines.published_noise((3, 32, 32)))
    assert not torch.equal(noise, baselines.published_noise((3, 32, 32), seed=1))
    assert abs(noise.std().item() - 1) < 0.05
    assert torch.equal(state, torch.get_rng_state())
