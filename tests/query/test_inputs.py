"""What a person asks about, however it is given."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmin_trace.errors import QueryError
from dmin_trace.query.inputs import ORIENTATION, QueryInput, image_file, read_inputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.jpg", "notes.txt", "._b.png", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_images_get_their_prompts_in_order(folder: Path) -> None:
    files = [folder / "b.png", folder / "a.jpg"]
    assert read_inputs(files) == [QueryInput(files[0], None), QueryInput(files[1], None)]
    assert read_inputs(files, ["one", "two"]) == [QueryInput(files[0], "one"), QueryInput(files[1], "two")]
    assert read_inputs(files, ["one"]) == [QueryInput(files[0], "one"), QueryInput(files[1], "one")]


def test_a_folder_is_its_images_in_the_order_of_their_names(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert [given.image.name for given in read_inputs([folder])] == ["a.jpg", "b.png"]
    assert caplog.messages == [f"Passed over in {folder}: '.DS_Store', '._b.png', 'Thumbs.db', 'notes.txt'."]
    Image.new("RGB", (2, 2)).save(folder / "generated", "PNG")
    assert [given.image.name for given in read_inputs([folder])] == ["a.jpg", "b.png", "generated"]


@pytest.mark.parametrize(("image", "prompt"), [("file_name", "text"), ("image", "prompt"), ("file_name", "caption")])
def test_a_list_names_images_and_prompts(folder: Path, image: str, prompt: str) -> None:
    rows = [{image: "b.png", prompt: "a dog"}, {image: "a.jpg", prompt: ""}, {image: "b.png"}]
    text = "\n\n".join(json.dumps(row) for row in rows)
    for path, given in ((folder / "metadata.jsonl", folder), (folder / "list.jsonl", folder / "list.jsonl")):
        path.write_text(text)
        assert read_inputs([given]) == [
            QueryInput(folder / "b.png", "a dog"),
            QueryInput(folder / "a.jpg", ""),
            QueryInput(folder / "b.png", None),
        ]


@pytest.mark.parametrize(
    ("text", "prompts", "message"),
    [
        ("", [], "has no lines"),
        ('{"file_name": "a.jpg"}\nhello', [], "Line 2 of"),
        ('{"text": "a dog"}', [], "Line 1 of"),
        ("[1]", [], "Line 1 of"),
        ('{"file_name": "a.jpg", "text": "a dog"}', ["a cat"], "Leave --prompt out"),
        ('{"file_name": "a.jpg"}\n{"file_name": "a.jpg"}', ["a", "b", "c"], "2 images were given and 3 prompts"),
    ],
)
def test_a_list_that_cannot_be_meant(folder: Path, text: str, prompts: list[str], message: str) -> None:
    (folder / "list.jsonl").write_text(text)
    with pytest.raises(QueryError, match=message):
        read_inputs([folder / "list.jsonl"], prompts)


def test_an_empty_folder_is_no_question(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="holds no images"):
        read_inputs([tmp_path])


def test_a_list_names_conditioning_images(folder: Path) -> None:
    (folder / "list.jsonl").write_text('{"image": "a.jpg", "conditioning_image": "b.png", "prompt": "a"}')
    assert read_inputs([folder / "list.jsonl"]) == [QueryInput(folder / "a.jpg", "a", folder / "b.png")]
    given = read_inputs([folder / "a.jpg", folder / "b.png"], ["x"], [folder / "b.png"])
    assert [asked.conditioning for asked in given] == [folder / "b.png"] * 2


def test_a_table_of_metadata_is_as_good_as_json_lines(folder: Path) -> None:
    rows = [{"file_name": "b.png", "text": 'a "dog", \n running'}, {"file_name": "a.jpg", "text": "ünï"}]
    expected = [QueryInput(folder / row["file_name"], row["text"]) for row in rows]
    with (folder / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "metadata.csv").replace(folder / "list.csv")
    assert read_inputs([folder / "list.csv"]) == expected
    (folder / "list.csv").replace(folder / "metadata.csv")
    assert read_inputs([folder]) == expected
    (folder / "metadata.csv").write_text("name,text\na.jpg,a dog\n")
    with pytest.raises(QueryError, match=r"Line 2 of .*metadata.csv is 'a.jpg,a dog'; expected a file_name"):
        read_inputs([folder])
    (folder / "metadata.csv").write_text("")
    with pytest.raises(QueryError, match="has no lines"):
        read_inputs([folder])


def test_a_parquet_file_of_metadata(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"file_name": ["b.png", "a.jpg"], "text": ["a dog", None], "width": [1, 2]})
    parquet.write_table(table, folder / "metadata.parquet")
    assert read_inputs([folder]) == [QueryInput(folder / "b.png", "a dog"), QueryInput(folder / "a.jpg", None)]
    monkeypatch.setattr("dmin_trace.query.inputs.MAX_LIST_ROWS", 1)
    with pytest.raises(QueryError, match="cannot be read as Parquet: it is larger than 1 rows"):
        read_inputs([folder])
    (folder / "metadata.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(QueryError, match="cannot be read as Parquet"):
        read_inputs([folder])


@pytest.mark.parametrize(
    ("name", "kind", "suffix"),
    [
        ("generated", "PNG", ".png"),
        ("A.PNG", "PNG", ".PNG"),
        ("b.jpg", "PNG", ".png"),
        ("c.jfif", "JPEG", ".jpg"),
        ("d.jpeg", "JPEG", ".jpeg"),
        ("e.png?width=512", "PNG", ".png"),
        ("f.webp.tmp", "WEBP", ".webp"),
        ("g.gif", "GIF", ".gif"),
        ("h.tif", "TIFF", ".tif"),
    ],
)
def test_an_image_has_the_ending_of_its_kind_whatever_its_name(
    tmp_path: Path, name: str, kind: str, suffix: str
) -> None:
    (tmp_path / "made").mkdir()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / name, kind)
    file = image_file(tmp_path / name, tmp_path / "made" / "given0.png")
    assert file.suffix == suffix and file.read_bytes() == (tmp_path / name).read_bytes()


def test_a_pil_image_is_written_as_the_file_that_it_was_read_from(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 4, 3), np.uint8))
    grey, exif = picture.convert("L"), Image.Exif()
    exif[ORIENTATION] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture.quantize(16).save(tmp_path / "palette.png", transparency=0)
    Image.merge("LA", (grey, grey)).save(tmp_path / "grey_alpha.png")
    Image.fromarray(np.arange(24, dtype=np.uint16).reshape(6, 4) * 2700).save(tmp_path / "deep.png")
    picture.convert("1").save(tmp_path / "bits.tif")
    picture.save(tmp_path / "moving.gif", save_all=True, append_images=[picture.rotate(90)])
    for file in tmp_path.iterdir():
        with Image.open(file) as given:
            written = image_file(given, tmp_path / "given0.png")
            with Image.open(written) as read:
                assert read.mode == given.mode and read.size == given.size, file.name
                assert read.getexif().get(ORIENTATION) == given.getexif().get(ORIENTATION), file.name
                assert (read.info.get("transparency") is None) == (given.info.get("transparency") is None), file.name
                for mode in ("RGB", "RGBA"):
                    assert np.array_equal(np.asarray(read.convert(mode)), np.asarray(given.convert(mode))), file.name
        written.unlink()
    with pytest.raises(QueryError, match=r"mode HSV cannot be written as PNG or TIFF. Give its file"):
        image_file(picture.convert("HSV"), tmp_path / "given0.png")
