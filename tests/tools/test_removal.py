"""Removal and retrieval on a tiny fine-tuned model: figures by slow oracles, and runs that go on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

pytest.importorskip("skimage", reason="pictures are compared by scikit-image; the extra bench has it")

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "reproduce"))

import emoji_base
import emoji_data
import finetune
import finetune_concepts
import finetune_removal
import finetune_retrieval
import methods
import near_copies
import ranking
from finetune import Recipe, Tuning, all_queries
from finetune_truth import Truth
from gradient_file import ask_pictures, capture
from trainings import Trainings

RECIPE = "tiny"
TIMESTEPS = (250, 750)
OTHERS = ("flag", "sky-weather")


@dataclass
class Place:
    """Folders, and what was made once."""

    folder: Path
    tuning: Tuning
    truth: Truth

    def remove(self, **more: object) -> str:
        """Runs the removal; its page."""
        options: dict[str, object] = {"percents": "10", "seeds": "3,4", "only": "paper,pixels"} | more
        finetune_removal.main(**self._same(), held_out=1, generated=1, compiled=False, **options)  # type: ignore[arg-type]
        return (self.folder / "out" / f"finetune_removal_{RECIPE}.md").read_text("utf-8")

    def retrieve(self) -> str:
        """Runs the retrieval; its page."""
        finetune_retrieval.main(**self._same())  # type: ignore[arg-type]
        return (self.folder / "out" / f"finetune_retrieval_{RECIPE}.md").read_text("utf-8")

    def conceive(self) -> str:
        """Asks for concepts; the page."""
        finetune_concepts.main(**self._same())  # type: ignore[arg-type]
        return (self.folder / "out" / f"finetune_concepts_{RECIPE}.md").read_text("utf-8")

    def _same(self) -> dict[str, object]:
        folders = {name: self.folder / name for name in ("work", "out", "truths", "bases")}
        return {"data": self.folder / "data.npz", "recipe": RECIPE, **folders}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A base that knows nothing, fine-tuned on made pictures, its queries and its gradients."""
    folder, threads = tmp_path_factory.mktemp("removal"), torch.get_num_threads()
    categories = [category for category in emoji_data.NEW for _ in range(5)] + list(OTHERS) * 6
    images = np.random.default_rng(0).integers(256, size=(len(categories), 4, 4, 3), dtype=np.uint8)
    images = images.repeat(8, axis=1).repeat(8, axis=2)
    names = [f"number {k}" for k in range(len(categories))]
    np.savez(folder / "data.npz", images=images, names=names, subcategories=categories)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(finetune.RECIPES, RECIPE, Recipe("sd", "lora", 3, 4, 5e-2))
        patch.setattr(finetune, "divide", lambda emoji, *_: emoji_data.divide(emoji, 30, 8))
        for name, value in (("QUERIES", 8), ("SAMPLING_STEPS", 2)):
            patch.setattr(finetune, name, value)
        for module in (methods, finetune_retrieval, finetune_concepts):
            patch.setattr(module, "TIMESTEPS", TIMESTEPS)
        for module in (finetune_removal, finetune_retrieval, finetune_concepts):
            patch.setattr(module, "RESAMPLES", 20)
        patch.setattr(finetune_retrieval, "COPIED", 3)
        patch.setattr(finetune_retrieval, "ASKED", 1)
        emoji, _ = emoji_data.read_emoji(folder / "data.npz")
        words = len(emoji_base.make_tokenizer(emoji.captions))
        emoji_base.Base("sd", words, 1).export(folder / "bases" / "sd.safetensors")
        tuning = Tuning(finetune.RECIPES[RECIPE], folder / "data.npz", compiled=False, bases=folder / "bases")
        tuning.full(folder / "truths" / f"{RECIPE}.safetensors")
        queries = all_queries(tuning)
        truth = Truth(len(tuning.latents), queries, np.zeros((1, 1, len(queries.images))))
        truth.write(folder / "truths" / f"{RECIPE}.npz")
        known = np.concatenate([tuning.division.tuning.images, queries.images])
        captions = [*tuning.division.tuning.captions, *queries.captions]
        for objective, name in (("loss", RECIPE), (methods.SQUARED, f"{RECIPE}-{methods.SQUARED}")):
            asked = ask_pictures(tuning, known, captions, truth.samples, objective)  # type: ignore[arg-type]
            capture(asked, folder / "work" / name, tuple((t, 0) for t in TIMESTEPS))
        yield Place(folder, tuning, truth)
    torch.set_num_threads(threads)


