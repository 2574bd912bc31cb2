"""pictures: the file of each sample, and one sample of each picture."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dmin_trace.capture.dataset import Columns
from dmin_trace.capture.pictures import Pictures, Reading, watch_reading
from dmin_trace.capture.random_state import seed_everything


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Four pictures, in an order that is not that of their names."""
    (tmp_path / "dog").mkdir()
    made = [tmp_path / "dog" / f"{name}.png" for name in ("zebra", "apple", "mountain", "cat")]
    for k, file in enumerate(made):
        Image.fromarray(np.full((4, 4, 3), 10 * k, np.uint8)).save(file)
    return made


def pixels(file: Path) -> torch.Tensor:
    with Image.open(file) as image:
        return torch.tensor(np.asarray(image)).float()


class Folder:
    """As in the older DreamBooth scripts and in textual inversion: sample i is file i modulo their number."""

    def __init__(self, files: Sequence[Path], count: int, classes: int = 0) -> None:
        self.instance_images_path = list(files)
        self.count, self.classes = count, classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {
            "instance_images": pixels(self.instance_images_path[index % len(self.instance_images_path)])
        }
        item |= {"text": random.choice(["a photo of it", "a picture of it"]), "flip": torch.rand(1)}
        return item | ({"class_images": torch.full((2,), float(index))} if self.classes else {})


class Opened:
    """As in the newer DreamBooth scripts: opened images, each several times, with crops that are drawn in advance."""

    def __init__(self, files: Sequence[Path], repeats: int, crop: bool) -> None:
        self.instance_images: list[Image.Image] = []
        for file in files:
            image = Image.open(file)
            image.load()
            self.instance_images.extend(itertools.repeat(image, repeats))
        self.pixels = [torch.rand(3) if crop else torch.tensor(np.asarray(image)) for image in self.instance_images]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"instance_images": self.pixels[index].float(), "prompt": "a dog"}


class Conditioned:
    """One picture that all samples are made from, and a picture of each in an order of its own."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.sources = [files[0]] * len(files)
        self.targets, self.order = list(files), [2, 0, 3, 1]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"source": pixels(self.sources[index]), "target": pixels(self.targets[self.order[index]])}


def of(dataset: Any, declared: int = 1) -> Pictures:
    def read(index: int) -> Any:
        seed_everything(3)
        return dataset[index]

    pictures = Pictures(dataset)
    pictures.leave_out_repeats(read, declared)
    return pictures


def test_each_picture_is_one_sample_however_often_it_is_repeated(files: list[Path]) -> None:
    for count, classes in ((4, 0), (400, 0), (10, 10)):
        pictures = of(Folder(files, count, classes))
        assert list(pictures.indices) == [0, 1, 2, 3] and len(pictures) == 4
        assert [pictures.file(k) for k in range(4)] == list(map(str, files))
    assert list(of(Folder(files[:1], 100)).indices) == [0]
    assert list(of(Opened(files, 5, crop=False)).indices) == [0, 5, 10, 15]
    assert of(Opened(files, 5, crop=False)).file(2) == str(files[2])
    # Crops that differ are other pictures, unless the script says that it repeats them.
    assert len(of(Opened(files, 5, crop=True))) == len(of(Opened(files, 5, crop=True), declared=4)) == 20
    assert list(of(Opened(files, 5, crop=True), declared=5).indices) == [0, 5, 10, 15]


def test_samples_that_share_a_file_and_differ_are_no_repeats(files: list[Path]) -> None:
    assert list(of(Conditioned(files)).indices) == [0, 1, 2, 3]
    # A data set whose samples fail to load tells nothing.
    broken = Folder(files, 8)
    broken.instance_images_path[3].write_bytes(b"")
    assert len(of(broken)) == 8


def test_the_file_is_the_one_that_is_read(files: list[Path]) -> None:
    class Shuffled(Folder):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return super().__getitem__(len(self) - 1 - index)

    for dataset, expected in ((Folder(files, 4), files), (Shuffled(files, 4), files[::-1])):
        pictures = of(dataset)
        for k in range(4):
            with watch_reading() as reading:
                dataset[k]
            assert pictures.file(k, reading.files) == str(expected[k])
            assert reading.texts and reading.texts[0].endswith("of it")


def test_the_fingerprint_is_of_the_names_in_their_order(files: list[Path], tmp_path: Path) -> None:
    ours = of(Folder(files, 4)).fingerprint
    assert len(ours) == 64 and of(Folder(files, 400)).fingerprint == ours
    assert of(Folder(files[::-1], 4)).fingerprint != ours
    assert of(Opened(files, 1, crop=False)).fingerprint == ours and Pictures(range(3)).fingerprint == ""
    (tmp_path / "dog").rename(tmp_path / "elsewhere")
    assert of(Folder([tmp_path / "elsewhere" / file.name for file in files], 4)).fingerprint == ours


def test_columns_have_the_file_and_the_caption_that_was_drawn(files: list[Path]) -> None:
    class Captioned(Folder):
        def __getitem__(self, index: int) -> dict[str, Any]:
            captions = [f"tags {index}", f"sentence {index}"]
            return {"images": pixels(files[index]), "text": captions, "used": random.choice(captions)}

    dataset = Captioned(files, 4)
    pictures, readings = of(dataset), [Reading()]
    columns = Columns(dataset, None, caption="used", pictures=pictures, reading=lambda: readings[0])
    for k in range(4):
        with watch_reading() as readings[0]:
            item = dataset[k]
        found = columns.of(k, item)
        assert found == {"used": item["used"], "text": item["used"], "file_name": str(files[k])}
    # Without a draw it is not known which text was used.
    assert Columns(dataset, ("text",)).of(1, dataset[1]) == {"text": "tags 1 | sentence 1"}


def test_a_data_set_of_datasets_has_paths_and_class_names(files: list[Path]) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "label": datasets.ClassLabel(names=["cats", "dogs"]),
            "blip/caption": datasets.Value("string"),
        }
    )
    rows = {"photo": list(map(str, files)), "label": [0, 1, 1, 0], "blip/caption": ["a", "b", "c", "d"]}
    dataset = datasets.Dataset.from_dict(rows, features).with_transform(lambda rows: {"pixels": rows["photo"]})
    pictures = Pictures(dataset, "photo")
    columns = Columns(dataset, None, caption="blip/caption", pictures=pictures)
    assert columns.of(1, dataset[1]) == {"label": "dogs", "file_name": str(files[1])}
    assert columns.of(3, dataset[3]) == {"label": "cats", "file_name": str(files[3])}
    assert pictures.fingerprint == "" and Pictures(dataset.select([2, 0]), "photo").file(0) == str(files[2])
