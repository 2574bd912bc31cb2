"""How many threads are worth starting."""

import psutil


def core_count() -> int:
    """The processor cores that this process may run on, 1 or more: its affinity, where the system has such."""
    process = psutil.Process()
    return (len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count()) or 1
