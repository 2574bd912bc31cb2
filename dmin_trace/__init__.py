"""dmin_trace: which training samples made the diffusion model make this image?

    dmin_trace.attach(accelerator, args)            in a training script, right after its Accelerator: captures the
                                                    run at its end
    dmin_trace.recording(model, samples=N, out=path)
                                                    in a plain PyTorch loop, without accelerate
    dmin_trace.attribute(trace, images, prompts)    the most influential training samples for an image
    dmin_trace.open_trace(path)                     a Trace: gradients, influence scores, and rankings as tables
    dmin_trace.audit_trace(trace)                   training samples that a person should look at

`dmin-trace --help` lists the same for the command line. The method is DMin, arXiv 2412.08637.

Names are resolved when they are first used, so that importing dmin_trace imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dmin_trace.errors import DminTraceError
from dmin_trace.settings import Settings
from dmin_trace.version import VERSION as __version__

if TYPE_CHECKING:
    from dmin_trace.audit import Audit, audit_trace
    from dmin_trace.capture.accelerate.attach import attach
    from dmin_trace.capture.recording import recording
    from dmin_trace.query import Hit, TopK, Totals, Trace, attribute, open_trace
    from dmin_trace.store import Queries

__all__ = [
    "Audit",
    "DminTraceError",
    "Hit",
    "Queries",
    "Settings",
    "TopK",
    "Totals",
    "Trace",
    "__version__",
    "attach",
    "attribute",
    "audit_trace",
    "open_trace",
    "recording",
]

_HOMES = {
    "attach": "capture.accelerate.attach",
    "recording": "capture.recording",
    "Queries": "store",
    "Audit": "audit",
    "audit_trace": "audit",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dmin_trace' has no attribute {name!r}")
    import random

    # Importing rich draws from python's generator, which a training script may have seeded before its line.
    state = random.getstate()
    try:
        return getattr(import_module(f"dmin_trace.{_HOMES.get(name, 'query')}"), name)
    finally:
        random.setstate(state)


def __dir__() -> list[str]:
    return sorted(__all__)