# -- removal -----------------------------------------------------------------------------------------------------------


def plan_of(place: Place) -> tuple[Trainings, finetune_removal.Plan]:
    """The plan of `Place.remove`, made again."""
    given = methods.given_of(place.tuning, place.truth, place.folder / "truths", place.folder / "work", RECIPE)
    scores = methods.scores_of(given, methods.methods(), "paper,pixels")
    queries = finetune_removal.chosen_queries(place.truth.queries, 1, 1)
    kept = place.folder / "work" / "removal" / RECIPE
    trainings = Trainings(place.tuning, place.truth.queries, place.folder / "bases", kept)
    return trainings, finetune_removal.make_plan(scores, queries, [10], [3, 4])


def by_hand(place: Place, removed: list[int], seed: int, query: int) -> tuple[float, np.ndarray]:
    """The loss and the picture of a query after a training, one timestep after another."""
    tuning, queries = place.tuning, place.truth.queries
    tuning.train(np.array([n for n in range(place.truth.samples) if n not in removed]), seed)
    latents = tuning.autoencoder.encode(queries.images[query : query + 1])
    words, draws, losses = tuning.words_of([queries.captions[query]]), torch.Generator().manual_seed(7), []
    for t in range(50, 1000, 100):
        noise = torch.randn(latents.shape, generator=draws)
        noisy, target = tuning.kind.noised(latents, noise, torch.tensor([t]))
        with torch.no_grad():
            said = tuning.kind.predict(tuning.denoiser, noisy, torch.tensor([t]), words)
        losses.append(float((said - target).square().mean()))
    return float(np.mean(losses)), tuning.generate(queries.captions[8:])[query - 8] / 255


def test_growth_is_that_of_trainings_by_hand(place: Place) -> None:
    page = place.remove()
    trainings, plan = plan_of(place)
    counted, pairs, changes = finetune_removal.measure(trainings, plan, 10)
    assert counted.tolist() == plan.queries.tolist() and pairs == 4
    query = int(plan.queries[1])
    assert query >= 8 and query % 2 == 1
    scores = -((place.tuning.division.tuning.images / 255 - place.truth.queries.images[query] / 255) ** 2).mean(
        (1, 2, 3)
    )
    top = sorted(range(len(scores)), key=lambda n: -scores[n])[:3]
    assert plan.top[10]["pixels"][1].tolist() == top
    growths, moved = [], []
    for seed in (3, 4):
        before, after = by_hand(place, [], seed, query), by_hand(place, top, seed, query)
        growths.append(after[0] - before[0])
        moved.append(((after[1] - before[1]) ** 2).mean())
    assert abs(np.mean(growths)) > 1e-5 and np.mean(moved) > 0
    assert changes["pixels"].growth[1] == pytest.approx(np.mean(growths), abs=2e-6)
    assert changes["pixels"].moved[1] == pytest.approx(np.mean(moved))
    assert 0 < changes["pixels"].unlike[1] < 2 and np.isnan(changes["pixels"].moved[0])
    assert changes["pixels"].models == 4 == changes["random samples"].models
    assert f"| all (2) | pixels | 4 | {changes['pixels'].growth.mean():.4f} | " in page


