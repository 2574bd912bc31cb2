"""A run on queries changes no file that was there before it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# In a process of its own: an audit hook stays.
PROGRAM = """
import os, shutil, sys, time
from pathlib import Path
import numpy, torch
from safetensors.torch import save_file
from dmin_trace.capture.write_guard import protect_older_files
from dmin_trace.errors import ScriptError
time.sleep(1.1)
protect_older_files(Path("free"))
def tried(what):
    try:
        what()
    except ScriptError as error:
        assert "old" in str(error), error
        return "refused"
    return "done"
one = {"a": torch.ones(2)}
old = [
    lambda: open("old.txt", "w"), lambda: open("old.txt", "a"), lambda: Path("old.txt").unlink(),
    lambda: torch.save(one, "old.txt"), lambda: save_file(one, "old.txt"), lambda: save_file(one, filename="link.txt"),
    lambda: os.replace("new.txt", "old.txt"), lambda: shutil.rmtree("oldfolder"),
    lambda: numpy.save("old.npy", numpy.ones(2)), lambda: os.truncate("old.txt", 0),
]
new = [
    lambda: open("new.txt", "w").close(), lambda: open("new.txt", "a").close(), lambda: torch.save(one, "new.pt"),
    lambda: torch.save(one, "new.pt"), lambda: save_file(one, "new.safetensors"), lambda: open("old.txt").close(),
    lambda: open("free/old.txt", "w").close(), lambda: open("old.lock", "w").close(),
    lambda: open(os.devnull, "w").close(), lambda: os.replace("new.pt", "newer.pt"),
]
print([tried(what) for what in new], [tried(what) for what in old])
"""


def test_older_files_stay_and_new_ones_are_free(tmp_path: Path) -> None:
    for name in ("old.txt", "old.npy", "old.lock", "oldfolder/a", "free/old.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "link.txt").symlink_to(tmp_path / "old.txt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.stdout == f"{['done'] * 10} {['refused'] * 10}\n", ran.stderr
    for name in ("old.txt", "old.npy", "oldfolder/a"):
        assert (tmp_path / name).read_text() == "mine", name
