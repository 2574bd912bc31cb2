"""What a person asks about, however it is given; and how it reaches a script's command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dmin_trace.integrations import diffusers
from PIL import Image

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


T2I = ["--pretrained_model_name_or_path", "base", "--output_dir=run", "--resolution", "64"]


def test_a_command_line_is_pointed_at_the_queries() -> None:
    given = [*T2I, "--dataset_name", "cats", "--image_column", "img", "--max_train_samples=3", "--push_to_hub"]
    pointed = diffusers.query_arguments(given, Path("/q"), Path("/o"), "a dog")
    assert pointed == [*T2I[:2], *T2I[3:], "--dataset_name", "/q", "--output_dir", "/o"]


def test_the_prompt_takes_the_place_of_dreambooths() -> None:
    given = [*T2I, "--instance_data_dir", "dogs", "--instance_prompt", "a sks dog", "--repeats", "9"]
    pointed = diffusers.query_arguments(given, Path("/q"), Path("/o"), "--a cat--")
    assert pointed[4] == "--instance_prompt=--a cat--"
    assert pointed[5:9] == ["--repeats", "1", "--train_batch_size", "1"]
    assert pointed[9:] == ["--instance_data_dir", "/q", "--output_dir", "/o"]
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
    assert read_inputs([folder / "list.jsonl"]) == [QueryInput(folder / "a.jpg", "a", folder / "b.png")]
    given = read_inputs([folder / "a.jpg", folder / "b.png"], ["x"], [folder / "b.png"])
    assert [asked.conditioning for asked in given] == [folder / "b.png"] * 2


def prepared(tmp_path: Path, arguments: str) -> list[diffusers.QueryRun]:
    """The runs for two images with the prompts one and two."""
    images = [tmp_path / "a.PNG", tmp_path / "b.jpg"]
    for image in images:
        image.write_bytes(image.name.encode())
    given = arguments.split()
    columns = diffusers.query_columns(given, [])
    return diffusers.prepare_queries(given, columns, images, ["one", "two"], [None, None], tmp_path / "q")


def value(run: diffusers.QueryRun, name: str) -> str:
    return run.arguments[run.arguments.index(name) + 1]


@pytest.mark.parametrize(
    ("data", "alone"),
    [
        ("--instance_data_dir pictures --instance_prompt trained", True),
        ("--train_data_dir pictures --placeholder_token <it>", True),
        ("--train_data_dir pictures", False),
        ("--dataset_name hub/set --instance_prompt trained --caption_column says", False),
    ],
)
def test_scripts_that_read_every_file_get_one_query_at_a_time(tmp_path: Path, data: str, alone: bool) -> None:
    runs = prepared(tmp_path, f"{data} --output_dir o --push_to_hub")
    assert [run.queries for run in runs] == ([(0,), (1,)] if alone else [(0, 1)])
    folders = [Path(value(run, data.split()[0])) for run in runs]
    # There must be nothing else in a folder of which every file is taken for an image.
    expected = [["000000.png"], ["000000.jpg"]] if alone else [["000000.png", "000001.jpg", "metadata.jsonl"]]
    assert [sorted(file.name for file in folder.iterdir()) for folder in folders] == expected
    for run in runs:
        assert value(run, "--output_dir") != "o" and "--push_to_hub" not in run.arguments
        assert ("--repeats" in run.arguments) == ("--placeholder_token" in data)


def test_a_data_set_with_one_prompt_is_asked_prompt_by_prompt(tmp_path: Path) -> None:
    runs = prepared(tmp_path, "--dataset_name hub/set --instance_prompt trained")
    assert [run.queries for run in runs] == [(0,), (1,)]
    assert ["--instance_prompt=one" in run.arguments for run in runs] == [True, False]


def test_class_images_weigh_nothing_in_a_query(tmp_path: Path) -> None:
    given = "--instance_data_dir d --instance_prompt p --with_prior_preservation --class_prompt c --class_data_dir mine"
    for run in prepared(tmp_path, f"{given} --num_class_images=200 --prior_loss_weight 0.7"):
        assert (value(run, "--num_class_images"), value(run, "--prior_loss_weight")) == ("1", "0")
        assert run.arguments.count("--class_data_dir") == 1 and len(
            list(Path(value(run, "--class_data_dir")).iterdir())
        )
        assert "--with_prior_preservation" in run.arguments and "mine" not in run.arguments


def test_videos_are_named_line_by_line(tmp_path: Path) -> None:
    (run,) = prepared(tmp_path, "--instance_data_root old --caption_column p.txt --video_column v.txt --id_token x")
    folder = Path(value(run, "--instance_data_root"))
    assert (folder / value(run, "--caption_column")).read_text() == "one\ntwo\n"
    assert (folder / value(run, "--video_column")).read_text() == "000000.png\n000001.jpg\n"
    assert (folder / "000001.jpg").read_bytes() == b"b.jpg"


def test_what_is_looked_up_by_batch_is_refused() -> None:
    class Given:
        cache_latents = True

    assert "latents by the number of the batch" in (diffusers.refusal(Given(), {}) or "")
    assert "prompt_embeds_cache" in (diffusers.refusal(None, {"prompt_embeds_cache": [1]}) or "")
    assert diffusers.refusal(None, {"latents_cache": []}) is None
    # The newer scripts look up by the index of the sample.
    assert diffusers.refusal(Given(), {"latents_cache": [1], "batch": {"indices": [3]}}) is None
