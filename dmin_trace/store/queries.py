"""The projected gradients of queries, in memory and in a file. Any score can be computed from them without a model."""

import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from dmin_trace.errors import QueryError, brief
from dmin_trace.settings import MAX_THUMBNAIL
from dmin_trace.store.reader import Store
from dmin_trace.store.thumbnails import decode_webp, webp_size
from dmin_trace.store.untrusted import ArrayHeader, read_arrays

MAX_TEXT_BYTES = 2**26
"""Bytes of the names, prompts and pictures in a file of queries, at most."""
PICTURE_SIDE = 128
"""Pixels of the longer side of a picture that is made of a query."""


class _Texts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the file holds besides numbers, as JSON. `without` is left out if no query is for a concept, and `pictures`,
    which are in base64, if there are none."""

    format: Literal["dmin_trace queries"]
    version: Literal[1]
    trace_id: str
    names: tuple[str, ...]
    prompts: tuple[str | None, ...]
    without: tuple[str | None, ...] = ()
    pictures: tuple[bytes | None, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Queries:
    """The projected gradients of Q queries of one trace.

    gradients: (Q, R, v) float32, of norm about one; R is T, in the order of the trace's timesteps, or the number of
        groups that they are pooled into.
    names, prompts: Q names to show, such as file names; the Q prompts, None for a query without one.
    trace_id: the id of the trace that they can be compared with.
    without: of each query for a concept, the prompt without that concept; None for a query for a whole image.
    pictures: a small picture of each query for people to look at, of at most 512 pixels, as a WebP file; None without.

    Raises QueryError if the lengths differ, a gradient is not finite, or a picture is no such file.
    """

    gradients: NDArray[np.float32]
    names: tuple[str, ...]
    prompts: tuple[str | None, ...]
    trace_id: str
    without: tuple[str | None, ...] = ()
    pictures: tuple[bytes | None, ...] = ()

    def __post_init__(self) -> None:
        shape = self.gradients.shape
        if not self.without:
            object.__setattr__(self, "without", (None,) * len(self.prompts))
        if not self.pictures:
            object.__setattr__(self, "pictures", (None,) * len(self.prompts))
        if len(shape) != 3 or not len(self.names) == len(self.prompts) == shape[0]:
            raise QueryError(
                f"Queries were given gradients of shape {shape}, {len(self.names)} names and {len(self.prompts)} "
                "prompts; expected gradients (Q, R, v), and Q of both."
            )
        if len(self.without) != len(self.prompts):
            raise QueryError(
                f"Queries were given {len(self.prompts)} prompts and {len(self.without)} without a concept."
            )
        if len(self.pictures) != len(self.prompts):
            raise QueryError(f"Queries were given {len(self.prompts)} prompts and {len(self.pictures)} pictures.")
        for name, picture in zip(self.names, self.pictures, strict=True):
            if picture is not None and not 0 < max(webp_size(picture) or (0,)) <= MAX_THUMBNAIL:
                raise QueryError(
                    f"The picture of the query {brief(name)} is no plain WebP file of at most {MAX_THUMBNAIL} pixels."
                )
        if any(one is None and less is not None for one, less in zip(self.prompts, self.without, strict=True)):
            raise QueryError("A query has no prompt, but a prompt without a concept. Give both.")
        if self.gradients.dtype != np.float32:
            raise QueryError(f"The gradients of the queries are {self.gradients.dtype}; expected float32.")
        if not np.isfinite(self.gradients).all():
            raise QueryError("The gradients of the queries hold numbers that are not finite. Compute them again.")

    def __len__(self) -> int:
        """Q, the number of queries."""
        return len(self.gradients)

    def __getitem__(self, places: slice) -> Self:
        """Some of the queries, such as `queries[:8]`."""
        some = self.gradients[places], self.names[places], self.prompts[places]
        return type(self)(*some, self.trace_id, self.without[places], self.pictures[places])

    def __repr__(self) -> str:
        count, rows, dimension = self.gradients.shape
        return f"Queries({count:,} {'query' if count == 1 else 'queries'}, R={rows}, v={dimension:,})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the queries to one .npz file, and replaces a file that is there. Raises QueryError if it cannot."""
        without = () if all(one is None for one in self.without) else self.without
        pictures = () if all(one is None for one in self.pictures) else self.pictures
        texts = _Texts("dmin_trace queries", 1, self.trace_id, self.names, self.prompts, without, pictures)
        try:
            encoded = np.frombuffer(msgspec.json.encode(texts), np.uint8)
            with Path(path).open("wb") as file:
                np.savez(file, gradients=self.gradients, texts=encoded)
        except (OSError, UnicodeEncodeError) as error:
            raise QueryError(f"{path} cannot be written: {error}.") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file that `save` wrote, and executes nothing in it. Raises QueryError if it is no such file."""
        path = Path(path)

        def check(headers: Mapping[str, ArrayHeader]) -> None:
            gradients, texts = headers["gradients"], headers["texts"]
            if gradients.dtype != np.float32 or len(gradients.shape) != 3:
                raise ValueError(f"its gradients are {gradients.dtype} {gradients.shape}")
            # `save` compresses nothing.
            if gradients.size_bytes > path.stat().st_size:
                raise ValueError("it claims more numbers than it can hold")
            if texts.dtype != np.uint8 or len(texts.shape) != 1 or texts.size_bytes > MAX_TEXT_BYTES:
                raise ValueError(f"its texts are {texts.dtype} {texts.shape}")

        try:
            arrays = read_arrays(path, ("gradients", "texts"), check)
            texts = msgspec.json.decode(arrays["texts"].tobytes(), type=_Texts)
            for picture in texts.pictures:
                if picture is not None:
                    decode_webp(picture, MAX_THUMBNAIL)
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            raise QueryError(f"{path} cannot be read as queries: {error}; expected a file of Queries.save.") from None
        numbers, own = arrays["gradients"], (texts.names, texts.prompts, texts.trace_id)
        return cls(numbers, *own, texts.without, texts.pictures)


def query_gradients(captured: Store, names: Sequence[str], differences: Container[int] = ()) -> NDArray[np.float32]:
    """The gradients of the queries in a store that was captured for them, (Q, T, v); `differences` has the numbers of
    those that are the difference of two. Raises QueryError for one that is zero or not finite."""
    if (bad := np.flatnonzero(~captured.valid)).size:
        query, norms = int(bad[0]), captured.norm[bad[0]]
        if query in differences and (norms == 0).any():
            timestep = captured.header.timesteps[int(np.argmax(norms == 0))]
            raise QueryError(
                f"The two prompts of {names[query]} make no difference: at timestep {timestep:g} the gradients are "
                "equal. Is the concept in words that the model reads, and is what was trained guided by the prompt?"
            )
        raise QueryError(f"The gradient of {names[query]} is zero or not finite, so it has no scores.")
    return captured.gradients(np.arange(len(names)))
