"""Queries for a concept: the prompt without it, and the difference of two gradients, compared with plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss

import dmin_trace
from dmin_trace.capture.pinning import pinned_timesteps
from dmin_trace.errors import CaptureError, DminTraceError, QueryError
from dmin_trace.project import compress_gradient, make_plan
from dmin_trace.query.concept import prompt_without, with_concepts
from dmin_trace.query.inputs import QueryInput
from dmin_trace.query.script_runs import check_pairs
from dmin_trace.settings import make_settings


@pytest.mark.parametrize(
    ("prompt", "concept", "expected"),
    [
        ("a red heart", "red", "a heart"),
        ("A Red heart", "rED", "A heart"),
        ("red heart", "red", "heart"),
        ("a heart in red", "in red", "a heart"),
        ("a heart, red", "red", "a heart"),
        ("a heart, red, on a wall", "red", "a heart, on a wall"),
        ("red, a heart", "red", "a heart"),
        ("a heart (red)", "red", "a heart"),
        ("a (red) heart", "red", "a heart"),
        ("a (dark red) heart", "red", "a (dark) heart"),
        ("a (red and dark) heart", "red and", "a (dark) heart"),
        ("a heart, red.", "red", "a heart."),
        ("a heart on red; big", "on red", "a heart; big"),
        ("a red heart on a red wall", "red", "a heart on a wall"),
        ("a dark  red\nheart", "DARK red", "a heart"),
        ("a  cat ,  red heart", "red", "a  cat , heart"),
        ("red", "red", ""),
        ("red red", "red", ""),
        ("the word 'red' on it", "'red'", "the word on it"),
        ("a dog (c.)", "(c.)", "a dog"),
        ("ein rötlicher Hund", "RÖTLICHER", "ein Hund"),
    ],
)
def test_a_prompt_without_a_concept(prompt: str, concept: str, expected: str) -> None:
    assert prompt_without(prompt, concept) == expected


@pytest.mark.parametrize(
    ("prompt", "concept"),
    [
        ("a reddish heart", "red"),
        ("a red-haired girl", "red"),
        ("Picasso's heart", "picasso"),
        ("a heart", "red heart"),
    ],
)
def test_a_concept_that_is_not_in_the_prompt_as_whole_words(prompt: str, concept: str) -> None:
    with pytest.raises(QueryError, match="does not have the concept '.*' as whole words"):
        prompt_without(prompt, concept)


def test_a_concept_has_words() -> None:
    for concept in ("", " \n"):
        with pytest.raises(QueryError, match="The concept has no words"):
            prompt_without("a red heart", concept)


def test_concepts_are_for_each_input_or_for_all() -> None:
    inputs = [QueryInput(Path("a.png"), "a red heart"), QueryInput(Path("b.png"), "a red cat")]
    assert with_concepts(inputs, [], []) == inputs
    assert [one.without for one in with_concepts(inputs, ["red"], [])] == ["a heart", "a cat"]
    assert [one.without for one in with_concepts(inputs, ["red", "cat"], [])] == ["a heart", "a red"]
    assert [one.without for one in with_concepts(inputs, [], [""])] == ["", ""]
    for concepts, without, message in (
        (["red"], ["a heart"], "--concept and --without were given"),
        (["red"] * 3, [], "2 images were given and 3 concepts"),
        (["blue"], [], "does not have the concept 'blue'"),
    ):
        with pytest.raises(QueryError, match=message):
            with_concepts(inputs, concepts, without)
    with pytest.raises(QueryError, match=r"c.png has no prompt. Give its prompt with --prompt"):
        with_concepts([*inputs, QueryInput(Path("c.png"), None)], ["red"], [])


# -- a denoiser of pictures with words --------------------------------------------------------------------------------

COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}
SHAPES = {
    "bar": [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    "box": [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]],
    "cross": [[0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
    "post": [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1]],
}
WORDS = (*COLOURS, *SHAPES, "a")
COPIES = 4


class Captioned(NamedTuple):
    """A picture of 4x4 pixels, (1, 3, 4, 4), and its caption."""

    picture: torch.Tensor
    caption: str


class Painter(torch.nn.Module):
    """Guesses the noise in a picture, from words whose vectors are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(len(WORDS), 16)
        self.inner = torch.nn.Linear(48 + 16 + 1, 64)
        self.outer = torch.nn.Linear(64, 48)

    def encode(self, caption: str) -> torch.Tensor:
        known = [WORDS.index(word) for word in caption.lower().split()]
        return self.words(torch.tensor(known, dtype=torch.long)).sum(0, keepdim=True)

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        t = timestep[:, None].float() / 1000
        seen = torch.cat([noisy.flatten(1), words.expand(len(noisy), -1), t], 1)
        return self.outer(torch.tanh(self.inner(seen))).view_as(noisy)


