"""weight_files: Trainable.load finds its parameters in every format, under every spelling; nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from dmin_trace.integrations.diffusers import host as diffusers
from dmin_trace.integrations.diffusers.host import parameter_key
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny_pipelines import tiny_pipeline

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
def test_load_reads_every_spelling_of_a_lora_file(tmp_path: Path, table: dict[str, str], prefix: str) -> None:
    def spell(key: str) -> str:
        for new, old in table.items():
            key = key.replace(new, old)
        return key

    model = Adapted()
    trainable(model).load(file(tmp_path / "lora.safetensors", {prefix: 0.5}, spell), parameter_key)
    assert all((p == 0.5).all() for p in model.parameters())


def test_load_tells_models_apart_by_prefix(tmp_path: Path) -> None:
    path = file(tmp_path / "lora.safetensors", {"text_encoder.": 1.0, "text_encoder_2.": 2.0})
    first, second = Adapted(), Adapted()
    trainable(first, second).load(path)
    assert {p.mean().item() for p in first.parameters()} == {1.0}
    assert {p.mean().item() for p in second.parameters()} == {2.0}


def test_load_takes_a_set_that_fits_one_model_from_the_others(tmp_path: Path) -> None:
    path = file(tmp_path / "lora.safetensors", {"one.": 1.0, "two.inner.": 2.0})
    first, second = Adapted(), torch.nn.ModuleDict({"inner": Adapted()})
    trainable(first, second).load(path)
    assert {p.mean().item() for p in first.parameters()} == {1.0}
    assert {p.mean().item() for p in second.parameters()} == {2.0}


def test_load_reads_the_pipeline_folder_with_the_models_names(tmp_path: Path) -> None:
    file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", {"": 3.0})
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "learned.safetensors")
    file(tmp_path / "checkpoint-5" / "model.safetensors", {"": 4.0})
    model = Adapted()
    trainable(model).load(tmp_path)
    assert {p.mean().item() for p in model.parameters()} == {3.0}


def test_load_refuses_two_sets_that_fit_unless_they_are_equal(tmp_path: Path) -> None:
    path = file(tmp_path / "lora.safetensors", {"unet.": 1.0, "unet_ema.": 2.0})
    model = Adapted()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(WeightsError, match="holds several weights that fit: unet, unet_ema"):
        trainable(model).load(path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    trainable(model).load(file(tmp_path / "same.safetensors", {"unet.": 1.0, "unet_ema.": 1.0}))
    assert {p.mean().item() for p in model.parameters()} == {1.0}


def test_load_names_missing_and_misshapen_tensors(tmp_path: Path) -> None:
    path = file(tmp_path / "lora.safetensors", {"unet.": 1.0})
    with pytest.raises(WeightsError, match=r"shape \(2, 3\), but the script's model has \(2, 4\)"):
        trainable(Adapted(width=4)).load(path)
    with pytest.raises(WeightsError, match="lacks 1 of the 2"):
        trainable(torch.nn.Linear(2, 2)).load(path)


def test_load_reads_the_file_that_save_wrote(tmp_path: Path) -> None:
    models = Adapted(), Adapted()
    saved = [p.clone() for model in models for p in model.parameters()]
    trainable(*models).save(tmp_path / "trace.weights.safetensors")
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.zero_()
    trainable(*models).load(tmp_path / "trace.weights.safetensors")
    assert all(torch.equal(a, p) for a, p in zip(saved, (p for m in models for p in m.parameters()), strict=True))


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
def test_load_reads_a_lora_in_every_format(tmp_path: Path, save: Callable[[UNet2DConditionModel, Path], None]) -> None:
    unet, other = lora_unet(1), lora_unet(2)
    save(unet, tmp_path / "saved")
    trainable_of(other).load(tmp_path / "saved", diffusers.parameter_key)
    assert len(trained(other)) == 64
    for name, parameter in trained(unet).items():
        assert torch.equal(parameter, trained(other)[name]), name


def test_load_reads_a_dora(tmp_path: Path) -> None:
    unet, other = lora_unet(1, dora=True), lora_unet(2, dora=True)
    released(unet, tmp_path / "saved")
    trainable_of(other).load(tmp_path / "saved", diffusers.parameter_key)
    assert len(trained(other)) == 96
    for name, parameter in trained(unet).items():
        assert torch.equal(parameter, trained(other)[name]), name


def test_load_reads_the_unet_of_a_pipeline(tmp_path: Path) -> None:
    # A VAE has tensors of the same names as a UNet.
    folder = tiny_pipeline(tmp_path / "pipeline")
    expected = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    model = UNet2DConditionModel.from_config(expected.config)
    trainable_of(model).load(folder, diffusers.parameter_key)
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_load_gives_each_of_several_models_its_own(tmp_path: Path) -> None:
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


def test_load_names_what_is_missing_and_changes_nothing(tmp_path: Path) -> None:
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


def test_load_refuses_weights_that_fit_twice(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    for name in ("unet", "unet_ema"):
        (tmp_path / name).mkdir()
        save_file(torch.nn.Linear(3, 2).state_dict(), tmp_path / name / "model.safetensors")
    with pytest.raises(WeightsError, match="holds several weights that fit: unet, unet_ema"):
        trainable_of(model).load(tmp_path)
