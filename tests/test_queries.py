"""integrations/diffusers: a training command line is pointed at queries, as each kind of script reads its data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dmin_trace.integrations.diffusers import QueryRun, prepare_queries, refusal

TEXT_TO_IMAGE = 'add_argument("--train_data_dir") add_argument("--dataset_name") add_argument("--image_column")'
DREAMBOOTH = 'add_argument("--instance_data_dir") add_argument("--dataset_name") add_argument("--repeats")'


def prepared(tmp_path: Path, arguments: str, source: str, *, pair: bool = False) -> list[QueryRun]:
    images = [tmp_path / "a.PNG", tmp_path / "b.jpg"]
    for image in images:
        image.write_bytes(b"picture")
    also = [{"edges": images[0]} if pair else {} for _ in images]
    return prepare_queries(arguments.split(), source, images, ["one", "two"], also, tmp_path / "q")


def value(run: QueryRun, name: str) -> str:
    return run.arguments[run.arguments.index(name) + 1]


def test_a_dataset_of_captions_is_one_folder_with_metadata(tmp_path: Path) -> None:
    given = "--dataset_name hub/set --caption_column words --max_train_samples 9 --seed 3 --output_dir o --push_to_hub"
    (run,) = prepared(tmp_path, given, TEXT_TO_IMAGE)
    assert run.count == 2
    folder = Path(value(run, "--train_data_dir"))
    assert [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()] == [
        {"file_name": "000000.png", "text": "one"},
        {"file_name": "000001.jpg", "text": "two"},
    ]
    assert value(run, "--caption_column") == "text" and value(run, "--seed") == "3"
    assert value(run, "--output_dir") != "o"
    assert not {"--dataset_name", "--max_train_samples", "--push_to_hub"} & set(run.arguments)


def test_a_script_without_a_data_folder_is_given_the_folder_as_its_dataset(tmp_path: Path) -> None:
    given = "--dataset_name hub/set --caption_column words --instance_prompt p --repeats 5 --cache_latents"
    (run,) = prepared(tmp_path, given, DREAMBOOTH)
    assert Path(value(run, "--dataset_name")).is_dir() and value(run, "--repeats") == "1"
    assert "--cache_latents" not in run.arguments


@pytest.mark.parametrize("data", ["--instance_data_dir pictures", "--dataset_name hub/set"])
def test_where_all_pictures_have_one_prompt_each_query_runs_alone(tmp_path: Path, data: str) -> None:
    runs = prepared(tmp_path, f"{data} --instance_prompt trained", DREAMBOOTH)
    assert [value(run, "--instance_prompt") for run in runs] == ["one", "two"]
    assert [run.count for run in runs] == [1, 1]
    folders = [Path(value(run, data.split()[0])) for run in runs]
    # A folder of pictures is read file by file: there must be nothing else in it.
    expected = {"000000.png"} if "instance" in data else {"000000.png", "metadata.jsonl"}
    assert {file.name for file in folders[0].iterdir()} == expected


def test_companions_are_columns_of_their_own(tmp_path: Path) -> None:
    source = TEXT_TO_IMAGE + ' "--edited_image_column" "--original_image_column"'
    (run,) = prepared(tmp_path, "--train_data_dir pairs", source, pair=True)
    folder = Path(value(run, "--train_data_dir"))
    first = json.loads((folder / "metadata.jsonl").read_text().splitlines()[0])
    assert first == {"file_name": "000000.png", "text": "one", "edges_file_name": "000000.edges.png"}
    assert value(run, "--original_image_column") == "edges" and value(run, "--edited_image_column") == "image"


def test_a_place_for_the_folder_may_be_marked(tmp_path: Path) -> None:
    (run,) = prepared(tmp_path, "--pictures={data} --output_dir o", "")
    assert Path(run.arguments[0].removeprefix("--pictures=")).is_dir() and "--train_data_dir" not in run.arguments


def test_latents_cached_by_batch_are_refused() -> None:
    class Given:
        cache_latents = True

    assert "cache_latents" in (refusal(Given()) or "")
    assert refusal(None) is None
