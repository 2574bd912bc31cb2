"""Marks: what makes a chunk done."""

from __future__ import annotations

import shutil
from pathlib import Path

from dmin_trace.store import (
    open_store,
)


def test_done_chunks_passes_over_strange_names(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "trace.zarr")
    folder = tmp_path / "trace.zarr" / "done" / "c"
    mark = (folder / "1").read_bytes()
    (folder / "1").unlink()
    for name in ("²", "01", "1.abc.partial", "9" * 200, "-1", "7"):
        (folder / name).write_bytes(mark)
    for damage in (None, b"", b"\x00" + mark[1:], mark + b"x"):
        if damage is not None:
            (folder / "1").write_bytes(damage)
        assert open_store(tmp_path / "trace.zarr", unfinished=True).chunks_done == [0, 2]
