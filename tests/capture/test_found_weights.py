"""weights: saved tensors find their parameters, whatever the host calls them; nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dmin_trace.integrations.diffusers.host import parameter_key
from safetensors.torch import save_file

from dmin_trace.capture.weights import Trainable, find_trainable
from dmin_trace.errors import WeightsError


class Adapted(torch.nn.Module):
    """Named as PEFT names an adapter's parameters."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        part = torch.nn.Module()
        part.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(width, 2, bias=False)})
        part.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, width, bias=False)})
        self.to_q = part


def trainable(*models: torch.nn.Module) -> Trainable:
    parameters = [p for model in models for p in model.parameters()]
    return find_trainable(models, [torch.optim.SGD(parameters, lr=1.0)])


def file(path: Path, prefixes: dict[str, float], spell: Callable[[str], str] = lambda key: key) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {n.replace(".default", ""): p.shape for n, p in Adapted().named_parameters()}
    save_file({spell(f"{p}{n}"): torch.full(s, v) for p, v in prefixes.items() for n, s in named.items()}, path)
    return path


OLD = {".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."}
TEXT = {".lora_A.": ".lora_linear_layer.down.", ".lora_B.": ".lora_linear_layer.up."}
OLDEST = {".to_q.lora_A.": ".to_q_lora.down.", ".to_q.lora_B.": ".to_q_lora.up."}


@pytest.mark.parametrize("table", [{}, OLD, TEXT, OLDEST], ids=["peft", "unet", "text encoder", "oldest"])
@pytest.mark.parametrize("prefix", ["unet.", "transformer.", "x.y."])
def test_every_spelling_of_a_lora_file_is_read(tmp_path: Path, table: dict[str, str], prefix: str) -> None:
    def spell(key: str) -> str:
        for new, old in table.items():
            key = key.replace(new, old)
        return key

    model = Adapted()
    trainable(model).load(file(tmp_path / "lora.safetensors", {prefix: 0.5}, spell), parameter_key)
    assert all((p == 0.5).all() for p in model.parameters())


def test_several_models_are_told_apart_by_the_words_in_front(tmp_path: Path) -> None:
    path = file(tmp_path / "lora.safetensors", {"text_encoder.": 1.0, "text_encoder_2.": 2.0})
    first, second = Adapted(), Adapted()
    trainable(first, second).load(path)
    assert {p.mean().item() for p in first.parameters()} == {1.0}
    assert {p.mean().item() for p in second.parameters()} == {2.0}


def test_what_can_only_be_one_models_is_no_others(tmp_path: Path) -> None:
    path = file(tmp_path / "lora.safetensors", {"one.": 1.0, "two.inner.": 2.0})
    first, second = Adapted(), torch.nn.ModuleDict({"inner": Adapted()})
    trainable(first, second).load(path)
    assert {p.mean().item() for p in first.parameters()} == {1.0}
    assert {p.mean().item() for p in second.parameters()} == {2.0}


def test_of_a_pipelines_folders_the_one_with_the_models_names_is_read(tmp_path: Path) -> None:
    file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", {"": 3.0})
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "learned.safetensors")
    file(tmp_path / "checkpoint-5" / "model.safetensors", {"": 4.0})
    model = Adapted()
    trainable(model).load(tmp_path)
    assert {p.mean().item() for p in model.parameters()} == {3.0}


def test_two_that_would_do_are_refused_unless_they_are_the_same(tmp_path: Path) -> None:
    path = file(tmp_path / "lora.safetensors", {"unet.": 1.0, "unet_ema.": 2.0})
    model = Adapted()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(WeightsError, match="holds several weights that fit: unet, unet_ema"):
        trainable(model).load(path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    trainable(model).load(file(tmp_path / "same.safetensors", {"unet.": 1.0, "unet_ema.": 1.0}))
    assert {p.mean().item() for p in model.parameters()} == {1.0}


def test_missing_and_misshapen_tensors_are_told(tmp_path: Path) -> None:
    path = file(tmp_path / "lora.safetensors", {"unet.": 1.0})
    with pytest.raises(WeightsError, match=r"shape \(2, 3\), but the script's model has \(2, 4\)"):
        trainable(Adapted(width=4)).load(path)
    with pytest.raises(WeightsError, match="lacks 1 of the 2"):
        trainable(torch.nn.Linear(2, 2)).load(path)


def test_our_own_file_is_read_back(tmp_path: Path) -> None:
    models = Adapted(), Adapted()
    saved = [p.clone() for model in models for p in model.parameters()]
    trainable(*models).save(tmp_path / "trace.weights.safetensors")
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.zero_()
    trainable(*models).load(tmp_path / "trace.weights.safetensors")
    assert all(torch.equal(a, p) for a, p in zip(saved, (p for m in models for p in m.parameters()), strict=True))
