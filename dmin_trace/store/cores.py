"""How many threads are worth starting."""

from __future__ import annotations

import psutil


def core_count() -> int:
    """The processor cores that this process may run on, 1 or more: its affinity, where the system has such."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):
        return len(process.cpu_affinity()) or 1
    return psutil.cpu_count() or 1
