"""The data set: its readable columns, its samples that fail to load, its fingerprint, and what its batches hold.

A column (a caption, a label) is looked for in the dataset's item, then in the raw row of a `datasets.Dataset`, whose
transform usually drops it, then in an attribute of the dataset that is a sequence of N values. The column `file_name`
is the sample's file, if that is known (`pictures`) and the data set has no such column itself.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from dmin_trace.capture.used_models import UsedModels
from dmin_trace.command import Script
from dmin_trace.errors import CaptureError
from dmin_trace.settings import COLUMN_NAME
from dmin_trace.store import FILE_COLUMN

if TYPE_CHECKING:
    from dmin_trace.capture.pictures import Pictures, Reading

logger = logging.getLogger(__name__)
Kind = Literal["string", "integer", "number"]
Value = str | int | float
USUAL_COLUMNS = (
    *("caption", "text", "prompt", "instance_prompt", "label", "class", "category", "name", "file_name", "path"),
)
"""The columns that are kept if the settings name none."""
BETWEEN_TEXTS = " | "
"""What is between the texts of a list if it is not known which of them was used."""
FIRST_SAMPLES = 20
"""If more than half of these samples fail to load, the capture ends: the data set is wrong."""
MAX_LOGGED_FAILURES = 10
"""Samples that failed to load whose reasons are logged, one by one."""
FINGERPRINT_SAMPLES = 8
"""Samples whose batches are in the fingerprint of a data set."""


class Columns:
    """The readable columns of one dataset; `kinds` has the kind of each. The first sample determines them."""

    def __init__(
        self,
        dataset: Any,
        names: tuple[str, ...] | None,
        *,
        caption: str | None = None,
        pictures: "Pictures | None" = None,
        reading: "Callable[[], Reading] | None" = None,
    ) -> None:
        """Keeps the columns of these names; with None, those of the usual names that the dataset has.

        caption: the script's column of captions, which is then kept too.
        pictures, reading: the pictures of the dataset, if samples are numbered by picture; what was seen while the
            sample was read whose columns are wanted.
        """
        self._dataset, self._names = dataset, names
        self._usual = tuple(dict.fromkeys([*([caption] if caption else ()), *USUAL_COLUMNS]))
        self._pictures, self._reading = pictures, reading
        self._plain = _without_images(dataset)
        self._classes = _class_names(dataset)
        self.kinds: dict[str, Kind] = {}
        self._has_kinds = False

    def of(self, sample: int, item: Any) -> dict[str, Value | None]:
        """Returns a sample's columns, None for a missing value. Raises CaptureError if a named column is not there."""
        if not self._has_kinds:
            # The file is kept whatever the settings name: it tells which sample a hit is.
            names = dict.fromkeys([*(self._names if self._names is not None else self._usual), FILE_COLUMN])
            found = {name: self._find(name, sample, item) for name in names}
            missing = [name for name in self._names or () if found[name] is None]
            if missing:
                raise CaptureError(
                    f"The dataset has no readable column {', '.join(missing)}. Name columns that hold text or numbers, "
                    "or leave columns out to keep those of the usual names."
                )
            self._has_kinds = True
            self.kinds = {
                name: "string" if isinstance(value, str) else "integer" if isinstance(value, int) else "number"
                for name, value in found.items()
                # A script may call its captions what is no name of a folder.
                if value is not None and COLUMN_NAME.fullmatch(name)
            }
        return {name: _converted(self._find(name, sample, item), kind) for name, kind in self.kinds.items()}

    def file(self, sample: int) -> str | None:
        """The file of the sample that was read last, if it is known without its item."""
        opened = () if self._reading is None else self._reading().files
        return None if self._pictures is None else self._pictures.file(sample, opened)

    def _find(self, name: str, sample: int, item: Any) -> Value | None:
        reading = None if self._reading is None else self._reading()
        opened, drawn = ((), ()) if reading is None else (reading.files, reading.texts)
        index = sample if self._pictures is None else self._pictures.indices[sample]
        for place in (item, None if self._plain is None else self._plain[index]):
            if isinstance(place, Mapping) and (value := _readable(place.get(name), drawn)) is not None:
                classes = self._classes.get(name, ())
                return classes[value] if isinstance(value, int) and 0 <= value < len(classes) else value
        values = getattr(self._dataset, name, None)
        if isinstance(values, (list, tuple, torch.Tensor)) and len(values) == len(self._dataset):
            return _readable(values[index], drawn)
        return self._pictures.file(sample, opened) if name == FILE_COLUMN and self._pictures is not None else None


