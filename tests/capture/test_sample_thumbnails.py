"""The thumbnails of a capture: what they are made from, the range of their values, and their size."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from points import POINTS, denoiser, loss_of
from sklearn.datasets import load_digits, load_sample_image
from tiny import EXAMPLE, digit_folder, run

import dmin_trace
from dmin_trace.capture.thumbnails import SampleThumbnails, find_picture, picture_in, read_file, value_range
from dmin_trace.query import open_trace
from dmin_trace.store import Store, ThumbnailFacts, encode_webp, max_thumbnail_bytes, open_store

PHOTO = Image.fromarray(load_sample_image("china.jpg"))
GENERATOR = np.random.default_rng(0)


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def made(batches: list[Any], side: int = 128, **files: str) -> tuple[ThumbnailFacts | None, list[bytes]]:
    """The thumbnails of a capture of these batches, as a recorder makes them."""
    thumbnails = SampleThumbnails(side)
    fetch = thumbnails.watch(lambda sample: batches[sample])
    for sample in range(len(batches)):
        fetch(sample)
    thumbnails.begin(batches[0])
    thumbnails.decide()
    found = []
    for batch in batches:
        thumbnails.begin(batch)
        found.append(thumbnails.make())
    return thumbnails.facts, found


def picture(sample: int, channels: int = 3) -> np.ndarray:
    """A picture of 8 x 6 pixels, (H, W, C) uint8, small enough to be kept as it is; the second one is bright."""
    low = 128 if sample == 1 else 0
    return np.random.default_rng(sample).integers(low, 256, (6, 8, channels), np.uint8)


SCALES = {
    "[-1, 1]": (lambda p: p / 127.5 - 1, (-1, 1)),
    "[0, 1]": (lambda p: p / 255, (0, 1)),
    "[0, 255]": (lambda p: p.astype(np.float32), (0, 255)),
    "bytes": (lambda p: p, (0, 255)),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SCALES)
def test_the_range_of_the_values_is_found_for_all_samples(name: str, channels: int, dtype: torch.dtype) -> None:
    """The second sample has no values below the middle, which alone would be another range."""
    scale, expected = SCALES[name]
    tensors = [torch.from_numpy(scale(picture(k, channels))).permute(2, 0, 1)[None] for k in range(4)]
    batches = [{"pixel_values": t if t.dtype == torch.uint8 else t.to(dtype)} for t in tensors]
    facts, found = made(batches)
    assert facts == ThumbnailFacts(side=128, entry="pixel_values", low=expected[0], high=expected[1])
    # bfloat16 has 8 bits of precision.
    near = 0 if dtype != torch.bfloat16 or name == "bytes" else 1
    for k, data in enumerate(found):
        difference = decoded(data).astype(int) - picture(k, channels)
        assert np.abs(difference).max() <= near


def test_another_range_reaches_from_black_to_white() -> None:
    assert value_range(-0.42, 2.82) == (-0.42, 2.82)
    assert value_range(-2.1, 2.6) == (-2.1, 2.6)
    assert value_range(-1.05, 1.04) == (-1, 1)
    assert value_range(-0.03, 1.02) == (0, 1)
    assert value_range(0, 0) == (0, 1)
    low, high = value_range(7, 7)
    assert low < high
    mean, deviation = 0.13, 0.31
    batches = [[(torch.from_numpy(picture(k, 1) / 255).permute(2, 0, 1)[None] - mean) / deviation] for k in range(4)]
    batches[0][0][0, 0, 0, :2] = (torch.tensor([0.0, 1.0]) - mean) / deviation
    facts, found = made(batches)
    assert facts is not None and facts.entry == "0"
    for k, data in enumerate(found[1:], start=1):
        assert np.abs(decoded(data).astype(int) - picture(k, 1)).max() <= 1


def test_a_range_that_a_later_sample_breaks_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    thumbnails = SampleThumbnails(128)
    bright, dark = torch.full((1, 3, 4, 4), 0.5), torch.full((1, 3, 4, 4), -0.5)
    thumbnails.begin([bright])
    thumbnails.decide()
    with caplog.at_level(logging.WARNING, "dmin_trace"):
        for tensor in (bright, dark, dark):
            thumbnails.begin([tensor])
            assert thumbnails.make()
    assert len(caplog.records) == 1 and "darker than the pictures" in caplog.text


@pytest.mark.parametrize("least", [128, 200, 240])
@pytest.mark.parametrize("name", ["[-1, 1]", "[0, 1]"])
def test_pictures_that_are_all_bright_are_told_by_their_files(tmp_path: Path, name: str, least: int) -> None:
    scale, expected = SCALES[name]
    files, batches, pixels = [], [], []
    for k in range(8):
        pixels.append(np.random.default_rng(k).integers(least, 256, (40, 60, 3), np.uint8))
        Image.fromarray(pixels[-1]).save(tmp_path / f"{k}.png")
        files.append(str(tmp_path / f"{k}.png"))
        # The script crops them.
        batches.append({"pixel_values": torch.from_numpy(scale(pixels[-1])).permute(2, 0, 1)[None, :, :32, 20:52]})
    thumbnails = SampleThumbnails(128)
    fetch = thumbnails.watch(lambda sample: batches[sample], lambda sample: files[sample])
    for sample in range(8):
        fetch(sample)
    thumbnails.begin(batches[0], files[0])
    thumbnails.decide()
    assert thumbnails.facts == ThumbnailFacts(side=128, entry="pixel_values", low=expected[0], high=expected[1])
    shown = decoded(thumbnails.make()).astype(int)
    assert np.abs(shown - pixels[0][:32, 20:52]).mean() < 12


def test_a_file_of_another_picture_changes_no_range() -> None:
    assert value_range(0.2, 0.9, [(0.5, 0.5)]) == (0, 1)
    assert value_range(0.2, 0.9, [(0.4, 0.7)]) == (-1, 1)
    # Neither range fits: the picture is inverted, say.
    assert value_range(0, 0.9, [(0.1, 0.9)]) == (0, 1)
    assert value_range(-0.9, 0.9, [(0.5, 0.5)]) == (-1, 1)


def test_a_first_sample_without_a_picture_costs_only_its_own() -> None:
    batches = [{"pixel_values": None}, *({"pixel_values": CHW + k / 4} for k in range(-3, 4))]
    facts, found = made(batches)
    assert facts == ThumbnailFacts(side=128, entry="pixel_values", low=-1, high=1)
    assert found[0] == b"" and all(found[1:])


CHW, HW = torch.zeros(1, 3, 8, 6), torch.zeros(1, 8, 6)
BATCHES: dict[str, tuple[Any, str | None]] = {
    "text to image": ({"pixel_values": CHW, "input_ids": torch.zeros(1, 77).long()}, "pixel_values"),
    "unconditional": ({"input": CHW[:, :1]}, "input"),
    "ControlNet": ({"conditioning_pixel_values": CHW, "pixel_values": CHW}, "pixel_values"),
    "InstructPix2Pix": ({"original_pixel_values": CHW, "edited_pixel_values": CHW}, "edited_pixel_values"),
    "Kandinsky": ({"clip_pixel_values": CHW, "pixel_values": CHW}, "pixel_values"),
    "a source alone": ({"conditioning_pixel_values": CHW}, None),
    "a folder of torchvision": ([CHW, torch.zeros(1).long()], "0"),
    "a tensor": (CHW, "0"),
    "a name that says nothing": ({"x": CHW}, "x"),
    "named images without channels": ({"image": HW}, "image"),
    "words": ({"prompt_embeds": torch.zeros(1, 77, 768), "x": torch.zeros(1, 77, 768)}, None),
    "latents": ({"latents": torch.zeros(1, 4, 8, 8), "model_input": torch.zeros(1, 16, 8, 8)}, None),
    "latents of three channels": ({"latents": CHW}, None),
    "points": ({"point": torch.zeros(1, 16)}, None),
    "pairs of DPO": ({"pixel_values": torch.zeros(1, 6, 8, 8)}, None),
    "labels": ({"labels": torch.zeros(1, 3, 8, 8).long()}, None),
    "nothing": ({}, None),
    "None": (None, None),
    "text": ("a cat", None),
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_entry_with_the_pictures_is_found(name: str) -> None:
    batch, entry = BATCHES[name]
    assert find_picture(batch) == entry


def test_the_picture_is_the_samples_and_of_a_video_the_middle_frame() -> None:
    frames = torch.arange(5 * 3 * 8 * 6).reshape(5, 3, 8, 6).float()
    image = frames[2]
    for shaped in (image[None], image.permute(1, 2, 0)[None], frames[None], frames.transpose(0, 1)[None]):
        found = picture_in({"video": shaped}, "video")
        assert found is not None and torch.equal(found, image)
    # A class picture of prior preservation follows the sample's.
    both = torch.stack([image, -image])
    found = picture_in([both], "0")
    assert found is not None and torch.equal(found, image)
    one = picture_in([frames[:, :1][None]], "0")
    assert one is not None and torch.equal(one, frames[2, :1])
    assert picture_in([torch.zeros(1, 0, 8, 8)], "0") is None and picture_in({}, "0") is None


@pytest.mark.parametrize("side", [16, 128, 512])
@pytest.mark.parametrize("kind", ["photo", "noise", "black", "wide", "one row"])
def test_no_thumbnail_is_larger_than_what_is_promised(side: int, kind: str) -> None:
    sizes = {"wide": (800, 40), "one row": (700, 1)}
    noise = GENERATOR.integers(0, 256, (*sizes.get(kind, (600, 700))[::-1], 3), np.uint8)
    image = {"photo": np.asarray(PHOTO), "black": np.zeros((600, 700, 3), np.uint8)}.get(kind, noise)
    [data] = made([[torch.from_numpy(image.copy()).permute(2, 0, 1)[None]]], side)[1]
    assert 0 < len(data) <= max_thumbnail_bytes(side)
    height, width = decoded(data).shape[:2]
    assert max(height, width) == side
    assert abs(width * image.shape[0] - height * image.shape[1]) <= max(image.shape)


def test_a_photo_is_the_photo_in_a_few_kilobytes() -> None:
    data = made([[torch.from_numpy(np.asarray(PHOTO) / 127.5 - 1).permute(2, 0, 1)[None]]])[1][0]
    assert len(data) < 6000
    expected = np.asarray(PHOTO.resize((128, 85), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(decoded(data) - expected).mean() < 6


def test_a_small_picture_is_kept_as_it_is() -> None:
    image = GENERATOR.integers(0, 256, (32, 32, 3), np.uint8)
    assert np.array_equal(decoded(encode_webp(Image.fromarray(image), 128)), image)
    grey = GENERATOR.integers(0, 256, (64, 64), np.uint8)
    assert np.array_equal(decoded(encode_webp(Image.fromarray(grey), 128))[:, :, 1], grey)


def test_a_file_is_read_as_it_is_turned_and_an_animation_in_its_middle(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    PHOTO.save(tmp_path / "a.jpg", exif=turned)
    image = read_file(str(tmp_path / "a.jpg"), 64)
    assert image is not None and image.size == (round(64 * PHOTO.height / PHOTO.width), 64)
    frames = [Image.new("RGB", (9, 9), (k * 60, 0, 0)) for k in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    image = read_file(str(tmp_path / "a.gif"), 64)
    assert image is not None and image.getpixel((4, 4)) == (120, 0, 0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG rubbish")
    (tmp_path / "a.mp4").write_bytes(bytes(100))
    for name in ("a.png", "a.mp4", "missing.png", "\0", "x" * 5000, ""):
        assert read_file(str(tmp_path / name) if name else "", 64) is None


def test_only_pictures_of_usual_formats_are_read(tmp_path: Path) -> None:
    # Pillow reads a PPM file, and would read an EPS file by running a program.
    image = Image.new("RGB", (8, 8), "red")
    for kind in ("PPM", "TGA", "PNG"):
        image.save(tmp_path / "picture.png", kind)
        found = read_file(str(tmp_path / "picture.png"), 64)
        assert (found is not None) == (kind == "PNG")


def test_latents_have_the_pictures_of_their_files(tmp_path: Path) -> None:
    Image.fromarray(picture(3)).save(tmp_path / "a.png")
    thumbnails = SampleThumbnails(128)
    latents = {"latents": torch.zeros(1, 4, 8, 8)}
    thumbnails.begin(latents, str(tmp_path / "a.png"))
    thumbnails.decide()
    assert thumbnails.facts == ThumbnailFacts(side=128, entry="", low=0, high=255)
    assert np.array_equal(decoded(thumbnails.make()), picture(3))
    for file in (None, str(tmp_path / "b.png"), 7):
        thumbnails.begin(latents, file)
        assert thumbnails.make() == b""
    # The first file is missing: others need not be.
    thumbnails = SampleThumbnails(128)
    thumbnails.begin(latents, str(tmp_path / "missing.JPG"))
    thumbnails.decide()
    assert thumbnails.make() == b""
    thumbnails.begin(latents, str(tmp_path / "a.png"))
    assert np.array_equal(decoded(thumbnails.make()), picture(3))
    for file in (None, str(tmp_path / "a.mp4")):
        without = SampleThumbnails(128)
        without.begin(latents, file)
        without.decide()
        assert without.facts is None and without.make() == b""


def test_an_error_costs_the_picture_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    thumbnails = SampleThumbnails(128)
    thumbnails.begin([CHW])
    thumbnails.decide()

    def fail(*given: Any, **options: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Image.Image, "save", fail)
    with caplog.at_level(logging.WARNING, "dmin_trace"):
        assert [thumbnails.make(), thumbnails.make()] == [b"", b""]
    assert len(caplog.records) == 1 and "no memory" in caplog.text
    assert SampleThumbnails(0).facts is None


# -- real trainings ----------------------------------------------------------------------------------------------------

COUNT = 40


def check_digits(store: Store, images: np.ndarray) -> None:
    """Each row has the picture of its sample, bit by bit."""
    assert store.header.thumbnails == ThumbnailFacts(side=128, entry="input", low=-1, high=1)
    assert sorted(store.sample.tolist()) == list(range(len(images)))
    for row, sample in enumerate(store.sample.tolist()):
        image = store.thumbnails.image(row)
        assert image is not None
        assert np.array_equal(np.asarray(image), np.repeat(images[sample][:, :, None], 3, axis=2)), sample


def digits(count: int) -> np.ndarray:
    found: np.ndarray = (load_digits().images[:count] * 255 / 16).round().astype(np.uint8)
    return found


def test_a_training_on_digits_keeps_them(tmp_path: Path) -> None:
    """The example shuffles its data, and knows no files."""
    script = tmp_path / "train.py"
    script.write_text(EXAMPLE.read_text().replace("timesteps=5)", "timesteps=2, dimension=64)"))
    run([script, "--num_epochs", "1", "--max_train_samples", COUNT], tmp_path)
    path = tmp_path / "out.trace" / "trace.zarr"
    if not path.exists():
        [path] = tmp_path.rglob("trace.zarr")
    check_digits(open_store(path), digits(COUNT))
    with open_trace(path) as trace:
        assert np.array_equal(np.asarray(trace.thumbnails[7])[:, :, 0], digits(8)[7])
        for hit in trace.top_k(trace.query_samples([3]), 5).hits[0]:
            assert np.array_equal(np.asarray(hit.thumbnail)[:, :, 0], digits(COUNT)[hit.sample])
    size = sum(len(one) for one in open_store(path).thumbnails.stored(range(COUNT)))
    assert size < COUNT * 200


def test_a_recording_has_the_pictures_of_the_files_in_its_columns(tmp_path: Path) -> None:
    files = sorted(digit_folder(tmp_path / "digits", 12).iterdir())
    columns = {"file_name": [str(file) for file in files]}
    model, out = denoiser(), tmp_path / "trace.zarr"
    with dmin_trace.recording(model, samples=12, out=out, columns=columns, timesteps=2, dimension=64) as recording:
        for i in recording.samples:
            for k in recording.timesteps:
                with recording.step(i, k):
                    loss_of(model, POINTS[i : i + 1]).backward()
    store = open_store(tmp_path / "trace.zarr")
    assert store.header.thumbnails == ThumbnailFacts(side=128, entry="", low=0, high=255)
    for sample, expected in enumerate(digits(12)):
        assert np.array_equal(np.asarray(store.thumbnails.image(sample))[:, :, 0], expected)


def test_a_setting_leaves_them_out(tmp_path: Path) -> None:
    digit_folder(tmp_path / "digits", 4)
    script = tmp_path / "train.py"
    script.write_text(EXAMPLE.read_text().replace("timesteps=5)", "timesteps=2, dimension=64, thumbnails=0)"))
    run([script, "--num_epochs", "1", "--train_data_dir", tmp_path / "digits"], tmp_path)
    [path] = tmp_path.rglob("trace.zarr")
    store = open_store(path)
    assert store.header.thumbnails is None and store.header.settings["thumbnails"] == 0
    assert not (path / "thumbnails").exists()
