"""Weights as people have them: every trainable tensor is found, or the missing are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from dmin_trace.integrations.diffusers import host as diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny_pipelines import tiny_pipeline

from dmin_trace.capture.weights import Trainable, find_trainable
from dmin_trace.errors import WeightsError


def lora_unet(seed: int, *, dora: bool = False) -> UNet2DConditionModel:
    """A tiny UNet with LoRA layers, of which no tensor is zero."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, use_dora=dora, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    with torch.no_grad():
        for parameter in trainable_of(unet).tensors:
            parameter.normal_()
    return unet


def trainable_of(model: torch.nn.Module) -> Trainable:
    return find_trainable([model], [torch.optim.SGD([p for p in model.parameters() if p.requires_grad])])


def released(unet: UNet2DConditionModel, path: Path) -> None:
    StableDiffusionPipeline.save_lora_weights(path, convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)))


def peft_names(unet: UNet2DConditionModel, path: Path) -> None:
    path.mkdir()
    values = {f"unet.{name}": p.contiguous() for name, p in get_peft_model_state_dict(unet).items()}
    save_file(values, path / "pytorch_lora_weights.safetensors")


def another_adapter(unet: UNet2DConditionModel, path: Path) -> None:
    path.mkdir()
    values = {name.replace(".default.", ".style."): p.detach() for name, p in trained(unet).items()}
    save_file(values, path / "adapter.safetensors")


def checkpoint(unet: UNet2DConditionModel, path: Path) -> None:
    accelerator = Accelerator()
    accelerator.prepare(unet)
    accelerator.save_state(path)


def checkpoint_with_release(unet: UNet2DConditionModel, path: Path) -> None:
    checkpoint(unet, path)
    released(unet, path)


def trained(unet: UNet2DConditionModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("save", [released, peft_names, another_adapter, checkpoint, checkpoint_with_release])
def test_a_lora_is_read_in_every_format(tmp_path: Path, save: Callable[[UNet2DConditionModel, Path], None]) -> None:
    unet, other = lora_unet(1), lora_unet(2)
    save(unet, tmp_path / "saved")
    trainable_of(other).load(tmp_path / "saved", diffusers.parameter_key)
    assert len(trained(other)) == 64
    for name, parameter in trained(unet).items():
        assert torch.equal(parameter, trained(other)[name]), name


def test_a_dora_is_read(tmp_path: Path) -> None:
    unet, other = lora_unet(1, dora=True), lora_unet(2, dora=True)
    released(unet, tmp_path / "saved")
    trainable_of(other).load(tmp_path / "saved", diffusers.parameter_key)
    assert len(trained(other)) == 96
    for name, parameter in trained(unet).items():
        assert torch.equal(parameter, trained(other)[name]), name


def test_a_pipelines_own_unet_is_read(tmp_path: Path) -> None:
    # A VAE has tensors of the same names as a UNet.
    folder = tiny_pipeline(tmp_path / "pipeline")
    expected = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    model = UNet2DConditionModel.from_config(expected.config)
    trainable_of(model).load(folder, diffusers.parameter_key)
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_each_of_several_models_gets_its_own(tmp_path: Path) -> None:
    models = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    accelerator = Accelerator()
    for model in models:
        accelerator.prepare(model)
    accelerator.save_state(tmp_path / "checkpoint-1")
    others = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    optimizer = torch.optim.SGD([p for model in others for p in model.parameters()])
    find_trainable(others, [optimizer]).load(tmp_path / "checkpoint-1")
    for model, other in zip(models, others, strict=True):
        assert torch.equal(model.weight, other.weight)


def test_what_is_missing_is_named_and_nothing_changed(tmp_path: Path) -> None:
    unet, other = lora_unet(1), lora_unet(2)
    values = {f"unet.{name}": p.contiguous() for name, p in get_peft_model_state_dict(unet).items()}
    gone = sorted(values)[3]
    del values[gone]
    save_file(values, tmp_path / "lora.safetensors")
    before = [p.clone() for p in trained(other).values()]
    with pytest.raises(WeightsError, match="lacks 1 of the 64 trainable tensors") as raised:
        trainable_of(other).load(tmp_path / "lora.safetensors", diffusers.parameter_key)
    assert gone.removeprefix("unet.").removesuffix(".weight") in str(raised.value)
    assert all(torch.equal(a, b) for a, b in zip(before, trained(other).values(), strict=True))


def test_weights_that_fit_twice_are_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    for name in ("unet", "unet_ema"):
        (tmp_path / name).mkdir()
        save_file(torch.nn.Linear(3, 2).state_dict(), tmp_path / name / "model.safetensors")
    with pytest.raises(WeightsError, match="holds several weights that fit: unet, unet_ema"):
        trainable_of(model).load(tmp_path)
