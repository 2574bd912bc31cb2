"""Pictures in a terminal: what it can show is found out by asking it, and a pipe gets none."""

from __future__ import annotations

import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from fcntl import ioctl
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from torture_stores import make_store

from dmin_trace.query import open_trace, small_picture
from dmin_trace.store import decode_webp, encode_webp
from dmin_trace.views import hits_table, shows_pictures
from dmin_trace.views.terminal_pictures import COLUMNS, HalfBlocks


def drawn(image: Image.Image) -> list[list[tuple[tuple[int, ...], tuple[int, ...] | None]]]:
    """For each line its characters, as the colour above and the colour below."""
    console = Console(file=StringIO(), force_terminal=True, color_system="truecolor", width=80)
    lines = []
    for line in console.render_lines(HalfBlocks(image), pad=False):
        assert all(segment.text == "▀" for segment in line)
        styles = [segment.style for segment in line if segment.style is not None]
        colours = [[c and c.triplet for c in (style.color, style.bgcolor)] for style in styles]
        lines.append([(tuple(above or ()), tuple(below) if below else None) for above, below in colours])
    return lines


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 1), (16, 16)])
def test_a_small_picture_is_drawn_pixel_by_pixel(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    lines = drawn(Image.fromarray(pixels))
    assert len(lines) == (size[1] + 1) // 2
    for n, line in enumerate(lines):
        for x, (above, below) in enumerate(line):
            assert above == tuple(pixels[2 * n, x].tolist())
            expected = tuple(pixels[2 * n + 1, x].tolist()) if 2 * n + 1 < size[1] else None
            assert below == expected


@pytest.mark.parametrize("size", [(128, 85), (85, 128), (500, 3)])
def test_a_large_picture_is_reduced_and_keeps_its_form(size: tuple[int, int]) -> None:
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2] = (200, 100, 50)
    lines = drawn(Image.fromarray(pixels))
    width, height = len(lines[0]), 2 * len(lines)
    assert max(width, height) == COLUMNS and abs(height - max(1, COLUMNS * size[1] / max(size))) <= 1.5
    assert lines[0][0][0] == (200, 100, 50) and lines[0][-1][0] == (0, 0, 0)


def console_of(terminal: bool = True, colours: Any = "truecolor", width: int = 100) -> Console:
    return Console(file=StringIO(), force_terminal=terminal, color_system=colours, width=width)


def test_pictures_are_for_terminals_that_can_show_them() -> None:
    assert shows_pictures(console_of(), "auto")
    for console in (console_of(colours=None), console_of(colours="standard"), console_of(width=59)):
        assert not shows_pictures(console, "auto")
        assert shows_pictures(console, "always")
    assert not shows_pictures(console_of(), "never")
    # Whatever is wanted, a pipe and a file get none.
    assert not any(shows_pictures(console_of(terminal=False), wanted) for wanted in ("auto", "always", "never"))


