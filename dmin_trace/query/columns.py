"""The readable columns of a trace, such as captions, by data set index."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dmin_trace.query.tables import import_extra
from dmin_trace.store import Store

if TYPE_CHECKING:
    import pandas


class Columns(Mapping[str, list[Any]]):
    """The readable columns of a trace: a mapping from each name to the N values, by data set index, which are read when
    they are looked up. A sample without a value has "", -1 or NaN, by the kind of the column."""

    def __init__(self, store: Store, rows: NDArray[np.int64]) -> None:
        self._store, self._rows = store, rows

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self._store.header.columns:
            raise KeyError(name)
        values = self._store.column(name)
        return [values[row] for row in self._rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.header.columns)

    def __len__(self) -> int:
        return len(self._store.header.columns)

    def __repr__(self) -> str:
        return f"Columns({', '.join(self)})"

    def to_pandas(self) -> "pandas.DataFrame":
        """A data frame with one row for each data set index. Raises QueryError if pandas is not installed."""
        pd = import_extra("pandas", "pandas")
        return pd.DataFrame(dict(self), index=pd.RangeIndex(len(self._rows), name="sample"))
