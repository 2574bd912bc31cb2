"""describe_cost: what a person reads of an estimated capture."""

from __future__ import annotations

from dataclasses import replace

from stores import make_header

from dmin_trace.capture.estimate import describe_cost

HEADER = make_header(samples=1000, timesteps=10, dimension=2**14, rows=100)
HEADER = replace(HEADER, projection=replace(HEADER.projection, length=2_000_000))
COST = {"weights": 8_000_000, "seconds_per_sample": 0.5, "memory": 900_000_000, "gpu_memory": 0}
ROOM = {"free_disk": 10**12, "free_memory": 10**12}


def test_describe_cost_names_time_disk_and_memory() -> None:
    rows = dict(describe_cost(HEADER, **COST, **ROOM))
    assert rows["samples x timesteps"] == "1,000 x 10"
    assert rows["time"] == "0:08:20 (0.5 s a sample, one process)"
    assert rows["disk"] == "164.1 MB for the store (164.1 kB a sample), 8.0 MB for the weights"
    assert rows["uncompressed"] == "80.0 GB would be the gradients as float32, 487 times as much"
    assert rows["memory"] == "932.8 MB at the peak, of which 32.8 MB wait for the disk"
    assert not rows.keys() & {"but", "GPU memory"}


def test_describe_cost_tells_what_does_not_fit() -> None:
    cost = COST | {"gpu_memory": 10**9}
    rows = describe_cost(replace(HEADER, draws=3), **cost, free_disk=10**8, free_memory=10**7)
    assert ("samples x timesteps", "1,000 x 10, 3 draws each") in rows and ("GPU memory", "1.0 GB at the peak") in rows
    assert dict(rows)["memory"].endswith("8.0 MB are the mean of the draws")
    assert [value for name, value in rows if name == "but"] == [
        "only 100.0 MB are free on the disk",
        "only 10.0 MB of memory are free",
    ]


def test_describe_cost_tells_passes_from_rows() -> None:
    noise = replace(HEADER.noise, norms=(2.0,))
    rows = dict(describe_cost(replace(HEADER, group_count=1, noise=noise, draws=2), **COST, **ROOM))
    assert rows["samples x timesteps"] == "1,000 x 10, 2 draws each, pooled into 1 row a sample"
    assert rows["disk"].startswith("16.5 MB for the store (16.5 kB a sample)")
    assert rows["uncompressed"].startswith("8.0 GB")
    assert rows["memory"].endswith("8.0 MB are the mean of the draws, 8.0 MB are the mean of the timesteps of a row")
