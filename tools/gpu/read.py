"""Makes a page of what `measure.py` wrote: `python tools/gpu/read.py docs/results/gpu.json docs/gpu.md`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

HEAD = """# On a GPU

What was run on a CUDA device, and what it cost there. `tools/gpu/prepare`, `tools/gpu/check` and `tools/gpu/read.py`
make this page again; its numbers are in `docs/results/gpu.json`. Models have the real size and random weights, since
speed does not depend on the weights' values.

"""
STEP = """A training step is one sample at one timestep: a forward and a backward pass of the denoiser, with latents and
text states that lie on the device. *Passes* is the step alone, *capture* the step with the recording: seeds, checks,
projection to v = 2^14, the store. *Compress* is the projection's part. The last column is a training of the same model
in the largest batch that was tried.

"""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"


def workloads(found: list[dict[str, Any]]) -> str:
    """What a capture of each model costs, and its training."""
    rows = []
    for one in found:
        best = max((t for t in one["training"] if "samples_per_s" in t), key=lambda t: t["samples_per_s"])
        rows.append([
            one["name"], f"{one['L']:,}", f"{one['passes_s']:.3f}", f"{one['capture_s']:.3f}",
            f"{one['added_percent']:.0f}", f"{1e3 * one['compress_s']:.1f}", f"{one['capture_peak_GB']:.1f}",
            f"{best['batch']}: {best['samples_per_s']:.1f}, {best['peak_GB']:.1f} GB",
        ])  # fmt: skip
    columns = ["model", "L", "passes, s", "capture, s", "added, %", "compress, ms", "peak, GB",
               "training, batch: samples a second, peak"]  # fmt: skip
    return "## A training step\n\n" + STEP + table(columns, rows)


def compress(found: list[dict[str, Any]]) -> str:
    """Compression in reads of the gradient."""
    rows = [
        [
            one["L"], one["dtype"], one["v"], "sign" if one["signs"] else "none", one.get("backend", "Triton"),
            f"{one['read_ms']:.3f}", f"{one['ours_ms']:.3f}", f"{one['reads']:.2f}",
            f"{one['device_reads']:.2f}" if "device_reads" in one else "",
        ]
        for one in found
    ]  # fmt: skip
    columns = ["L", "dtype", "v", "transform", "backend", "read, ms", "compress, ms", "reads", "reads, device alone"]
    text = "A *read* is one `sum` of the gradient. *Device alone* leaves the processor's launches out, by a CUDA graph."
    return "## Compression\n\n" + text + "\n\n" + table(columns, rows)


def main(source: Path, page: Path) -> None:
    """Writes the page."""
    result = json.loads(source.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    text = HEAD + f"Device: {result['device']}. Python {result['python']}, {versions}, Triton {result['triton']}.\n\n"
    text += "".join(f"{line}\n\n" for line in result.get("notes", []))
    text += workloads(result["workloads"])
    if result.get("compress"):
        text += compress(result["compress"])
    page.write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
