"""Lightning: the callback captures the right gradients, disturbs nothing, and refuses what it cannot capture."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from diffusers import DDPMScheduler
from dmin_trace.integrations.lightning import TraceCallback, attribute, capture
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning_points import SMALL, Denoiser, Inner, Points
from oracle import digit_gradients, digits_model, digits_unet, unshuffled
from pages import run_page
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import digit_folder
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset

import dmin_trace
from dmin_trace.errors import AttachError, CaptureError, DminTraceError, QueryError, TraceError, WeightsError
from dmin_trace.settings import Settings
from dmin_trace.store import open_store

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]


def loader() -> DataLoader[Any]:
    return DataLoader(Points(), batch_size=4, shuffle=True)


def small(out: Path, **more: Any) -> TraceCallback:
    settings = {"timesteps": 3, "dimension": 64, "dtype": "float32", "transform": "none"} | more
    return TraceCallback(out, **settings)


def trainer_of(folder: Path, *callbacks: Any, **more: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    saving = {"logger": False, "enable_checkpointing": False}
    settings = {"max_epochs": 2, **quiet, **saving, **more}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Denoiser, Path]]:
    """A module, trained with the callback, and its trace."""
    folder = tmp_path_factory.mktemp("trained")
    seed_everything(1)
    module = Denoiser()
    trainer_of(folder, small(folder / "trace.zarr")).fit(module, loader())
    yield module, folder / "trace.zarr"


def test_on_the_page_a_copied_training_image_finds_itself_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seed_everything(0)
    names = run_page("lightning.md")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[(")]
    assert [line.split(",")[0] for line in lines] == ["[(7", "[(19"]
    assert [(hit.sample, hit.columns["label"]) for hit in names["hits"][0][:1]] == [(7, 7)]
    first, again = open_store(tmp_path / "out" / "trace.zarr"), open_store(tmp_path / "out" / "again.zarr")
    assert first.complete and first.header.timesteps == (100, 300, 500, 700, 900)
    assert np.array_equal(first.gradients(np.arange(48)), again.gradients(np.arange(48)))


def test_gradients_are_those_of_an_independent_reference_for_every_parameter(tmp_path: Path) -> None:
    files = sorted(digit_folder(tmp_path / "digits", 3).iterdir())
    images = [torch.from_numpy(np.asarray(Image.open(f).convert("L")) / np.float32(127.5) - 1)[None] for f in files]
    blank = tmp_path / "blank.safetensors"
    seed_everything(2)

    class Digits(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
            self.unet = digits_unet()

        def training_step(self, batch: torch.Tensor) -> torch.Tensor:
            noise = torch.randn_like(batch)
            t = torch.randint(0, 1000, (len(batch),))
            loss = mse_loss(self.unet(self.schedule.add_noise(batch, noise, t), t).sample, noise)
            batch.neg_()  # A step may spoil its batch.
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=2e-3)

    module, out = Digits(), tmp_path / "trace.zarr"
    asked: dict[str, Any] = {"timesteps": [0, 250, 999], "dimension": 2**20, "projection": "uniform"}
    data = DataLoader(images, batch_size=3, shuffle=True)  # type: ignore[arg-type]
    trainer_of(tmp_path, TraceCallback(out, dtype="float32", transform="none", **asked)).fit(module, data)
    trace = open_store(out)
    weights = load_file(tmp_path / "trace.weights.safetensors")
    save_file({name.removeprefix("unet."): value for name, value in weights.items()}, blank)
    reference = digits_model(blank)
    for sample, file in enumerate(files):
        captured = unshuffled(trace, sample)
        for k, (loss, gradients) in enumerate(digit_gradients(reference, file, [0, 250, 999])):
            assert trace.loss[sample, k] == pytest.approx(loss, rel=1e-5)
            expected = torch.cat([g.flatten() for g in gradients.values()])
            found = torch.from_numpy(captured[k])
            assert (found - expected).norm() <= 1e-5 * expected.norm(), (sample, k)


def facts(folder: Path, *callbacks: Any) -> dict[str, Any]:
    """A training with everything on, and all that it left behind."""
    seed_everything(4)
    module = Denoiser()
    checkpoint = ModelCheckpoint(folder / "saved", save_last=True, monitor="loss")
    trainer = trainer_of(
        folder,
        checkpoint,
        *callbacks,
        logger=CSVLogger(folder, name="log", version=0),
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    trainer.fit(module, loader())
    optimizer = trainer.optimizers[0].state_dict()
    saved = torch.load(folder / "saved" / "last.ckpt", weights_only=False)
    kept = saved["callbacks"]
    assert len(kept) == 1
    return {
        "random": [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()],  # type: ignore[union-attr]
        "weights": {name: value.tolist() for name, value in module.state_dict().items()},
        "optimizer": {n: {k: v.tolist() for k, v in s.items()} for n, s in optimizer["state"].items()},
        "rate": optimizer["param_groups"][0]["lr"],
        "grads": [p.grad is None or p.grad.tolist() for p in module.parameters()],
        "modes": [m.training for m in module.modules()],
        "records": [module.count, [loss.item() for loss in module.losses], module.mean._update_count],
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "log": (folder / "log" / "version_0" / "metrics.csv").read_text(),
        "files": sorted(path.name for path in (folder / "saved").iterdir()),
        "checkpoint": [saved["epoch"], saved["global_step"], {n: v.tolist() for n, v in saved["state_dict"].items()}],
        "best": [float(next(iter(kept.values()))["best_model_score"])],
        "logging": [name in vars(module) for name in ("log", "log_dict")],
        "loggers": [type(one).__name__ for one in trainer.loggers],
        "steps": trainer.global_step,
    }


def test_trace_callback_changes_nothing_about_the_training(tmp_path: Path) -> None:
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    out = tmp_path / "trace.zarr"
    having, lacking = facts(tmp_path / "with", small(out)), facts(tmp_path / "without")
    assert [name for name in lacking if having[name] != lacking[name]] == []
    assert open_store(out).complete
    assert lacking["loggers"] == ["CSVLogger"] and "by_hand" in lacking["log"] and lacking["steps"] == 6


def test_trace_callback_records_the_mean_over_draws(tmp_path: Path) -> None:
    seed_everything(1)
    module, out, points = Denoiser(), tmp_path / "trace.zarr", Points()
    asked: dict[str, Any] = {
        "timesteps": [100, 900],
        "dimension": 1024,
        "projection": "uniform",
        "dtype": "float32",
        "transform": "none",
    }
    asked |= {"draws": 2}
    trainer_of(tmp_path, TraceCallback(out, **asked, strict=True)).fit(module, loader())
    trace = open_store(out)
    assert trace.header.draws == 2
    module.eval()
    for sample in range(12):
        clean = points[sample]["point"][None]
        for k, timestep in enumerate((100, 900)):
            expected = torch.zeros(())
            for entropy in ([0, k + 1], [0, k + 1, 1]):
                seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
                noise = torch.randn(1, 16, generator=torch.Generator().manual_seed(seed))
                output = module.denoiser(clean + noise * timestep / 1000, torch.tensor([timestep]))
                gradients = torch.autograd.grad((output - noise).square().mean(), list(module.parameters()))
                expected = expected + torch.cat([g.flatten() for g in gradients]) / 2
            found = torch.from_numpy(unshuffled(trace, sample))[k]
            assert (found - expected).norm() <= 1e-5 * expected.norm(), (sample, k)
    capture(module, loader(), out=tmp_path / "again.zarr", settings=Settings(**asked | {"timesteps": (100, 900)}))
    again = open_store(tmp_path / "again.zarr")
    assert np.array_equal(again.gradients(np.arange(12)), trace.gradients(np.arange(12)))
    hits = attribute(module, dmin_trace.open_trace(out), [points[4]], k=2, score="dmin")
    assert hits[0][0].sample == 4 and hits[0][0].score == pytest.approx(2, abs=1e-5)


def test_trace_callback_keeps_each_gradient_under_its_data_set_index(trained: tuple[Denoiser, Path]) -> None:
    module, out = trained
    trace = open_store(out)
    assert trace.sample.tolist() == list(range(12))
    assert list(trace.column("caption")) == [f"point {k}" for k in range(12)]
    assert trace.header.writers.keys() >= {"lightning", "torch"}
    points = Points()
    hits = attribute(module, out, [points[7], points[2]], k=2, score="dmin")
    assert [row[0].sample for row in hits] == [7, 2]
    assert all(row[0].score == pytest.approx(3, abs=1e-4) for row in hits)


def test_capture_runs_a_frozen_encoder_once_for_each_sample(tmp_path: Path) -> None:
    asked: list[int] = []

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(16, 16)

        def forward(self, points: torch.Tensor) -> torch.Tensor:
            asked.append(len(points))
            return torch.tanh(self.linear(points))

    class Latent(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleDict({"encoder": Encoder().requires_grad_(False)})

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.no_grad():
                encoded = self.parts["encoder"](batch["point"])
            return super().training_step({"point": encoded}, batch_idx)

    seed_everything(5)
    module, points = Latent(), Points()
    capture(module, loader(), out=tmp_path / "a.zarr", settings=SMALL)
    # The first sample comes three times: to be probed, and recorded twice.
    assert asked == [1] * 14
    assert "forward" not in vars(module.parts["encoder"])
    plain = {"timesteps": 3, "dimension": 64, "dtype": "float32", "transform": "none"}
    module.log = module.log_dict = lambda *args, **named: None  # type: ignore[method-assign,assignment]
    with dmin_trace.recording(module, samples=12, out=tmp_path / "b.zarr", **plain) as recording:  # type: ignore[arg-type]
        for i in recording.samples:
            for k in recording.timesteps:
                with recording.step(i, k):
                    module.training_step({"point": points[i]["point"][None]}, 0)["loss"].backward()
    rows = [open_store(tmp_path / name).gradients(np.arange(12)) for name in ("a.zarr", "b.zarr")]
    assert np.array_equal(rows[0], rows[1])


def test_attribute_refuses_invalid_queries(trained: tuple[Denoiser, Path]) -> None:
    module, out = trained
    with pytest.raises(QueryError, match="No item"):
        attribute(module, out, [])
    with pytest.raises(QueryError, match="k is 0"):
        attribute(module, out, [Points()[0]], k=0, score="dmin")
    with pytest.raises(WeightsError, match="not those of the trace"):
        attribute(Denoiser(), out, [Points()[0]])


class Unpinned(Denoiser):
    """Draws its timestep in a way that is not pinned."""

    def draw(self, clean: torch.Tensor) -> torch.Tensor:
        return torch.tensor([random.Random(5).randint(0, 999)] * len(clean))


def test_trace_callback_logs_an_error_in_the_capture_and_the_training_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saving = ModelCheckpoint(tmp_path / "saved")
    with caplog.at_level(logging.ERROR, logger="dmin_trace"):
        trainer = trainer_of(tmp_path, small(tmp_path / "a.zarr"), saving, enable_checkpointing=True)
        trainer.fit(Unpinned(), loader())
    assert trainer.global_step == 6 and trainer.state.finished
    assert "timestep cannot be pinned" in caplog.text and "capture(module, loader" in caplog.text
    assert (tmp_path / "a.weights.safetensors").exists() and not (tmp_path / "a.zarr").exists()


def test_trace_callback_strict_raises_after_the_checkpoints(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "saved", save_last=True)
    trainer = trainer_of(tmp_path, small(tmp_path / "a.zarr", strict=True), saving, enable_checkpointing=True)
    with pytest.raises(CaptureError, match="timestep cannot be pinned"):
        trainer.fit(Unpinned(), loader())
    assert torch.load(tmp_path / "saved" / "last.ckpt", weights_only=False)["global_step"] == 6


def test_capture_continues_where_it_stopped(trained: tuple[Denoiser, Path], tmp_path: Path) -> None:
    module, out = trained
    again = tmp_path / "again.zarr"
    seen: list[int] = []
    step = module.training_step

    class Stops(Points):
        stop = 10  # not a sample of the data set's fingerprint

        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == self.stop:
                raise KeyboardInterrupt
            seen.append(index)
            return super().__getitem__(index)

    data = DataLoader(Stops(), batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        capture(module, data, out=again, settings=SMALL)
    # After the first sample those by which the data set is known again, twice.
    assert seen[0] == 0 and seen[-9:] == list(range(1, 10)) and module.training_step == step
    seen.clear()
    Stops.stop = -1
    capture(module, data, out=again, settings=SMALL)
    assert seen[0] == 8 and seen[-3:] == [9, 10, 11] and 1 not in seen
    assert np.array_equal(open_store(again).gradients(np.arange(12)), open_store(out).gradients(np.arange(12)))
    with pytest.raises(TraceError, match="is complete"):
        capture(module, data, out=again, settings=SMALL)


def test_trace_callback_captures_averaged_weights_if_the_training_leaves_them(tmp_path: Path) -> None:
    module = Denoiser()
    trainer_of(tmp_path, small(tmp_path / "a.zarr", strict=True), EMAWeightAveraging(decay=0.5)).fit(module, loader())
    kept = load_file(tmp_path / "a.weights.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in module.named_parameters())


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_trace_callback_uses_the_precision_of_the_trainer(tmp_path: Path, precision: Any) -> None:
    halves: list[bool] = []

    class Looks(Denoiser):
        def draw(self, clean: torch.Tensor) -> torch.Tensor:
            halves.append(torch.is_autocast_enabled("cpu"))
            return super().draw(clean)

    module = Looks()
    trainer_of(tmp_path, small(tmp_path / "a.zarr", strict=True), precision=precision).fit(module, loader())
    assert halves == [precision == "bf16-mixed"] * (6 + 6 + 36)
    dtypes = {p.dtype for p in module.parameters()}
    assert dtypes == {torch.float64 if precision == "64-true" else torch.float32}
    points = Points()
    for asking in (None, trainer_of(tmp_path, precision=precision)):
        hits = attribute(module, tmp_path / "a.zarr", [points[5]], k=1, score="dmin", trainer=asking)
        assert hits[0][0].sample == 5 and hits[0][0].score == pytest.approx(3, abs=1e-3)


def test_trace_callback_in_pytorch_lightning(tmp_path: Path) -> None:
    import pytorch_lightning

    class Older(pytorch_lightning.LightningModule):
        training_step = Denoiser.training_step
        draw = Denoiser.draw
        configure_optimizers = Denoiser.configure_optimizers

        def __init__(self) -> None:
            super().__init__()
            self.denoiser, self.mean, self.losses, self.count = Inner(), torchmetrics.MeanMetric(), [], 0
            self.register_buffer("seen", torch.zeros(()))

    trainer = pytorch_lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[small(tmp_path / "a.zarr", strict=True)],
    )
    trainer.fit(Older(), loader())
    assert open_store(tmp_path / "a.zarr").complete


class ByHand(Denoiser):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        points = Points()
        return iter([points[k] for k in range(4)])


WRONG: dict[str, tuple[type[Denoiser], Any, str]] = {
    "manual optimisation": (ByHand, loader(), "automatic_optimization=False"),
    "no index": (Denoiser, DataLoader(Endless(), batch_size=2), "IterableDataset"),
    "several loaders": (Denoiser, [loader(), loader()], "expected one DataLoader"),
    "whole batches": (Denoiser, DataLoader([torch.ones(2, 16)], batch_size=None), "whole batches"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("kind", "data", "message"), WRONG.values(), ids=WRONG.keys())
def test_trace_callback_refuses_before_the_training_what_cannot_be_captured(
    tmp_path: Path, kind: type[Denoiser], data: Any, message: str
) -> None:
    trainer = trainer_of(tmp_path, small(tmp_path / "a.zarr"))
    with pytest.raises(AttachError, match=message):
        trainer.fit(kind(), data)
    assert trainer.global_step == 0 and not (tmp_path / "a.zarr").exists()


def test_trace_callback_keeps_an_older_trace(tmp_path: Path) -> None:
    trainer_of(tmp_path, small(tmp_path / "a.zarr")).fit(Denoiser(), loader())
    first = open_store(tmp_path / "a.zarr").header.id
    trainer_of(tmp_path, small(tmp_path / "a.zarr")).fit(Denoiser(), loader())
    assert open_store(tmp_path / "a.zarr").header.id != first
    assert open_store(tmp_path / "a-1.zarr").header.id == first
    assert (tmp_path / "a-1.weights.safetensors").exists()


def test_trace_callback_refuses_several_processes_and_unwritable_stores(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match="runs 2 processes"):
        small(tmp_path / "a.zarr").setup(trainer_of(tmp_path, devices=2, strategy="ddp_spawn"), Denoiser(), "fit")
    with pytest.raises(TraceError, match="cannot be written"):
        trainer_of(tmp_path, small(Path("/dev/null/a.zarr"))).fit(Denoiser(), loader())
    with pytest.raises(DminTraceError, match="power of two"):
        TraceCallback("a", dimension=3)


def test_trace_callback_logs_that_a_training_without_steps_is_not_captured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(tmp_path, small(tmp_path / "a.zarr"), max_epochs=0)
    trainer.fit(Denoiser(), loader())
    assert "captured nothing" in caplog.text and not (tmp_path / "a.zarr").exists()


def test_trace_callback_captures_nothing_in_a_fast_development_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_of(tmp_path, small(tmp_path / "a.zarr"), fast_dev_run=True).fit(Denoiser(), loader())
    assert "nothing is captured" in caplog.text and not (tmp_path / "a.zarr").exists()
