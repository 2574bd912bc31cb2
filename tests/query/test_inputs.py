"""What a person asks about, however it is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmin_trace.errors import QueryError
from dmin_trace.query.inputs import QueryInput, read_inputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_images_get_their_prompts_in_order(folder: Path) -> None:
    files = [folder / "b.png", folder / "a.jpg"]
    assert read_inputs(files) == [QueryInput(files[0], None), QueryInput(files[1], None)]
    assert read_inputs(files, ["one", "two"]) == [QueryInput(files[0], "one"), QueryInput(files[1], "two")]
    assert read_inputs(files, ["one"]) == [QueryInput(files[0], "one"), QueryInput(files[1], "one")]


def test_a_folder_is_its_images_in_the_order_of_their_names(folder: Path) -> None:
    assert [asked.image.name for asked in read_inputs([folder])] == ["a.jpg", "b.png"]


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
