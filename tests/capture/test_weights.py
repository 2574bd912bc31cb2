"""Trainable tensors: found, written, read back, and never from a pickle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmin_trace.capture.weights import find_trainable
from dmin_trace.errors import CaptureError, WeightsError


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def test_find_trainable_returns_each_trained_parameter_once() -> None:
    net = model()
    net[0].bias.requires_grad_(False)
    shared = torch.nn.ModuleList([net, net])
    found = find_trainable([shared], [torch.optim.SGD([net[0].weight, net[1].bias, net[0].bias])])
    assert found.names == ("0.0.weight", "0.1.bias")
    assert found.shapes == ((4, 3), (2,))
    assert found.length == 14
    with pytest.raises(CaptureError, match="No trainable parameter"):
        find_trainable([model()], [torch.optim.SGD(net.parameters())])


def test_trainable_load_restores_what_save_wrote(tmp_path: Path) -> None:
    net, other = model().bfloat16(), model().bfloat16()
    trainable = find_trainable([net], [torch.optim.SGD(net.parameters())])
    trainable.save(tmp_path / "weights.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    copy = find_trainable([other], [torch.optim.SGD(other.parameters())])
    assert copy.weights_fingerprint() != trainable.weights_fingerprint()
    copy.load(tmp_path)
    assert copy.weights_fingerprint() == trainable.weights_fingerprint()


def test_weights_fingerprint_changes_with_one_bit() -> None:
    net = model()
    trainable = find_trainable([net], [torch.optim.SGD(net.parameters())])
    before = trainable.weights_fingerprint()
    net[1].bias.data[0] = torch.nextafter(net[1].bias.data[0], torch.tensor(9.0))
    assert trainable.weights_fingerprint() != before


def test_trainable_load_changes_nothing_if_weights_do_not_fit(tmp_path: Path) -> None:
    net = model()
    trainable = find_trainable([net], [torch.optim.SGD(net.parameters())])
    before = trainable.weights_fingerprint()
    values = {name: p.detach() + 1 for name, p in net.named_parameters()}
    save_file({n: v for n, v in values.items() if n != "1.bias"}, tmp_path / "fewer.safetensors")
    save_file({**values, "1.bias": torch.zeros(3)}, tmp_path / "shape.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x80\x04not tensors")
    (tmp_path / "twice").mkdir()
    save_file(values, tmp_path / "twice" / "a.safetensors")
    save_file(values, tmp_path / "twice" / "b.safetensors")
    (tmp_path / "pickle").mkdir()
    torch.save(values, tmp_path / "pickle" / "model.bin")
    for name, message in {
        "fewer.safetensors": "lacks 1 of the 4",
        "shape.safetensors": "holds 1.bias with shape",
        "broken.safetensors": "cannot be read as safetensors",
        "twice": "holds 0.bias twice",
        "pickle": "holds no .safetensors file",
        "gone": "There are no weights at",
    }.items():
        with pytest.raises(WeightsError, match=message):
            trainable.load(tmp_path / name)
    assert trainable.weights_fingerprint() == before


def test_equals_saved_sees_a_change_and_not_a_cast(tmp_path: Path) -> None:
    net = model().bfloat16()
    trainable = find_trainable([net], [torch.optim.SGD(net.parameters())])
    trainable.save(tmp_path / "weights.safetensors")
    assert trainable.equals_saved(tmp_path / "weights.safetensors")
    for cast in (torch.float32, torch.float16):
        net.to(cast)
        assert trainable.equals_saved(tmp_path / "weights.safetensors"), cast
    with torch.no_grad():
        net[1].bias += 1
    assert not trainable.equals_saved(tmp_path / "weights.safetensors")
