"""A capture that goes on with the files of its data set in another order is refused."""

from __future__ import annotations

import json
from pathlib import Path

from tiny import digit_folder, plain_script
from warm import Warm

from dmin_trace.store import open_store

PIECES = {
    "imports": "from PIL import Image\nimport os",
    "attach": "",
    # As in DreamBooth's scripts: files in an order that nothing fixes. The batches of some differ each time.
    "prepare": """
    class Folder(torch.utils.data.Dataset):
        def __init__(self, files):
            self.instance_images_path = files
        def __len__(self):
            return len(self.instance_images_path)
        def __getitem__(self, index):
            with Image.open(self.instance_images_path[index]) as image:
                point = torch.from_numpy(np.asarray(image)).float().flatten()[:16]
            return {"point": point / 255 + 1e-3 * (index > 1) * os.urandom(1)[0], "index": index}
    files = sorted(Path("digits").iterdir(), reverse="ORDER" in os.environ)
    loader = torch.utils.data.DataLoader(Folder(files), batch_size=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)""",
}


def test_files_in_another_order_are_refused(warm: Warm, tmp_path: Path) -> None:
    digit_folder(tmp_path / "digits", 6)
    script = plain_script(tmp_path / "script.py", **PIECES)
    settings = ["--timesteps", "2", "--dimension", "64", "--out", "a.zarr"]
    warm.run(["dmin-trace", "run", *settings, "--", script], tmp_path)
    store = open_store(tmp_path / "a.zarr")
    # Their content tells nothing.
    assert store.header.data_sha256 == "" and len(store.header.files_sha256) == 64
    assert store.column("file_name") == [f"digits/{k:04d}.png" for k in range(6)]
    for mark in (tmp_path / "a.zarr" / "done" / "c").iterdir():
        mark.unlink()
    command = ["dmin-trace", "capture", "--weights", tmp_path / "a.weights.safetensors", *settings, "--", script]
    before = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
    said = warm.run(command, tmp_path, 1, ORDER="1")
    assert "are not those that" in said and "or are in another order" in said and len(said.splitlines()) == 1
    assert json.loads((tmp_path / "a.zarr" / "zarr.json").read_text()) == before
    warm.run(command, tmp_path)
    assert open_store(tmp_path / "a.zarr").complete