@dataclass(frozen=True, kw_only=True)
class CaptureSource:
    """What a capture is of, besides the weights and the settings.

    samples, columns: N, the number of training samples or of queries, and their readable columns.
    optimizers: those of the training, whose state tells which parameters it moved; None if that is not known.
    fetch: gives the batch of one sample as the capture fetches it, or None if the data set is not known.
    script: the script whose loop is run; an unknown one if the loop is the user's own code.
    edited_script: the script may differ from the one that began the store.
    packages: further packages whose versions are kept in the header.
    files_sha256: fingerprint of the data set's list of files, in order; "" if there is none.
    models: sees which models are called.
    launch: what the run's launcher chose, by name.
    any_device: queries may run on another type of device than the trace's.
    weights_of: as in the header.
    rows: how many samples the denoiser is called with in a training step: 2 if a class picture comes with each.
    differences: query k is a difference: the gradient of sample 2k of the data set less that of sample 2k + 1.
    """

    samples: int
    columns: Columns
    optimizers: Sequence[torch.optim.Optimizer] | None
    fetch: Callable[[int], Any] | None = None
    script: Script = Script()
    edited_script: bool = False
    packages: Sequence[str] = ()
    files_sha256: str = ""
    models: UsedModels = field(default_factory=UsedModels)
    launch: Mapping[str, str] = field(default_factory=dict)
    any_device: bool = False
    weights_of: str = ""
    rows: int = 1
    differences: bool = False


class FailedSamples:
    """The samples, of N, that could not be loaded. A capture skips them, unless they are most of the first ones."""

    def __init__(self, samples: int) -> None:
        self._first = min(FIRST_SAMPLES, samples)
        self._failed: set[int] = set()

    def __len__(self) -> int:
        return len(self._failed)

    def add(self, sample: int, error: Exception, done: int) -> None:
        """Adds a sample once; `done` came before it. Raises CaptureError if more than half of the first ones failed."""
        if sample in self._failed:
            return
        self._failed.add(sample)
        why = f"{type(error).__name__}: {error}"
        if done < FIRST_SAMPLES and 2 * len(self) > self._first:
            raise CaptureError(
                f"{len(self)} of the first samples could not be loaded, among them sample {sample}: {why}. Fix the "
                "dataset. A capture skips single samples that fail to load, but stops when more than half of the first "
                f"{FIRST_SAMPLES} fail."
            )
        if len(self) <= MAX_LOGGED_FAILURES:
            logger.warning(
                "Sample %d could not be loaded: %s. It is not ranked; dmin-trace info lists it.", sample, why
            )
        elif len(self) == MAX_LOGGED_FAILURES + 1:
            logger.warning("More samples could not be loaded; dmin-trace info lists them.")


def _without_images(dataset: Any) -> Any:
    """The raw rows of a `datasets.Dataset`, without the columns that are decoded at every access."""
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "features"):
        return None
    readable = [n for n, f in dataset.features.items() if getattr(f, "dtype", None) not in (None, "PIL.Image.Image")]
    return dataset.with_format(None).select_columns(readable) if readable else None


def _converted(value: Value | None, kind: Kind) -> Value | None:
    if value is None or isinstance(value, str) and kind != "string":
        return None
    return str(value) if kind == "string" else int(value) if kind == "integer" else float(value)


