"""How queries reach a script of diffusers: files where it reads them, and its command line pointed at those."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from dmin_trace.integrations.diffusers import queries
from PIL import Image

from dmin_trace.capture.host import QueryRun

T2I = ["--pretrained_model_name_or_path", "base", "--output_dir=run", "--resolution", "64"]


def test_a_command_line_is_pointed_at_the_queries() -> None:
    given = [*T2I, "--dataset_name", "cats", "--image_column", "img", "--max_train_samples=3", "--push_to_hub"]
    # `datasets` would keep copies of the queries there.
    given += ["--cache_dir", "cache"]
    pointed = queries.query_arguments(given, Path("/q"), Path("/o"), "a dog")
    assert pointed == [*T2I[:2], *T2I[3:], "--dataset_name", "/q", "--output_dir", "/o"]


def test_a_script_takes_its_data_by_its_command_or_its_text() -> None:
    find = queries.find_data_argument
    assert find(["--instance_data_dir=d", "--output_dir", "o"], "") == "--instance_data_dir"
    assert find(["--pictures", "{data}"], "--train_data_dir") == "{data}"
    assert find(T2I, 'parser.add_argument("--train_data_dir", default="pictures")') == "--train_data_dir"
    assert find(T2I, 'parser.add_argument("--pictures")') is None
    assert queries.query_arguments(["--pictures={data}", "--cache_dir", "c"], Path("/q"), Path("/o")) == [
        "--pictures=/q"
    ]


@pytest.mark.parametrize("data", [["--dataset_name", "cats"], ["--pictures", "{data}"]], ids=["known", "by {data}"])
def test_every_output_is_pointed_elsewhere_and_nothing_is_uploaded(data: list[str]) -> None:
    outputs = ["--output_path", "mine", "--logging_dir=/mine/logs", "--output_dir", "mine"]
    hub = ["--hub_model_id", "me/mine", "--hub_token=secret", "--push_to_hub"]
    pointed = queries.query_arguments([*T2I[:2], *outputs, *hub, *data], Path("/q"), Path("/o"))
    assert pointed[:2] == T2I[:2] and "mine" not in " ".join(pointed[2:])
    for name, place in (
        ("--output_path", "/o/output_path"),
        ("--logging_dir", "/o/logging_dir"),
        ("--output_dir", "/o"),
    ):
        assert pointed[pointed.index(name) + 1] == place
    assert not {"--push_to_hub", "--hub_model_id", "me/mine"} & set(pointed) and "secret" not in " ".join(pointed)


def test_a_capture_on_demand_uploads_nothing_and_begins_anew() -> None:
    given = ["--output_dir", "mine", "--push_to_hub", "--hub_model_id", "me/mine", "--resume_from_checkpoint=latest"]
    assert queries.on_demand_arguments(given) == ["--output_dir", "mine"]


def test_the_prompt_takes_the_place_of_dreambooths() -> None:
    given = [*T2I, "--instance_data_dir", "dogs", "--instance_prompt", "a sks dog", "--repeats", "9"]
    pointed = queries.query_arguments(given, Path("/q"), Path("/o"), "--a cat--")
    assert pointed[4] == "--instance_prompt=--a cat--"
    assert pointed[5:9] == ["--repeats", "1", "--train_batch_size", "1"]
    assert pointed[9:] == ["--instance_data_dir", "/q", "--output_dir", "/o"]
    assert queries.takes_one_prompt(given)


def test_dreambooth_with_captions_reads_a_data_set() -> None:
    given = [*T2I, "--dataset_name", "dogs", "--caption_column", "says", "--instance_prompt", "a dog"]
    pointed = queries.query_arguments(given, Path("/q"), Path("/o"), "a cat")
    assert pointed[-4:] == ["--dataset_name", "/q", "--output_dir", "/o"]
    assert ("--instance_prompt", "a dog") in zip(pointed, pointed[1:], strict=False)
    assert (queries.takes_one_prompt(given), queries.takes_prompts(given)) == (False, True)


def test_captions_are_written_where_the_script_reads_them(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    columns = queries.query_columns([*T2I, "--caption_column=says"], ["pixel_values"])
    queries.write_queries(tmp_path / "q", [tmp_path / "a.png"] * 2, ["a dog", ""], columns, [None, None])
    lines = [json.loads(line) for line in (tmp_path / "q" / "metadata.jsonl").read_text().splitlines()]
    assert lines == [{"file_name": "000000.png", "says": "a dog"}, {"file_name": "000001.png", "says": ""}]
    assert queries.query_columns(T2I, []).caption == "text"


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
    columns = queries.query_columns(arguments, entries)
    queries.write_queries(tmp_path / "q", [tmp_path / "a.png"], ["a dog"], columns, [tmp_path / "b.png"])
    row = json.loads((tmp_path / "q" / "metadata.jsonl").read_text())
    assert row == {image: "000000.png", caption: "a dog", conditioning: "conditioning/000000.png"}
    assert (tmp_path / "q" / row[conditioning]).read_bytes() == (tmp_path / "b.png").read_bytes()


def prepared(tmp_path: Path, arguments: str) -> list[QueryRun]:
    """The runs for two images with the prompts one and two."""
    images = [tmp_path / "a.PNG", tmp_path / "b.jpg"]
    for image in images:
        image.write_bytes(image.name.encode())
    given = arguments.split()
    columns = queries.query_columns(given, [])
    return queries.prepare_queries(given, columns, images, ["one", "two"], [None, None], tmp_path / "q")


def value(run: QueryRun, name: str) -> str:
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


def test_a_prompt_that_is_a_date_or_a_number_stays_text(tmp_path: Path) -> None:
    """As `datasets` reads the folder, where it is installed: of JSON lines it would make points in time."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    columns = queries.query_columns(T2I, [])
    for k, prompts in enumerate((["2024-05-01"], ["2024-05-01 12:30:00"] * 2, ["42"], ["2024-05-01", "1e5"])):
        queries.write_queries(
            tmp_path / f"q{k}", [tmp_path / "a.png"] * len(prompts), prompts, columns, [None] * len(prompts)
        )
        listed = sorted(file.name for file in (tmp_path / f"q{k}").glob("metadata.*"))
        assert listed == (["metadata.csv"] if k < 2 else ["metadata.jsonl"])
        if find_spec("datasets") is not None:
            from datasets import load_dataset

            read = load_dataset("imagefolder", data_dir=str(tmp_path / f"q{k}"), cache_dir=str(tmp_path / "c"))["train"]
            assert read["text"][:] == prompts


@pytest.mark.parametrize(
    ("traced", "given", "differ"),
    [
        ("--snr_gamma=5.0 --seed 3 --output_dir a", "--output_dir=b --snr_gamma 5.0 --max_train_steps 9", None),
        ("--snr_gamma 5.0", "--snr_gamma 1", ("--snr_gamma 5.0", "--snr_gamma 1")),
        ("--betas 0.9 -1", "--betas 0.9 -1 --dream_training", ("no --dream_training", "--dream_training")),
        ("--prediction_type v_prediction", "", ("--prediction_type v_prediction", "no --prediction_type")),
        ("--pictures mine --vae hub/vae", "--pictures={data}", None),
    ],
)
def test_arguments_that_may_change_a_loss_are_compared(traced: str, given: str, differ: tuple[str, str] | None) -> None:
    assert queries.loss_difference([*T2I, *traced.split()], given.split()) == differ
