"""What the training script passed to `accelerator.prepare`: its models, its optimizers and its dataloader."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader, IterableDataset

from dmin_trace.capture.pictures import Pictures, Reading, watch_reading
from dmin_trace.capture.random_calls import medians
from dmin_trace.capture.random_state import seed_everything
from dmin_trace.capture.step import takes_timestep
from dmin_trace.errors import AttachError, CaptureError

UNSUPPORTED = {DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM, DistributedType.XLA}
"""Kinds of distributed runs in which no process has whole gradients."""


class TrainingRun:
    """A training script's accelerator, and what was prepared with it.

    loaders: every dataloader that was prepared.
    loader: the one whose batches are trained on, or None while that is not known.
    pictures: the training samples, numbered from 0; made when the capture begins.
    reading: what was seen while a sample was fetched last.
    backwards: how often the script called `accelerator.backward` in its training.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.models: list[torch.nn.Module] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.loaders: list[Any] = []
        self.loader: Any = None
        self.pictures: Pictures | None = None
        self.reading = Reading()
        self.backwards = 0

    def add(self, prepared: Any) -> list[Any]:
        """Adds what `prepare` returned, and gives the dataloaders that are new."""
        prepared = prepared if isinstance(prepared, (tuple, list)) else [prepared]
        self.models += [one for one in prepared if isinstance(one, torch.nn.Module)]
        optimizers = [one for one in prepared if isinstance(one, torch.optim.Optimizer)]
        self.optimizers += [optimizer for optimizer in optimizers if optimizer not in self.optimizers]
        known = set(map(id, self.loaders))
        added = [one for one in prepared if isinstance(one, DataLoader) and id(one) not in known]
        self.loaders += added
        return added

    def check_optimizer(self) -> None:
        """Raises CaptureError if capture batches would train the model."""
        if not self.optimizers:
            raise CaptureError(
                "No optimizer was passed to accelerator.prepare, so capture batches would train the model. Prepare the "
                "optimizer."
            )

    def train_on(self, loader: Any) -> None:
        """Takes a prepared dataloader for the one with the training data. Raises AttachError to refuse it."""
        if self.accelerator.distributed_type in UNSUPPORTED:
            raise AttachError(
                f"This run is distributed with {self.accelerator.distributed_type.value}, which splits gradients in a "
                "way that cannot be captured yet. Capture on demand in one process: dmin-trace capture."
            )
        refuse_iterable(loader.dataset)
        if loader.collate_fn is None:
            raise AttachError("The dataloader has no collate_fn, so a batch of one sample cannot be made.")
        self.loader = loader

    def find_pictures(self, seed: int, image_column: str, repeats: int) -> Pictures:
        """The training samples: each picture of the data set once. `repeats`: how often the script repeats each."""
        dataset = self.loader.dataset

        def read(index: int) -> Any:
            seed_everything(seed)
            with medians().during():
                return item_of(dataset, index)

        self.pictures = Pictures(dataset, image_column)
        self.pictures.leave_out_repeats(read, repeats)
        return self.pictures

    @property
    def launch(self) -> dict[str, str]:
        """What the launcher chose for the run, by name: its mixed precision and its compiler."""
        compiler = self.accelerator.state.dynamo_plugin.backend.value
        return {"mixed precision": self.accelerator.mixed_precision, "compiler": str(compiler).lower()}

    @property
    def samples(self) -> int:
        """N, the number of training samples."""
        return len(self.loader.dataset if self.pictures is None else self.pictures)

    def fetch(self, sample: int, seed: int) -> tuple[Any, Any]:
        """A sample's dataset item and the batch collated from it, with all generators seeded, and draws at medians."""
        seed_everything(seed)
        with medians().during(), watch_reading() as self.reading:
            item = item_of(self.loader.dataset, sample if self.pictures is None else self.pictures.indices[sample])
            return item, self.loader.collate_fn([item])

    def unwrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The script's own module inside DDP's or torch.compile's."""
        inner: torch.nn.Module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return inner

    def denoisers(self, others: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """The models that take a timestep; where only models without one are trained, those of `others` that do."""
        models = [self.unwrap(model) for model in self.models]
        for modules in (models, others):
            if found := [module for module in modules if takes_timestep(module)]:
                return found
        return models

    def set_sync(self, sync: bool) -> None:
        """Sets `accelerator.sync_gradients`: while it is False, prepared optimizers and schedulers do not step."""
        self.accelerator.gradient_state._set_sync_gradients(sync)


def refuse_iterable(dataset: Any) -> None:
    """Raises AttachError for a data set without indices."""
    if isinstance(dataset, IterableDataset):
        raise AttachError(
            "The training data is an IterableDataset, whose samples have no index to attribute to. Use a dataset with "
            "__len__ and __getitem__."
        )


def item_of(dataset: Any, sample: int) -> Any:
    """A sample of a data set, fetched as a dataloader does it."""
    return dataset.__getitems__([sample])[0] if hasattr(dataset, "__getitems__") else dataset[sample]