def test_a_lost_training_alone_is_trained_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    page, trained = place.remove(), []
    train = Trainings.train

    def counted(self: Trainings, removed: np.ndarray, seed: int) -> None:
        trained.append(seed)
        train(self, removed, seed)

    monkeypatch.setattr(Trainings, "train", counted)
    files = sorted((place.folder / "work" / "removal" / RECIPE).glob("*.npz"))
    lost = dict(np.load(files[0]))
    files[0].unlink()
    again = place.remove()
    assert len(trained) == 1
    for name, values in np.load(files[0]).items():
        np.testing.assert_array_equal(values, lost[name])
    assert page[page.index("## Without") :] == again[again.index("## Without") :]
    # No time: nothing is trained, and what is missing does not count.
    assert "Not trained yet." in place.remove(seeds="5", minutes=-1.0)
    assert len(trained) == 1


def test_a_percentage_is_done_before_the_next_and_equal_sets_once(place: Place) -> None:
    scores = {"one": np.random.default_rng(0).standard_normal((4, 40)), "other": np.ones((4, 40))}
    plan = finetune_removal.make_plan(scores, np.array([1, 3]), [5, 10], [7, 8])
    jobs = [(len(removed), seed) for removed, seed in plan.jobs()]
    assert jobs == [(0 if n == 0 else size, seed) for size in (2, 4) for seed in (7, 8) for n in range(7)]
    assert plan.top[5]["one"][0].tolist() == np.argsort(-scores["one"][1])[:2].tolist()
    trainings, _ = plan_of(place)
    assert trainings.path(np.array([3, 1]), 7) == trainings.path(np.array([1, 3]), 7)
    assert len({trainings.path(np.array(removed, int), seed) for removed in ([], [1], [13]) for seed in (7, 8)}) == 6


def test_queries_are_odd_and_of_new_and_known_subcategories(place: Place) -> None:
    queries = place.truth.queries
    found = finetune_removal.chosen_queries(queries, 2, 2)
    assert (found % 2 == 1).all() and len(set(found.tolist())) == 4 and (found < 8).sum() == 2
    for kind in (found < 8, found >= 8):
        new = [queries.categories[q] in emoji_data.NEW for q in found[kind]]
        assert sum(new) == len(new) / 2


def test_gradients_of_another_model_are_refused(place: Place, tmp_path: Path) -> None:
    asked = ask_pictures(place.tuning, place.truth.queries.images[:2], place.truth.queries.captions[:2], 2)
    capture(asked, tmp_path / "other", ((250, 0),))
    with pytest.raises(typer.BadParameter, match="of another model"):
        methods.opened(place.tuning, tmp_path / "other", "loss")
    with pytest.raises(typer.BadParameter, match="run gradient_file.py first"):
        methods.opened(place.tuning, tmp_path / "none", "loss")


def test_scores_that_were_kept_are_methods_too(tmp_path: Path) -> None:
    scores = np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "EK-FAC 0.1.npy", scores)
    found = finetune_removal.kept_scores(tmp_path, ["EK-FAC 0.1"], (2, 3))
    np.testing.assert_array_equal(found["EK-FAC 0.1"], scores)
    with pytest.raises(typer.BadParameter, match=r"is \(2, 3\); \(2, 4\) is expected"):
        finetune_removal.kept_scores(tmp_path, ["EK-FAC 0.1"], (2, 4))
    with pytest.raises(typer.BadParameter, match=r"is missing; there are 'EK-FAC 0\.1'"):
        finetune_removal.kept_scores(tmp_path, ["EK-FAC 1"], (2, 3))


def test_ratios_are_of_means() -> None:
    one, other = np.array([1.0, 3.0, 2.0, 6.0]), np.array([1.0, 2.0, 1.0, 4.0])
    found = finetune_removal.ratio(one, other)
    assert found.value == 1.5 and 1 <= found.low < 1.5 < found.high <= 2
    assert np.isnan(finetune_removal.ratio(one, -other).value)


# -- retrieval ---------------------------------------------------------------------------------------------------------


