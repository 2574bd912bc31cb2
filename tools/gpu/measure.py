"""What projection and capture cost on a CUDA device, on models of the real size with random weights.

    python tools/gpu/measure.py OUT.json           on a device, some minutes; OUT.json is written after every figure
    python tools/gpu/measure.py OUT.json --dry     tiny sizes on the processor, to try the program

`tools/gpu/read.py` makes docs/gpu.md of the file. Speed does not depend on the weights' values. Figures are seconds and
ratios against a named reference in the same run. Every part runs alone with `--only PART`.
"""

import contextlib
import gc
import json
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel
from peft import LoraConfig
from torch.nn.functional import mse_loss

import dmin_trace
from dmin_trace.project import backend_triton, compress_gradient, make_plan, take_gradient

LORA_LAYERS = ["to_k", "to_q", "to_v", "to_out.0"]


def seconds_of(work: Callable[[], object], times: int, device: torch.device, *, warm: bool = True) -> float:
    """Seconds of one call, the median of `times`, by default after one that is not counted; each is waited for."""
    if warm:
        work()
    taken = []
    for _ in range(times):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def queued_seconds(work: Callable[[int], object], times: int, device: torch.device) -> float:
    """Seconds of one call among `times` that are queued one after another, as in a capture. `work` takes its number."""
    for k in range(3):
        work(k)
    wait(device)
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for k in range(times):
            work(k)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times
    began = time.perf_counter()
    for k in range(times):
        work(k)
    return (time.perf_counter() - began) / times


