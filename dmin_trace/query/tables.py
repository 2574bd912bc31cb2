"""A result as a table of plain columns, and that table as a data frame or a Parquet file.

Every view of a result has these columns, in this order: CSV (`views.table_csv`), Parquet and pandas. docs/exports.md
describes them for readers.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dmin_trace.errors import QueryError
from dmin_trace.version import EXPORT_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas

Kind = Literal["string", "integer", "number", "boolean"]


@dataclass(frozen=True, eq=False)
class Column:
    """The kind and the values of a column; None where there is no value."""

    kind: Kind
    values: Sequence[Any]


Table = dict[str, Column]
"""Columns of one length by name, in order."""


def column_of(values: Sequence[Any]) -> Column:
    """A column of these values, of the kind that its first value has."""
    first = next((value for value in values if value is not None), "")
    kind: Kind = "string" if isinstance(first, str) else "integer" if isinstance(first, int) else "number"
    return Column(kind, values)


def with_columns(table: Table, columns: Mapping[str, Column]) -> Table:
    """The table with further columns, such as those of a trace: "meta_" stands before a name that is taken."""
    whole = dict(table)
    for name, column in columns.items():
        while name in whole:
            name = f"meta_{name}"
        whole[name] = column
    return whole


def to_pandas(table: Table) -> "pandas.DataFrame":
    """The table as a data frame. Raises QueryError if pandas is not installed."""
    pandas = import_extra("pandas", "pandas")
    return pandas.DataFrame({name: column.values for name, column in table.items()})


def write_parquet(path: str | os.PathLike[str], kind: str, tables: Iterable[Table]) -> None:
    """Writes tables with the same columns to one Parquet file, a row group each; the file is there whole or not at all.

    The metadata of its schema has the keys "dmin_trace.format", which is "dmin_trace." and `kind`, and
    "dmin_trace.version". Raises QueryError if pyarrow is not installed or the file cannot be written.
    """
    arrow, parquet = import_extra("pyarrow", "parquet"), import_extra("pyarrow.parquet", "parquet")
    types = {"string": arrow.string(), "integer": arrow.int64(), "number": arrow.float64(), "boolean": arrow.bool_()}
    metadata = {"dmin_trace.format": f"dmin_trace.{kind}", "dmin_trace.version": str(EXPORT_VERSION)}
    writer = None
    with whole_file(Path(path)) as part:
        try:
            for table in tables:
                try:
                    columns = {
                        name: arrow.array(column.values, types[column.kind], from_pandas=False)
                        for name, column in table.items()
                    }
                except (arrow.ArrowException, ValueError) as error:  # a text that is not valid Unicode
                    raise QueryError(f"{path} cannot be written: {error}.") from None
                made = arrow.table(columns).replace_schema_metadata(metadata)
                if writer is None:
                    writer = parquet.ParquetWriter(part, made.schema)
                writer.write_table(made)
        finally:
            if writer is not None:
                writer.close()


def write_page(path: str | os.PathLike[str], page: str) -> None:
    """Writes an HTML page, whole or not at all. Raises QueryError if it cannot be written."""
    with whole_file(Path(path)) as part:
        # A lone surrogate is no text that a page can have; views make all texts harmless before.
        part.write_text(page, encoding="utf-8", newline="\n")


@contextmanager
def whole_file(path: Path) -> "Iterator[Path]":
    """A path beside `path`, where the caller writes what then takes its place. After an error nothing is left.

    Raises QueryError for an OSError.
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise QueryError(f"{path} cannot be written: {error}.") from None
    finally:
        part.unlink(missing_ok=True)


def import_extra(module: str, extra: str) -> Any:
    """Imports an optional dependency. Raises QueryError with the command that installs it."""
    try:
        return import_module(module)
    except ImportError:
        found = f"{module.partition('.')[0]} is not installed, and this table needs it"
        raise QueryError(f"{found}. Install it: pip install dmin_trace[{extra}].") from None