def test_a_query_has_a_small_picture_if_it_is_one(tmp_path: Path) -> None:
    Image.new("RGBA", (300, 200), (10, 20, 30, 255)).save(tmp_path / "a.png")
    image = decode_webp(small_picture(tmp_path / "a.png") or b"", 128)
    assert (image.size, image.mode) == ((128, 85), "RGB")
    assert np.abs(np.asarray(image, int) - (10, 20, 30)).max() <= 2
    with Image.open(tmp_path / "a.png") as opened:
        given = decode_webp(small_picture(opened) or b"", 128)
        assert given.size == (128, 85) and opened.size == (300, 200)
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    (tmp_path / "video.mp4").write_bytes(bytes(100))
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n(victim) deletefile\n")
    for name in ("bomb.png", "video.mp4", "program.png", "missing.png", "\0"):
        assert small_picture(tmp_path / name) is None


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose sample k has a picture of the colour (k, 0, 255)."""
    return make_store(tmp_path_factory.mktemp("made"), index=False).path


def test_the_table_has_the_picture_of_each_hit(path: Path) -> None:
    with open_trace(path) as trace:
        top = trace.top_k(trace.query_samples([7]), 3)
        console = Console(
            file=StringIO(), force_terminal=True, color_system="truecolor", width=100, legacy_windows=False
        )
        own = encode_webp(Image.new("RGB", (2, 2), (1, 2, 3)), 16)
        console.print(hits_table(replace(top, pictures=(own,)), 0, draw=HalfBlocks))
        said = console.file.getvalue()  # type: ignore[attr-defined]
        found = [int(red) for red in re.findall(r"38;2;(\d+);0;255;48;2;\1;0;255m▀▀?", said)]
        # Four pixels high: two lines each.
        assert list(dict.fromkeys(found)) == [hit.sample for hit in top.hits[0]]
        assert said.count("▀") == 3 * 8 + 2 and "38;2;1;2;3;48;2;1;2;3" in said
        plain = Console(file=StringIO(), width=100)
        plain.print(hits_table(top, 0))
        assert "▀" not in plain.file.getvalue()  # type: ignore[attr-defined]


class Terminal:
    """What a terminal answers to the questions that it is asked; the texts are those of real ones."""

    def __init__(self, **answers: bytes) -> None:
        self.answers = {b"\x1b[c": answers.get("kind", b""), b"\x1b[16t": b"\x1b[6;20;10t"}
        self.kitty = answers.get("kitty", b"")
        # Lines and columns, and pixels both ways.
        self.size = (0, 0, 0, 0) if "no_size" in answers else (50, 100, 1000, 1000)

    def answer(self, said: bytes) -> bytes:
        found = b"".join(given for asked, given in self.answers.items() if asked in said)
        if self.kitty and (asked := re.search(rb"\x1b_Gi=(\d+)[^;]*a=q", said)):
            found += b"\x1b_Gi=" + asked[1] + self.kitty
        return found


def run_in(terminal: Terminal, arguments: list[str], seconds: float = 300) -> bytes:
    """Runs `dmin-trace` in a pseudo-terminal, and gives what it writes there."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *terminal.size))
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "100", "LINES": "50"}
    command = [sys.executable, "-m", "dmin_trace.cli.app", *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    said, until = b"", time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            if not select.select([ours], [], [], 1)[0]:
                if process.poll() is not None:
                    break
                continue
            try:
                new = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not new:
                break
            said += new
            if answer := terminal.answer(new):
                os.write(ours, answer)
        assert process.wait(30) == 0, said
    finally:
        process.kill()
        os.close(ours)
    return said


TERMINALS = {
    "sixel": Terminal(kind=b"\x1b[?62;4;22c"),
    "kitty": Terminal(kind=b"\x1b[?62;c", kitty=b";OK\x1b\\"),
    "colours alone": Terminal(kind=b"\x1b[?1;2c"),
    "silent": Terminal(),
    "sixel, of no size": Terminal(kind=b"\x1b[?62;4;22c", no_size=b""),
}


@pytest.mark.parametrize("name", TERMINALS)
def test_a_terminal_is_asked_what_it_can_show(path: Path, name: str) -> None:
    pytest.importorskip("textual_image")
    said = run_in(TERMINALS[name], ["query", str(path), "--sample", "7", "-k", "3"])
    # Three hits, and the query.
    drawn = {
        "sixel": said.count(b"\x1bP"),
        "kitty": len(re.findall(rb"\x1b_Ga=p", said)),
        "blocks": said.count("▀".encode()),
    }
    expected = {"sixel": {"sixel": 4}, "kitty": {"kitty": 4}}.get(name, {"blocks": 4 * 8})
    assert drawn == {"sixel": 0, "kitty": 0, "blocks": 0} | expected
    # The rest of the table is the same.
    assert b"Most influential training samples for" in said and b"sample 7" in said


def test_never_and_a_pipe_have_no_pictures(path: Path) -> None:
    said = run_in(TERMINALS["sixel"], ["query", str(path), "--sample", "7", "-k", "3", "--images", "never"])
    assert b"\x1bP" not in said and "▀".encode() not in said
    # It was not even asked.
    assert b"\x1b[c" not in said
    command = [sys.executable, "-m", "dmin_trace.cli.app", "query", str(path), "--sample", "7", "--images", "always"]
    ran = subprocess.run(command, capture_output=True, check=True)
    assert b"\x1b" not in ran.stdout and "▀".encode() not in ran.stdout
