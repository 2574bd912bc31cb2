"""What importing costs: the command line starts without torch, and only an index needs hnswlib."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT_TORCH = ("audit", "cli.app", "command", "errors", "query", "search", "settings", "store", "version", "views")


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_no_torch_is_imported(module: str) -> None:
    code = f"import dmin_trace.{module}, sys; sys.exit('torch' in sys.modules or 'accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_imports_no_torch_numpy_or_zarr() -> None:
    code = (
        "import sys; from dmin_trace.cli.app import main; code = main(['--help']); "
        "sys.exit(code or bool({'torch', 'numpy', 'zarr', 'sklearn'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (ran.returncode, "query" in ran.stdout) == (0, True)


def test_only_an_index_needs_hnswlib() -> None:
    code = "import sys, dmin_trace.cli.app, dmin_trace.query, dmin_trace.search; sys.exit('hnswlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
