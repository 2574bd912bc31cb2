"""What is particular to the loops and the weights of the scripts. The functions look at what a loop holds."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmin_trace.integrations.diffusers.generate import generate as generate
from dmin_trace.integrations.diffusers.queries import find_data_argument as find_data_argument
from dmin_trace.integrations.diffusers.queries import loss_difference as loss_difference
from dmin_trace.integrations.diffusers.queries import on_demand_arguments as on_demand_arguments
from dmin_trace.integrations.diffusers.queries import prepare_queries as prepare_queries
from dmin_trace.integrations.diffusers.queries import query_columns as query_columns
from dmin_trace.integrations.diffusers.queries import takes_prompts as takes_prompts
from dmin_trace.integrations.diffusers.queries import takes_videos as takes_videos
from dmin_trace.integrations.diffusers.queries import words_its_own_prompts as words_its_own_prompts

if TYPE_CHECKING:
    import torch


def drawn_before_loop(args: Any, variables: Mapping[str, Any]) -> str | None:
    """What a run drew once for each sample before its loop; None if nothing.

    The newer DreamBooth scripts flip and crop their pictures when they make the data set, and the scripts for SDXL
    encode captions, some of them pictures too, before the loop.
    """
    batch, dataset = variables.get("batch"), variables.get("train_dataset")
    batch = batch if isinstance(batch, Mapping) else {}
    uneven = [(image.height, image.width) for image in getattr(dataset, "instance_images", ())]
    uneven += batch.get("original_sizes") or []
    cropped = not getattr(args, "center_crop", True) and any(height != width for height, width in uneven)
    if "model_input" in batch or isinstance(getattr(dataset, "pixel_values", None), list):
        if getattr(args, "random_flip", False):
            return "whether its picture is flipped (--random_flip)"
        if cropped:
            return "where its picture is cropped (there is no --center_crop)"
    # Embeddings are tensors of floating-point numbers, tokens of integers.
    encoded = any("prompt" in name and "float" in str(getattr(value, "dtype", "")) for name, value in batch.items())
    if encoded and getattr(args, "proportion_empty_prompts", None):
        return "whether its caption is left out (--proportion_empty_prompts)"
    return None


def forget_drawn(script: Path) -> None:
    """Has `datasets` map the data anew, if the script uses it: its cache holds what an earlier run drew."""
    if "datasets" not in script.read_text(encoding="utf-8", errors="replace"):
        return
    with suppress(ImportError):
        import_module("datasets").disable_caching()


def rows_of_sample(args: Any) -> int:
    """How many pictures a sample's batch holds: 2 with prior preservation, its own and one of its class."""
    return 2 if getattr(args, "with_prior_preservation", False) else 1


def averaged_models(values: Iterable[Any]) -> list[Any]:
    """The `EMAModel`s among a loop's variables, each once."""
    training_utils = sys.modules.get("diffusers.training_utils")
    if training_utils is None:
        return []
    return list({id(value): value for value in values if isinstance(value, training_utils.EMAModel)}.values())


@contextmanager
def averaged_weights(ema: Any, parameters: Sequence[torch.nn.Parameter], step_first: bool) -> Iterator[None]:
    """While entered, the parameters hold the average of an `EMAModel`; afterwards both are as before, bit for bit."""
    # Where weights are averaged torch is imported already; a query asks this module for less.
    import torch

    average = [shadow.clone() for shadow in ema.shadow_params]
    counters = {name: getattr(ema, name) for name in ("optimization_step", "cur_decay_value")}
    weights = [parameter.detach().clone() for parameter in parameters]
    try:
        if step_first:
            ema.step(parameters)
        ema.copy_to(parameters)
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
            for shadow, value in zip(ema.shadow_params, average, strict=True):
                shadow.copy_(value)
        for name, value in counters.items():
            setattr(ema, name, value)


def refusal(args: Any, variables: Mapping[str, Any]) -> str | None:
    """Why a run cannot be attributed; None if it can be.

    Several DreamBooth scripts encode latents, and some encode captions, once before the loop, and look them up by the
    number of the step in its epoch: batches in another order get those of other samples. The newer ones look them up
    by the sample's index, which their batches hold.
    """
    batch = variables.get("batch")
    if isinstance(batch, Mapping) and "indices" in batch:
        return None
    caches = [
        name for name, value in variables.items() if name.endswith("_cache") and isinstance(value, list) and value
    ]
    if not caches and not getattr(args, "cache_latents", False):
        return None
    return (
        f"The script looks up {' and '.join(caches) or 'latents'} by the number of the batch, not of the sample, so it "
        "is not known which belong to a sample. Leave --cache_latents out; with captions that are encoded in advance "
        "(--caption_column), give one --instance_prompt instead. It is enough to do so for the capture: dmin-trace "
        "capture --weights DIR -- SCRIPT ARGS."
    )


def parameter_key(key: str) -> str:
    """PEFT's name for a key of an older LoRA file (`lora.down`, `to_q_lora.up`), or of a DoRA."""
    if key.endswith(".lora_magnitude_vector"):
        # A module whose only parameter is its weight, which files do not name.
        return key + ".weight"
    key = re.sub(r"\.to_(q|k|v)_lora\.", r".to_\1.lora.", key).replace(".to_out_lora.", ".to_out.0.lora.")
    return re.sub(r"\.lora(_linear_layer)?\.(down|up)\.", lambda m: ".lora_A." if m[2] == "down" else ".lora_B.", key)
