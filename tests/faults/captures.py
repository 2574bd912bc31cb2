"""A small real capture to attack, and what must be true of its store."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Mapping
from pathlib import Path

from tiny import plain_script
from warm import Running, Warm

SETTINGS = ["--timesteps", "3", "--dimension", "64"]


def small_chunks(rows: int) -> str:
    """Has a capture of SETTINGS write chunks of so many samples: its own would be one chunk for all."""
    return f"import dmin_trace.store.layout; dmin_trace.store.layout.CHUNK_BYTES = {rows} * 3 * 64\n"


class Capture:
    """A script whose model was trained, to be captured from its weights again and again."""

    def __init__(self, warm: Warm, folder: Path, count: int, rows: int) -> None:
        """Trains. `count` samples, `rows` in a chunk."""
        folder.mkdir(parents=True)
        self.warm, self.folder, self.count, self.prelude = warm, folder, count, small_chunks(rows)
        self.script = plain_script(folder / "script.py", attach="")
        self.weights = folder / "weights.safetensors"
        # The weights that a first capture has beside it are those of the training's first step: any will do.
        give = (
            "import safetensors.torch; safetensors.torch.save_file({n: p.detach().clone() for n, p in "
            f"model.named_parameters()}}, {str(self.weights)!r})"
        )
        trained = plain_script(folder / "trained.py", attach="", imports="")
        trained.write_text(
            trained.read_text().replace(
                "    Path(args.output_dir).mkdir", f"    {give}\n    Path(args.output_dir).mkdir"
            )
        )
        warm.run([trained, "--count", count, "--output_dir", folder / "out"], folder)

    def command(self, out: Path, *options: object) -> list[object]:
        """The command line that captures to `out`."""
        given = ["capture", "--weights", self.weights, *SETTINGS, "--out", out, *options]
        return ["dmin-trace", *given, "--", self.script, "--count", self.count]


def names(folder: Path) -> set[str]:
    """Every file and folder in a folder, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store by its name; the metadata without the id, which is random, and without its digest."""
    found = {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}
    metadata = json.loads(found["zarr.json"])
    assert len(metadata["attributes"].pop("id")) == 32
    for name in ("sha256", "state"):
        assert len(metadata["attributes"].pop(name, "0" * 64)) == 64
    return {**found, "zarr.json": json.dumps(metadata, sort_keys=True).encode()}


def done(store: Path) -> set[int]:
    """The chunks whose marks say so, read without dmin_trace."""
    marks = store / "done" / "c"
    listed = marks.iterdir() if marks.is_dir() else ()
    return {int(mark.name) for mark in listed if mark.name.isdecimal() and mark.read_bytes()[:1] == b"\x01"}


def chunk_files(store: Path) -> dict[int, list[Path]]:
    """The files of each chunk that are there, its mark among them, less those that a killed write left."""
    found: dict[int, list[Path]] = {}
    for file in store.rglob("*"):
        parts = file.relative_to(store).parts
        if "c" in parts[:-1] and file.suffix != ".partial" and file.is_file():
            found.setdefault(int(parts[parts.index("c") + 1]), []).append(file)
    return found


def stamps(store: Path) -> dict[str, tuple[int, int]]:
    """Of every file of every chunk that is done: which file it is, and when it was written."""
    finished, found = done(store), {}
    for chunk, files in chunk_files(store).items():
        for file in files if chunk in finished else ():
            facts = file.stat()
            found[str(file.relative_to(store))] = (facts.st_ino, facts.st_mtime_ns)
    return found


def scribble(store: Path, generator: random.Random) -> None:
    """Garbage over all of every chunk that is not done."""
    finished = done(store)
    for chunk, files in chunk_files(store).items():
        for file in files if chunk not in finished else ():
            if file.relative_to(store).parts[0] != "done":
                file.write_bytes(generator.randbytes(max(1, file.stat().st_size - generator.randrange(3))))


def kept(before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]) -> None:
    """Checks that what was done is the same files, untouched."""
    touched = {name for name in before if after.get(name) != before[name]}
    assert not touched, f"done, and written again: {sorted(touched)[:3]}"


def check_same(out: Path, whole: Path) -> None:
    """Checks that the store in a folder is that of a capture which nobody disturbed, and that nothing else lies about.

    Args:
        out: the folder around `trace.zarr`.
        whole: the same of the other one.
    """
    found, expected = content(out / "trace.zarr"), content(whole / "trace.zarr")
    differ = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    assert not differ, f"not as in the uninterrupted capture: {differ[:5]}"
    assert names(out) == names(whole), sorted(names(out) ^ names(whole))
    assert any(name.startswith("thumbnails/c/") for name in found)
    weights = "trace.weights.safetensors"
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()


def start_ranks(capture: Capture, out: Path, processes: int, prelude: str = "") -> list[Running]:
    """Starts a capture in several processes, without a launcher: nobody ends the others when one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    return [
        capture.warm.start(
            capture.command(out),
            capture.folder,
            capture.prelude + prelude,
            **common,
            RANK=str(k),
            LOCAL_RANK=str(k),
        )
        for k in range(processes)
    ]