def loss_of(model: Any, item: Captioned) -> torch.Tensor:
    noise = torch.randn_like(item.picture)
    t = torch.randint(0, 1000, (1,))
    part = t[:, None, None, None] / 1000
    noisy = (1 - part).sqrt() * item.picture + part.sqrt() * noise
    return mse_loss(model(noisy, t, model.encode(item.caption)), noise)


def painted(colour: str, shape: str, seed: int = 0) -> Captioned:
    inside = torch.tensor(SHAPES[shape]).bool()
    picture = 0.1 * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed))
    picture[:, inside] += torch.tensor(COLOURS[colour])[:, None]
    return Captioned(picture[None], f"a {colour} {shape}")


ITEMS = [
    painted(colour, shape, seed=100 * copy + n)
    for copy in range(COPIES)
    for n, (colour, shape) in enumerate((colour, shape) for colour in COLOURS for shape in SHAPES)
]


@pytest.fixture(scope="module")
def model() -> Painter:
    """A painter that was trained for a while."""
    torch.manual_seed(0)
    model = Painter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        for at in torch.randperm(len(ITEMS)).split(8):
            optimizer.zero_grad()
            torch.stack([loss_of(model, ITEMS[int(k)]) for k in at]).mean().backward()
            optimizer.step()
    optimizer.zero_grad()
    return model


def recorded(model: Painter, out: Path, items: Sequence[Captioned] = ITEMS[:6], **settings: Any) -> dmin_trace.Trace:
    settings = {"timesteps": 3, "dimension": 1024, "dtype": "float32"} | settings
    captions = {"caption": [item.caption for item in items]}
    with dmin_trace.recording(model, samples=len(items), out=out, columns=captions, **settings) as record:
        for i in record.samples:
            for k in record.timesteps:
                with record.step(i, k):
                    loss_of(model, items[i]).backward()
    return dmin_trace.open_trace(out)


def slow_row(model: Painter, trace: dmin_trace.Trace, item: Captioned, less: Captioned) -> np.ndarray:
    """The row of a difference by plain autograd: (T, v)."""
    header = trace.store.header
    parameters, made = list(model.parameters()), make_settings(header.settings)
    facts = header.projection
    plan = make_plan(facts.length, header.dimension, facts.seed, facts.kind, facts.width)
    sums = torch.zeros(len(header.timesteps), facts.length)
    for pinned in pinned_timesteps(made):
        for sign, one in ((1, item), (-1, less)):
            torch.manual_seed(pinned.seed)
            noise = torch.randn_like(one.picture)
            # The draw is pinned to the quantile of the timestep.
            t = torch.tensor([int(header.timesteps[pinned.number])])
            part = t[:, None, None, None] / 1000
            noisy = (1 - part).sqrt() * one.picture + part.sqrt() * noise
            loss = mse_loss(model(noisy, t, model.encode(one.caption)), noise)
            taken = torch.autograd.grad(loss, parameters)
            sums[pinned.number] += sign * torch.cat([gradient.flatten() for gradient in taken])
    rows = [compress_gradient([gradient], plan, signs=made.transform == "sign")[0] for gradient in sums / made.draws]
    return torch.stack(rows).numpy()


QUERY = painted("red", "box", seed=999)
WITHOUT = Captioned(QUERY.picture, "a box")


@pytest.mark.parametrize("transform", ["sign", "none"])
@pytest.mark.parametrize("draws", [1, 2])
def test_the_row_is_that_of_the_difference(model: Painter, tmp_path: Path, transform: str, draws: int) -> None:
    trace = recorded(model, tmp_path / "trace.zarr", transform=transform, draws=draws)
    queries = trace.query_loss(model, [QUERY, QUERY], loss_of, without=[WITHOUT, None])
    assert queries.names == ("difference 0", "query 1") and queries.without == (None, None)
    expected = slow_row(model, trace, QUERY, WITHOUT)
    found = queries.gradients[0]
    assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)
    # It is not the difference of the normalised rows.
    whole, less = trace.query_loss(model, [QUERY, WITHOUT], loss_of).gradients
    assert np.array_equal(queries.gradients[1], whole)
    naive = (whole - less) / np.linalg.norm(whole - less, axis=1, keepdims=True)
    assert np.linalg.norm(found - naive) > 0.1 * np.linalg.norm(naive)