def test_ranks_and_precisions_are_those_of_loops() -> None:
    scores = np.random.default_rng(1).integers(0, 30, (6, 20)).astype(float) + np.linspace(0, 0.5, 20)
    wanted, relevant = np.array([0, 3, 7, 19, 4, 4]), np.arange(20) % 7 == 2
    assert relevant.sum() == 3
    for q in range(6):
        order = sorted(range(20), key=lambda n: -scores[q, n])
        assert ranking.ranks(scores, wanted)[q] == order.index(wanted[q]) + 1
        hits = [relevant[n] for n in order]
        assert ranking.precision(scores, relevant)[q] == pytest.approx(sum(hits[:3]) / 3)
        each = [sum(hits[: k + 1]) / (k + 1) for k in range(20) if hits[k]]
        assert ranking.average_precision(scores, relevant)[q] == pytest.approx(sum(each) / 3)
    assert ranking.ranks(np.ones((1, 5)), np.array([2])).tolist() == [5]
    orders = [
        ranking.average_precision(-np.array([order], float), np.arange(5) < 2)[0] for order in permutations(range(5))
    ]
    assert ranking.chance_average_precision(5, 2) == pytest.approx(np.mean(orders))


def test_near_copies_are_near_but_no_copies() -> None:
    x = np.linspace(0, 200, 32)
    picture = np.stack([np.add.outer(x, x) / 2, np.tile(x, (32, 1)), np.full((32, 32), 90)], axis=2).astype(np.uint8)
    for change in near_copies.WAYS.values():
        changed = change(picture)
        assert changed.shape == picture.shape and changed.dtype == np.uint8
        assert 0 < np.abs(changed.astype(float) - picture).mean() < 12
    assert np.array_equal(near_copies.shifted(picture)[1:, 1:], picture[:-1, :-1])
    assert Image.fromarray(near_copies.through_jpeg(picture)).size == (32, 32)


@pytest.fixture(scope="module")
def retrieved(place: Place) -> str:
    """The page of one run."""
    return place.retrieve()


def test_the_page_says_what_was_found(place: Place, retrieved: str) -> None:
    page = retrieved
    folder = next((place.folder / "work" / "retrieval").iterdir())
    wanted = finetune_retrieval.Wanted.read(folder / "queries.npz")
    tuning = place.tuning.division.tuning
    assert wanted.ways.tolist().count("shift") == 3 == wanted.ways.tolist().count(finetune_retrieval.OTHER)
    for caption, way, original in zip(wanted.captions, wanted.ways, wanted.originals, strict=True):
        if original >= 0:
            own = tuning.captions[original]
            same = caption.split(":")[0] == own.split(":")[0]
            assert (caption != own and same) if way == finetune_retrieval.OTHER else caption == own
    copies = np.flatnonzero(wanted.ways == "shift")
    ranks = []
    for q in copies:
        far = ((tuning.images / 255.0 - wanted.images[q] / 255.0) ** 2).mean((1, 2, 3))
        ranks.append(sorted(far.tolist()).index(far[wanted.originals[q]]) + 1)
    assert f"| shift | pixels | {np.mean(np.array(ranks) == 1):.3f} (" in page
    assert "| 2 to 3 % of the set | 4 4 4 | held out (3) | *chance* | 0.133 | " in page
    assert all(f"| heart | 4 | generated (1) | {name} | " in page for name, _ in methods.methods())


def test_gradients_of_more_queries_lie_beside_those_of_the_samples(place: Place, retrieved: str) -> None:
    folder = next((place.folder / "work" / "retrieval").iterdir())
    wanted = finetune_retrieval.Wanted.read(folder / "queries.npz")
    given = methods.given_of(place.tuning, place.truth, place.folder / "truths", place.folder / "work", RECIPE)
    more = finetune_retrieval.given_for(place.tuning, wanted, given, folder)
    products = np.zeros((2, 4))
    for t in TIMESTEPS:
        rows = []
        for images, captions in (
            (place.tuning.division.tuning.images[:4], place.tuning.division.tuning.captions[:4]),
            (wanted.images[:2], wanted.captions[:2]),
        ):
            asked = ask_pictures(place.tuning, images, list(captions), 0)
            found = [
                torch.autograd.grad(
                    asked.loss(asked.parameters, torch.tensor(n), t, 0), list(asked.parameters.values())
                )
                for n in range(len(images))
            ]
            rows.append(np.stack([torch.cat([g.reshape(-1) for g in of]).double().numpy() for of in found]))
        samples, asked_rows = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rows)
        products += asked_rows @ samples.T
    scores = methods.scores_of(more, methods.methods(), "paper")["paper"]
    np.testing.assert_allclose(scores[:2, :4], products, atol=2e-3)
    assert len(scores) == len(wanted.images)


