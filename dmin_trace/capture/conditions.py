"""What else the numbers in a row depend on: precision, device, and the kernels that torch chooses."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from dmin_trace.capture.used_models import UsedModels

DEVICE = "device"
"""The condition in which queries may differ if the user says so."""


def conditions_before(trained: Sequence[torch.nn.Parameter], launch: Mapping[str, str]) -> dict[str, str]:
    """Returns what is known of a run before its first training step, by name.

    `launch` is what its launcher chose, such as the mixed precision of accelerate.
    """
    cudnn: Any = torch.backends.cudnn
    flags = {"algorithms": torch.are_deterministic_algorithms_enabled(), "cudnn": cudnn.deterministic}
    kernels: Any = torch.backends.cuda
    attention = {
        "flash": kernels.flash_sdp_enabled(),
        "memory-efficient": kernels.mem_efficient_sdp_enabled(),
        "math": kernels.math_sdp_enabled(),
        "cudnn": kernels.cudnn_sdp_enabled(),
    }
    return {
        DEVICE: device_types(trained),
        **launch,
        "trained parameters": _joined(str(p.dtype).removeprefix("torch.") for p in trained),
        "precision of float32 products": _setting(
            torch.get_float32_matmul_precision, lambda: kernels.matmul.fp32_precision
        ),
        "TF32 in convolutions": _setting(lambda: cudnn.allow_tf32, lambda: cudnn.conv.fp32_precision),
        "deterministic": _joined(name for name, on in flags.items() if on),
        "cudnn benchmark": str(cudnn.benchmark).lower(),
        "attention kernels": _joined(name for name, on in attention.items() if on),
    }


def device_types(trained: Sequence[torch.nn.Parameter]) -> str:
    return _joined(parameter.device.type for parameter in trained)


def conditions_in_steps(models: UsedModels) -> dict[str, str]:
    """Returns what the first sample's training steps have shown, by name."""
    return {
        "autocast": _joined(models.autocast),
        "models": _joined(models.dtypes),
        "attention": _joined(models.attention),
    }


def differing_condition(theirs: Mapping[str, str], ours: Mapping[str, str], *, any_device: bool) -> str:
    """Returns the first condition of ours that is not theirs, in words, with what to do; "" if there is none."""
    for name, value in ours.items():
        expected = theirs.get(name, "none")
        if value == expected or any_device and name == DEVICE:
            continue
        found = f"its {name} is {value}, that of the trace is {expected}."
        if name == DEVICE:
            return (
                f"{found} Generators of another type of device draw other noise: a copy of a sample scores a tenth of "
                "what it should. Run it on the trace's type of device; or give --any-device (any_device=True)."
            )
        return f"{found} Start it as the traced run was started, with the same launcher and its options in front."
    return ""


def _setting(older: Callable[[], object], newer: Callable[[], object]) -> str:
    """A setting that newer versions of torch have in two places; where a script used the newer, the older raises."""
    try:
        return str(older()).lower()
    except RuntimeError:
        return str(newer()).lower()


def _joined(words: Iterable[str]) -> str:
    return ", ".join(sorted(set(words))) or "none"
