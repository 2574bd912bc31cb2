"""dataset: readable columns, samples that fail to load, and the shapes in a batch."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from dmin_trace.capture.dataset import MAX_LOGGED_FAILURES, Columns, FailedSamples, batch_shapes
from dmin_trace.errors import CaptureError


class Labelled:
    """A dataset whose labels are an attribute, and whose captions are in its items."""

    label = [3, 1, 2]

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"caption": [f"picture {index}"], "weight": torch.tensor(index / 2), "pixels": torch.zeros(3, 4, 4)}


def test_columns_are_found_in_items_and_attributes() -> None:
    dataset = Labelled()
    columns = Columns(dataset, None)
    assert columns.kinds == {}
    assert columns.of(1, dataset[1]) == {"caption": "picture 1", "label": 1}
    assert columns.kinds == {"caption": "string", "label": "integer"}
    assert columns.of(2, {}) == {"caption": None, "label": 2}
    assert Columns(dataset, ("weight",)).of(1, dataset[1]) == {"weight": 0.5}
    with pytest.raises(CaptureError, match="no readable column author, pixels. Name columns"):
        Columns(dataset, ("author", "label", "pixels")).of(0, dataset[0])


def test_failed_samples_are_logged_ten_times_and_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    failed = FailedSamples(100)
    with caplog.at_level(logging.WARNING):
        for sample in [*range(MAX_LOGGED_FAILURES + 3), 0, 1]:
            failed.add(sample, OSError("torn"), done=50)
    assert len(failed) == MAX_LOGGED_FAILURES + 3 and len(caplog.records) == MAX_LOGGED_FAILURES + 1
    assert "Sample 0 could not be loaded: OSError: torn." in caplog.text


def test_failed_samples_stop_a_capture_if_most_of_the_first_fail() -> None:
    failed = FailedSamples(5)
    for sample in (0, 1):
        failed.add(sample, OSError("torn"), done=sample)
    with pytest.raises(CaptureError, match="3 of the first samples could not be loaded.*sample 2.*Fix the dataset"):
        failed.add(2, OSError("torn"), done=2)


def test_shapes_of_images_and_texts_in_a_batch() -> None:
    batch = {"pixels": torch.zeros(1, 3, 8, 8), "input_ids": torch.ones(1, 77, dtype=torch.long), "prompts": ["a cat"]}
    shapes = batch_shapes(batch | {"file_names": ["a.png"], "size": torch.ones(1, 2)})
    assert shapes == {"pixels": (1, 3, 8, 8), "input_ids": (1, 77), "prompts": (1,)}
    assert batch_shapes([["a cat"], torch.zeros(1, 3, 8, 8)]) == {"1": (1, 3, 8, 8), "0": (1,)}
    assert list(batch_shapes([["a cat"], torch.zeros(1, 3, 8, 8)])) == ["1", "0"]