# -- concepts ----------------------------------------------------------------------------------------------------------


def test_concepts_are_words_that_some_samples_have() -> None:
    captions = ["a red heart", "a red flag", "the Red sun", "a blue heart", "a moon", "a blue moon", "a star"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_concepts, "LEAST", 2)
        patch.setattr(finetune_concepts, "MOST", 0.4)
        concepts = finetune_concepts.concepts_of(captions)
    assert {word: np.flatnonzero(has).tolist() for word, has in concepts.items()} == {
        "blue": [3, 5],
        "heart": [0, 3],
        "moon": [4, 5],
    }
    asked = finetune_concepts.askings(["a blue heart of stone", "a star"], concepts)
    assert asked == [finetune_concepts.Asking(0, "blue", "heart"), finetune_concepts.Asking(0, "heart", "blue")]
    asked = finetune_concepts.askings(["a heart"], concepts)
    assert asked == [finetune_concepts.Asking(0, "heart")]


def test_what_is_asked_for_a_concept_is_the_difference_of_two_gradients(place: Place) -> None:
    queries = place.truth.queries
    n = next(n for n, caption in enumerate(queries.captions) if "heart" in caption)
    asked = finetune_concepts.ask_differences(place.tuning, queries, [finetune_concepts.Asking(n, "heart")])
    found = asked.gradients(torch.zeros(1, dtype=torch.int64), *place_passes()[0])[0]
    less = queries.captions[n].replace("heart ", "")
    assert less != queries.captions[n]
    gradients = [
        ask_pictures(place.tuning, queries.images[n : n + 1], [caption], 0).gradients(
            torch.zeros(1, dtype=torch.int64), *place_passes()[0]
        )[0]
        for caption in (queries.captions[n], less)
    ]
    torch.testing.assert_close(found, gradients[0] - gradients[1], rtol=1e-3, atol=1e-6)
    assert float(found.abs().max()) > 0


def place_passes() -> list[tuple[int, int]]:
    """Of the queries."""
    return [(t, 0) for t in TIMESTEPS]


def test_concepts_in_small(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LEAST", 2), ("MOST", 0.5), ("EACH", 1)):
        monkeypatch.setattr(finetune_concepts, name, value)
    page = place.conceive()
    captions = list(place.tuning.division.tuning.captions)
    concepts = finetune_concepts.concepts_of(captions)
    asked = finetune_concepts.askings(place.truth.queries.captions, concepts)
    assert f"| all ({len(asked)}) | deflated |" in page and f"| all ({len(asked)}) | dmin |" in page
    # Again, without a gradient computed anew.
    assert place.conceive().splitlines()[7:] == page.splitlines()[7:]


def test_precisions_are_of_the_samples_that_have_the_word() -> None:
    concepts = {"red": np.array([True, False, True, False]), "heart": np.array([False, True, True, False])}
    asked = [finetune_concepts.Asking(0, "heart", "red"), finetune_concepts.Asking(0, "red", "heart")]
    of_words, of_wholes = np.array([[1.0, 4, 3, 2], [4, 1, 3, 2]]), np.array([[1.0, 2, 3, 4]])
    found = finetune_concepts.precisions(asked, concepts, of_words, of_wholes)
    np.testing.assert_allclose(found.concept, [1.0, 1.0])
    np.testing.assert_allclose(found.whole, [(1 / 2 + 2 / 3) / 2, (1 / 2 + 2 / 4) / 2])
    np.testing.assert_allclose(found.other, [(1 / 2 + 2 / 4) / 2, (1 / 2 + 2 / 4) / 2])