def test_a_loop_of_ones_own_subtracts(model: Painter, tmp_path: Path) -> None:
    trace = recorded(model, tmp_path / "trace.zarr")
    with dmin_trace.recording(model, samples=1, like=trace) as record:
        for i in record.samples:
            for k in record.timesteps:
                with record.step(i, k, subtract=True):
                    loss_of(model, WITHOUT).backward()
                with record.step(i, k):
                    loss_of(model, QUERY).backward()
    short = trace.query_loss(model, [QUERY], loss_of, without=[WITHOUT])
    assert np.array_equal(record.queries.gradients, short.gradients)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_prompts_that_make_no_difference_are_refused(model: Painter, tmp_path: Path) -> None:
    trace = recorded(model, tmp_path / "trace.zarr")
    # Upper case is nothing to this model.
    shouted = Captioned(QUERY.picture, QUERY.caption.upper())
    with pytest.raises(QueryError, match="The two prompts make no difference: in the training step of sample 0"):
        trace.query_loss(model, [QUERY], loss_of, without=[shouted])


def test_a_model_that_ignores_its_words_is_refused(tmp_path: Path) -> None:
    class Deaf(Painter):
        def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
            return super().forward(noisy, timestep, 0 * words)

    torch.manual_seed(0)
    model = Deaf()
    trace = recorded(model, tmp_path / "trace.zarr")
    with pytest.raises(QueryError, match="The two prompts of difference 1 make no difference: at timestep 166 "):
        trace.query_loss(model, [QUERY, QUERY], loss_of, without=[None, WITHOUT])


def test_another_noise_or_another_picture_is_refused(model: Painter, tmp_path: Path) -> None:
    trace = recorded(model, tmp_path / "trace.zarr")

    def shifted(model: Any, item: Captioned) -> torch.Tensor:
        if item is WITHOUT:
            torch.randn(1)
        return loss_of(model, item)

    with pytest.raises(QueryError, match="their noise differs"):
        trace.query_loss(model, [QUERY], shifted, without=[WITHOUT])


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([True, True], "subtract=True was given twice"),
        ([True, False, False], "subtracted at some timesteps of sample 0"),
        ([False, True, False], "subtracted at some timesteps of sample 0"),
        ([True], "1 of 1 samples were not recorded"),
    ],
)
def test_turns_in_another_order_are_refused(model: Painter, tmp_path: Path, turns: list[bool], message: str) -> None:
    trace = recorded(model, tmp_path / "trace.zarr")

    def loop() -> None:
        with dmin_trace.recording(model, samples=1, like=trace) as record:
            k = 0
            for subtract in turns:
                with record.step(0, k, subtract=subtract):
                    loss_of(model, WITHOUT if subtract else QUERY).backward()
                k += not subtract

    with pytest.raises(CaptureError, match=message):
        loop()


def test_a_trace_has_no_differences(model: Painter, tmp_path: Path) -> None:
    with (
        pytest.raises(CaptureError, match="Only a query can be a difference"),
        dmin_trace.recording(model, samples=2, out=tmp_path / "trace.zarr") as record,
        record.step(0, 0, subtract=True),
    ):
        pass


def test_items_without_a_concept_are_for_each(model: Painter, tmp_path: Path) -> None:
    trace = recorded(model, tmp_path / "trace.zarr")
    with pytest.raises(DminTraceError, match="2 items were given and 1 without a concept"):
        trace.query_loss(model, [QUERY, QUERY], loss_of, without=[WITHOUT])


def test_the_concept_of_a_colour_finds_that_colour(model: Painter, tmp_path: Path) -> None:
    """Among samples of other shapes than the query's, those of its colour come first: more than for the whole query."""
    trace = recorded(model, tmp_path / "trace.zarr", ITEMS, timesteps=5, dimension=4096, dtype="int8")
    captions = [item.caption for item in ITEMS]

    def part_found(colour: str, shape: str, of: Callable[[str], str]) -> tuple[float, float]:
        """The part of the colour's samples among as many first ones, for the concept and for the whole query."""
        query = painted(colour, shape, seed=999)
        less = Captioned(query.picture, of(query.caption))
        queries = trace.query_loss(model, [query, query], loss_of, without=[less, None])
        scores = trace.scores(queries)
        others = [k for k, caption in enumerate(captions) if shape not in caption]
        wanted = sum(colour in captions[k] for k in others)
        parts = []
        for row in scores:
            first = sorted(others, key=lambda k: -row[k])[:wanted]
            parts.append(sum(colour in captions[k] for k in first) / wanted)
        return parts[0], parts[1]

    found = [part_found(c, s, lambda text, c=c: prompt_without(text, c)) for c in COLOURS for s in SHAPES]  # type: ignore[misc]
    concept, whole = np.mean(found, axis=0)
    # By chance it is a third.
    assert concept > 0.6 and concept > whole + 0.1


@pytest.mark.parametrize("samples", [(0,), (1,), (0, 2), (1, 2), (1, 0), (0, 1, 2)])
def test_a_run_without_both_samples_of_a_difference_is_refused(samples: tuple[int, ...]) -> None:
    with pytest.raises(QueryError, match="takes one prompt for all its images"):
        check_pairs(samples)
    check_pairs((2, 3, 0, 1))