def _class_names(dataset: Any) -> dict[str, Sequence[str]]:
    """The names of the classes in each column of a `datasets.Dataset` that holds the numbers of classes."""
    features = getattr(dataset, "features", None)
    named = features.items() if isinstance(features, Mapping) else ()
    return {name: feature.names for name, feature in named if type(feature).__name__ == "ClassLabel"}


def _readable(value: Any, drawn: Sequence[str] = ()) -> Value | None:
    """A value as a column keeps it, None for one that is not readable. Of a list of texts, the one that was drawn."""
    scalar = hasattr(value, "item") and getattr(value, "ndim", None) == 0
    if scalar or isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return next((text for text in drawn if text in value), BETWEEN_TEXTS.join(value))
    return value if isinstance(value, (str, int, float)) else None


def batch_shapes(batch: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the images in a collated batch, then of its texts, by name, or by number without names.

    Images are floating-point tensors of three dimensions or more. Texts are rows of tokens (integers in two
    dimensions), and lists of text. A named list counts only if its name says so: a batch may have file names.
    """
    values = batch if isinstance(batch, (Mapping, list, tuple)) else [batch]
    named = values.items() if isinstance(values, Mapping) else enumerate(values)
    images: dict[str, tuple[int, ...]] = {}
    texts: dict[str, tuple[int, ...]] = {}
    for name, value in ((str(name), value) for name, value in named):
        is_prompt = name.isdigit() or any(word in name for word in ("caption", "prompt", "text"))
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() and value.dim() >= 3:
                images[name] = tuple(value.shape)
            elif not value.is_floating_point() and value.dim() == 2:
                texts[name] = tuple(value.shape)
        elif is_prompt and isinstance(value, (list, tuple)) and value and all(isinstance(text, str) for text in value):
            texts[name] = (len(value),)
    return images | texts


def data_fingerprint(samples: int, fetch: Callable[[int], Any]) -> str:
    """Returns the SHA-256 over N and the batches of a few samples; "" if batches vary, or hold what cannot be read.

    So it changes with the order of the samples, their content and the transforms. `fetch` gives the batch of one
    sample, under the same seed each time.
    """
    last = FINGERPRINT_SAMPLES - 1
    chosen = sorted({round(k * (samples - 1) / last) for k in range(FINGERPRINT_SAMPLES)})
    digests = [hashlib.sha256(f"{samples}".encode()) for _ in range(2)]
    try:
        for digest, sample in product(digests, chosen):
            try:
                batch = fetch(sample)
            except Exception as error:
                # A sample that fails to load is identified by its error.
                batch = type(error).__name__
            digest.update(f" {sample} ".encode())
            hash_value(digest.update, batch)
    except Exception:
        # A kind of tensor without bytes, for example. A missing fingerprint does not end a capture.
        logger.debug("The data set has no fingerprint.", exc_info=True)
        return ""
    first, second = (digest.hexdigest() for digest in digests)
    return first if first == second else ""


def hash_value(update: Callable[[bytes], None], value: Any) -> None:
    """Adds a value's content; for an object of unknown kind, its type."""
    update(type(value).__name__.encode())
    if isinstance(value, torch.Tensor):
        update(f"{value.dtype} {tuple(value.shape)}".encode())
        update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        update(f"{value.dtype} {value.shape}".encode())
        update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for name, inside in value.items():
            update(repr(name).encode("utf-8", "replace") if isinstance(name, (str, int)) else b"")
            hash_value(update, inside)
    elif isinstance(value, (list, tuple)):
        update(f"{len(value)}".encode())
        for inside in value:
            hash_value(update, inside)
    elif isinstance(value, (str, bytes, int, float, type(None))):
        update(repr(value).encode("utf-8", "backslashreplace"))
    elif hasattr(value, "tobytes") and hasattr(value, "size"):
        # An image, or a numpy scalar.
        update(f"{value.size} {getattr(value, 'mode', '')}".encode())
        update(bytes(value.tobytes()))