def replayed_seconds(work: Callable[[int], object], times: int) -> float:
    """Seconds of the device alone for one call: `times` of them are recorded as a CUDA graph, which is replayed."""
    for k in range(3):
        work(k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for k in range(times):
            work(k)
    return queued_seconds(lambda _: graph.replay(), 10, torch.device("cuda")) / times


def wait(device: torch.device) -> None:
    """Waits until the device has done all."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(device: torch.device) -> float:
    """The most memory allocated since `forget`, in GB."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0


def forget(device: torch.device) -> None:
    """Frees what is not used, and begins a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@dataclass
class Workload:
    """A model as its trainer sees it.

    loss: the training loss of data of a batch size, under autocast as the trainer has it.
    """

    model: torch.nn.Module
    loss: Callable[[int], torch.Tensor]


def lora(model: Any, rank: int = 4) -> None:
    """Adds LoRA layers in float32; the rest is frozen."""
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_LAYERS))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def made(build: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A model with random weights, made on the device in its dtype."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return build()
    finally:
        torch.set_default_dtype(before)


def noise_prediction(model: Any, device: torch.device, latent: tuple[int, ...], others: Callable[[int], dict[str, Any]],
                     autocast: bool) -> Callable[[int], torch.Tensor]:  # fmt: skip
    """The loss of the noise that a UNet predicts."""
    clean = torch.randn(32, *latent, device=device)

    def loss(batch: int) -> torch.Tensor:
        noise = torch.randn_like(clean[:batch])
        t = torch.randint(0, 1000, (batch,), device=device)
        weight = (t.float() / 1000).reshape(-1, *[1] * len(latent))
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            predicted = model((1 - weight) * clean[:batch] + weight * noise, t, **others(batch)).sample
        return mse_loss(predicted.float(), noise)

    return loss


def sd1_lora(device: torch.device, dry: bool) -> Workload:
    """Stable Diffusion 1.x at 512 pixels, rank 4, bf16."""

    def build() -> Any:
        channels = (32, 64) if dry else (320, 640, 1280, 1280)
        return UNet2DConditionModel(
            sample_size=64, in_channels=4, out_channels=4,
            layers_per_block=1 if dry else 2, block_out_channels=channels,
            down_block_types=("CrossAttnDownBlock2D",) * (len(channels) - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(channels) - 1),
            cross_attention_dim=768, attention_head_dim=8,
        )  # fmt: skip

    model = made(build, device, torch.bfloat16)
    lora(model)
    text = torch.randn(16, 77, 768, device=device)
    size = 8 if dry else 64
    others = lambda batch: {"encoder_hidden_states": text[:batch]}  # noqa: E731
    return Workload(model, noise_prediction(model, device, (4, size, size), others, autocast=True))


def sdxl_lora(device: torch.device, dry: bool) -> Workload:
    """SDXL at 1024 pixels, rank 4, bf16."""

    def build() -> Any:
        return UNet2DConditionModel(
            sample_size=128, in_channels=4, out_channels=4, layers_per_block=1 if dry else 2,
            block_out_channels=(32, 64, 64) if dry else (320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=1 if dry else (1, 2, 10), attention_head_dim=4 if dry else (5, 10, 20),
            cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip

    model = made(build, device, torch.bfloat16)
    lora(model)
    text, pooled = torch.randn(16, 77, 2048, device=device), torch.randn(16, 1280, device=device)
    times = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]], device=device).expand(16, 6)
    size = 8 if dry else 128

    def others(batch: int) -> dict[str, Any]:
        added = {"text_embeds": pooled[:batch], "time_ids": times[:batch]}
        return {"encoder_hidden_states": text[:batch], "added_cond_kwargs": added}

    return Workload(model, noise_prediction(model, device, (4, size, size), others, autocast=True))


def sd3(device: torch.device, dry: bool, full: bool) -> Workload:
    """SD3 medium at 1024 pixels, flow matching: LoRA of rank 4 on bf16 weights, or all weights in float32, autocast."""

    def build() -> Any:
        heads = 2 if dry else 24
        return SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, num_layers=2 if dry else 24, attention_head_dim=64,
            num_attention_heads=heads, joint_attention_dim=4096, caption_projection_dim=64 * heads,
            pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=192,
        )  # fmt: skip

    model = made(build, device, torch.float32 if full else torch.bfloat16)
    if full:
        model.enable_gradient_checkpointing()
    else:
        lora(model)
    size = 8 if dry else 128
    clean = torch.randn(16, 16, size, size, device=device)
    text, pooled = torch.randn(16, 154, 4096, device=device), torch.randn(16, 2048, device=device)

    def loss(batch: int) -> torch.Tensor:
        noise = torch.randn_like(clean[:batch])
        t = torch.randint(0, 1000, (batch,), device=device)
        sigma = (t.float() / 1000).reshape(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = model(
                hidden_states=(1 - sigma) * clean[:batch] + sigma * noise, timestep=t,
                encoder_hidden_states=text[:batch], pooled_projections=pooled[:batch],
            ).sample  # fmt: skip
        return mse_loss(predicted.float(), noise - clean[:batch])

    return Workload(model, loss)


def cifar(device: torch.device, dry: bool) -> Workload:
    """google/ddpm-cifar10-32, all weights, float32."""
    channels = (32, 32, 32, 32) if dry else (128, 256, 256, 256)
    build = lambda: UNet2DModel(  # noqa: E731
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), attention_head_dim=None,
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
    )  # fmt: skip
    model = made(build, device, torch.float32)
    return Workload(model, noise_prediction(model, device, (3, 32, 32), lambda batch: {}, autocast=False))


WORKLOADS: dict[str, tuple[Callable[[torch.device, bool], Workload], tuple[int, ...], int]] = {
    "DDPM CIFAR-10, all weights": (cifar, (1, 4, 8, 32), 12),
    "SD1.x LoRA, 512 pixels": (sd1_lora, (1, 4, 8), 12),
    "SDXL LoRA, 1024 pixels": (sdxl_lora, (1, 4), 4),
    "SD3-medium LoRA, 1024 pixels": (lambda d, dry: sd3(d, dry, full=False), (1, 4), 5),
    "SD3-medium, all weights, 1024 pixels": (lambda d, dry: sd3(d, dry, full=True), (1,), 3),
}
"""For each: how it is made, the batch sizes of training, and the samples that are captured."""


def compress_alone(work: Workload, trained: list[torch.Tensor], device: torch.device) -> dict[str, float]:
    """What compressing one gradient of the model takes, with its many tensors."""
    gradients = torch.autograd.grad(work.loss(1), trained)
    plan = make_plan(sum(gradient.numel() for gradient in gradients), 2**14, 0, "rotation")
    seconds = queued_seconds(lambda _: compress_gradient(gradients, plan, signs=True), 10, device)
    return {"compress_s": seconds, "gradient_GB": sum(g.numel() * g.element_size() for g in gradients) / 1e9}


def measure_workload(name: str, device: torch.device, dry: bool) -> dict[str, Any]:
    """The passes alone, the capture, the compression, and training, of one model."""
    build, batches, samples = WORKLOADS[name]
    forget(device)
    work = build(device, dry)
    work.model.eval()
    trained = [parameter for parameter in work.model.parameters() if parameter.requires_grad]
    length = sum(parameter.numel() for parameter in trained)
    found: dict[str, Any] = {"name": name, "L": length, "tensors": len(trained)}
    timesteps = 3 if samples < 5 else 5

    def passes() -> None:
        for _ in range(timesteps):
            taken, _ = take_gradient(work.loss(1), trained)
            for _ in taken:
                pass

    forget(device)
    seconds_of(passes, 1, device)
    found["passes_peak_GB"] = peak(device)
    found |= compress_alone(work, trained, device)

    forget(device)
    taken, alone = [], []
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        out = Path(folder) / "t.zarr"
        with dmin_trace.recording(work.model, samples=samples, out=out, timesteps=timesteps) as recording:
            found["start_s"] = time.perf_counter() - began
            for i in recording.samples:
                # In turns: the machine is shared.
                alone.append(seconds_of(passes, 1, device, warm=False) / timesteps)
                began = time.perf_counter()
                for k in recording.timesteps:
                    with recording.step(i, k):
                        work.loss(1).backward()
                wait(device)
                taken.append((time.perf_counter() - began) / timesteps)
    found["capture_peak_GB"] = peak(device)
    found["first_sample_s"] = taken[0] * timesteps
    # The first sample makes the store and, on a device, compiles the kernels.
    found["passes_s"], found["capture_s"] = statistics.median(alone[1:]), statistics.median(taken[1:])
    found["added_percent"] = 100 * (found["capture_s"] / found["passes_s"] - 1)

    work.model.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    found["training"] = []
    for batch in batches:

        def train(batch: int = batch) -> None:
            work.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        forget(device)
        try:
            seconds = seconds_of(train, 5, device)
        except torch.OutOfMemoryError:
            found["training"].append({"batch": batch, "out_of_memory": True})
            continue
        rate = {"batch": batch, "step_s": seconds, "samples_per_s": batch / seconds, "peak_GB": peak(device)}
        found["training"].append(rate)
    return found


def measure_compress(device: torch.device, dry: bool) -> Iterator[dict[str, Any]]:
    """Compression as a multiple of reading the gradient once."""
    for length in (2**20, 2**22) if dry else (2**25, 2**31):
        for dtype in (torch.float32, torch.bfloat16):
            forget(device)
            yield from compress_figures(length, dtype, device)


def compress_figures(length: int, dtype: torch.dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    """The figures of one length and dtype: each v, the default transform, and the path without Triton."""
    # Several gradients in turn, so that none lies in the device's cache.
    values = [torch.randn(length, dtype=dtype, device=device) for _ in range(max(1, min(4, 2**28 // length)))]
    times = 5 if length > 2**28 else 40

    def figures(exponent: int, signs: bool, times: int) -> dict[str, Any]:
        plan = make_plan(length, 2**exponent, 0, "rotation")

        def ours(k: int) -> object:
            return compress_gradient([values[k % len(values)]], plan, signs=signs)

        seconds = queued_seconds(ours, times, device)
        found = {
            "L": f"2^{length.bit_length() - 1}", "dtype": str(dtype).removeprefix("torch."), "v": f"2^{exponent}",
            "signs": signs, "read_ms": 1e3 * read, "ours_ms": 1e3 * seconds, "reads": seconds / read,
        }  # fmt: skip
        if device.type == "cuda" and len(values) > 1 and backend_triton.load_kernels() is not None:
            found["device_reads"] = replayed_seconds(ours, 8) / replayed_seconds(read_one, 8)
        return found

    def read_one(k: int) -> object:
        return values[k % len(values)].sum()

    read = queued_seconds(read_one, times, device)
    for exponent in (12, 14, 16, 20):
        yield figures(exponent, False, times)
    yield figures(14, True, times)
    loaded, backend_triton.load_kernels = backend_triton.load_kernels, lambda: None
    try:
        yield figures(14, False, max(2, times // 10)) | {"backend": "torch"}
    finally:
        backend_triton.load_kernels = loaded


def measure_tuning(device: torch.device, dry: bool) -> Iterator[dict[str, Any]]:
    """The kernel's block size, unrolled rows, warps and partial sums."""
    chosen = ((1024, 4, 4, 2**21), (1024, 4, 4, 2**20), (1024, 4, 8, 2**21), (2048, 4, 8, 2**21), (512, 4, 4, 2**21))
    for dtype in () if device.type != "cuda" else (torch.float32, torch.bfloat16):
        for constants in chosen:
            yield {"dtype": str(dtype).removeprefix("torch."), "reads": tuned(dtype, device, constants)} | dict(
                zip(("block", "unrolled", "warps", "sums"), constants, strict=True)
            )


def tuned(dtype: torch.dtype, device: torch.device, constants: tuple[int, int, int, int]) -> float:
    """Reads of the gradient with these constants."""
    values, plan = torch.randn(2**28, dtype=dtype, device=device), make_plan(2**28, 2**14, 0, "rotation")
    before = backend_triton.BLOCK_SIZE, backend_triton.UNROLLED_ROWS, backend_triton.WARPS, backend_triton.SUMS_SIZE
    set_constants(*constants)
    try:
        ours = queued_seconds(lambda _: compress_gradient([values], plan), 10, device)
    finally:
        set_constants(*before)
    return ours / queued_seconds(lambda _: values.sum(), 10, device)


def set_constants(block: int, unrolled: int, warps: int, sums: int) -> None:
    """The constants of `backend_triton`."""
    backend_triton.BLOCK_SIZE, backend_triton.UNROLLED_ROWS = block, unrolled
    backend_triton.WARPS, backend_triton.SUMS_SIZE = warps, sums


def main(
    out: Annotated[Path, typer.Argument(help="The JSON file that is written.")],
    dry: Annotated[bool, typer.Option(help="Tiny sizes, on the processor.")] = False,
    only: Annotated[list[str], typer.Option(help="tuning, compress, or a part of a model's name.")] = [],  # noqa: B006
) -> None:
    """Measures, and writes OUT after each figure."""
    device = torch.device("cpu" if dry else "cuda")
    result: dict[str, Any] = {
        "device": "processor" if dry else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
        "python": platform.python_version(),
        "triton": None if dry or backend_triton.load_kernels() is None else version("triton"),
        "dry": dry,
    }

    def chosen(name: str) -> bool:
        return not only or any(part in name for part in only)

    def keep() -> None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    result["workloads"] = []
    for name in WORKLOADS:
        if chosen(name):
            with failures_kept(result, name):
                found = measure_workload(name, device, dry)
                result["workloads"].append(found)
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
            keep()
    parts = ("compress", measure_compress), ("tuning", measure_tuning)
    for name, measure in parts:
        if chosen(name):
            result[name] = []
            with failures_kept(result, name):
                for found in measure(device, dry):
                    result[name].append(found)
                    print(name, {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
                    keep()


@contextlib.contextmanager
def failures_kept(result: dict[str, Any], name: str) -> Iterator[None]:
    """Keeps an error with its part: what else was measured is not lost."""
    try:
        yield
    except Exception:
        result.setdefault("failed", {})[name] = traceback.format_exc()
        traceback.print_exc()


if __name__ == "__main__":
    typer.run(main)
