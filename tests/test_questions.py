"""What a person asks about, however it is given; and how it reaches a script's command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dmin_trace.integrations import diffusers
from PIL import Image

from dmin_trace.errors import QueryError
from dmin_trace.questions import Asked, read_questions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_images_get_their_prompts_in_order(folder: Path) -> None:
    files = [folder / "b.png", folder / "a.jpg"]
    assert read_questions(files) == [Asked(files[0], None), Asked(files[1], None)]
    assert read_questions(files, ["one", "two"]) == [Asked(files[0], "one"), Asked(files[1], "two")]
    assert read_questions(files, ["one"]) == [Asked(files[0], "one"), Asked(files[1], "one")]


def test_a_folder_is_its_images_in_the_order_of_their_names(folder: Path) -> None:
    assert [asked.image.name for asked in read_questions([folder])] == ["a.jpg", "b.png"]


@pytest.mark.parametrize(("image", "prompt"), [("file_name", "text"), ("image", "prompt"), ("file_name", "caption")])
def test_a_list_names_images_and_prompts(folder: Path, image: str, prompt: str) -> None:
    rows = [{image: "b.png", prompt: "a dog"}, {image: "a.jpg", prompt: ""}, {image: "b.png"}]
    text = "\n\n".join(json.dumps(row) for row in rows)
    for path, given in ((folder / "metadata.jsonl", folder), (folder / "list.jsonl", folder / "list.jsonl")):
        path.write_text(text)
        assert read_questions([given]) == [
            Asked(folder / "b.png", "a dog"),
            Asked(folder / "a.jpg", ""),
            Asked(folder / "b.png", None),
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
        read_questions([folder / "list.jsonl"], prompts)


def test_an_empty_folder_is_no_question(tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="holds no images"):
        read_questions([tmp_path])


T2I = ["--pretrained_model_name_or_path", "base", "--output_dir=run", "--resolution", "64"]


def test_a_command_line_is_pointed_at_the_queries() -> None:
    given = [*T2I, "--dataset_name", "cats", "--image_column", "img", "--max_train_samples=3", "--push_to_hub"]
    pointed = diffusers.query_arguments(given, Path("/q"), Path("/o"), "a dog")
    assert pointed == [*T2I[:2], *T2I[3:], "--train_data_dir", "/q", "--output_dir", "/o"]


def test_the_prompt_takes_the_place_of_dreambooths() -> None:
    given = [*T2I, "--instance_data_dir", "dogs", "--instance_prompt", "a sks dog", "--repeats", "9"]
    pointed = diffusers.query_arguments(given, Path("/q"), Path("/o"), "--a cat--")
    assert pointed[4:] == ["--instance_prompt=--a cat--", "--instance_data_dir", "/q", "--output_dir", "/o"]
    assert diffusers.takes_one_prompt(given)


def test_dreambooth_with_captions_reads_a_data_set() -> None:
    given = [*T2I, "--dataset_name", "dogs", "--caption_column", "says", "--instance_prompt", "a dog"]
    pointed = diffusers.query_arguments(given, Path("/q"), Path("/o"), "a cat")
    assert pointed[-4:] == ["--dataset_name", "/q", "--output_dir", "/o"]
    assert ("--instance_prompt", "a dog") in zip(pointed, pointed[1:], strict=False)
    assert (diffusers.takes_one_prompt(given), diffusers.takes_prompts(given)) == (False, True)


def test_captions_are_written_where_the_script_reads_them(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    columns = diffusers.query_columns([*T2I, "--caption_column=says"], ["pixel_values"])
    diffusers.write_queries(tmp_path / "q", [tmp_path / "a.png"] * 2, ["a dog", ""], columns, [None, None])
    lines = [json.loads(line) for line in (tmp_path / "q" / "metadata.jsonl").read_text().splitlines()]
    assert lines == [{"file_name": "000000.png", "says": "a dog"}, {"file_name": "000001.png", "says": ""}]
    assert diffusers.query_columns(T2I, []).caption == "text"


@pytest.mark.parametrize("arguments", [["--output_dir", "run"], T2I[:2], T2I])
def test_nothing_is_generated_without_a_saved_model(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="does not name a model|holds neither"):
        diffusers.generate(arguments, tmp_path, [("a cat", 0)])


EDITS = ["--original_image_column", "before", "--edited_image_column", "after", "--edit_prompt_column", "how"]


@pytest.mark.parametrize(
    ("arguments", "entries", "image", "conditioning", "caption"),
    [
        (["--conditioning_image_column", "edges"], [], "file_name", "edges_file_name", "text"),
        (T2I, ["pixel_values", "conditioning_pixel_values"], "file_name", "conditioning_image_file_name", "text"),
        (EDITS, [], "after_file_name", "before_file_name", "how"),
        (T2I, ["original_pixel_values"], "edited_image_file_name", "input_image_file_name", "edit_prompt"),
    ],
)
def test_a_conditioning_image_is_written_where_the_script_reads_it(
    tmp_path: Path, arguments: list[str], entries: list[str], image: str, conditioning: str, caption: str
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (5, 5)).save(tmp_path / "b.png")
    columns = diffusers.query_columns(arguments, entries)
    diffusers.write_queries(tmp_path / "q", [tmp_path / "a.png"], ["a dog"], columns, [tmp_path / "b.png"])
    row = json.loads((tmp_path / "q" / "metadata.jsonl").read_text())
    assert row == {image: "000000.png", caption: "a dog", conditioning: "conditioning/000000.png"}
    assert (tmp_path / "q" / row[conditioning]).read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_list_names_conditioning_images(folder: Path) -> None:
    (folder / "list.jsonl").write_text('{"image": "a.jpg", "conditioning_image": "b.png", "prompt": "a"}')
    assert read_questions([folder / "list.jsonl"]) == [Asked(folder / "a.jpg", "a", folder / "b.png")]
    given = read_questions([folder / "a.jpg", folder / "b.png"], ["x"], [folder / "b.png"])
    assert [asked.conditioning for asked in given] == [folder / "b.png"] * 2
