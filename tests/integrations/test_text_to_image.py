"""Stable Diffusion with captions for real: train the LoRA example, capture, load saved weights, ask with prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.models.autoencoders.vae import Encoder
from oracle import slot_seed, unshuffled
from PIL import Image
from rich.filesize import decimal
from safetensors.torch import load_file, save_file
from tiny import run, without_the_line
from tiny_pipelines import caption, captioned_images, command_line, picture, tiny_pipeline
from transformers import CLIPTextModel

import dmin_trace
from dmin_trace import store
from dmin_trace.capture import encoder_cache as frozen
from dmin_trace.project import compress_gradient, make_plan
from dmin_trace.store import open_store

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_text_to_image_lora.py"
COUNT = 8
LINE = "dmin_trace.attach(accelerator, args"
# As long as the gradient, and by OPORP's own permutation: a sketch is the gradient itself, shuffled.
SETTINGS = "timesteps=[100, 500, 900], dimension=2**13, projection='uniform', dtype='float32', transform='none'"
COMMAND = (
    *("--pretrained_model_name_or_path", "../sd", "--train_data_dir", "../images", "--output_dir", "out"),
    *("--resolution", "32", "--rank", "4", "--train_batch_size", "3", "--gradient_accumulation_steps", "2"),
    *("--max_train_steps", "12", "--learning_rate", "1e-2", "--caption_column", "words"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, captioned images and, below `with`, a LoRA trained by the example, and its trace."""
    folder = tmp_path_factory.mktemp("made")
    tiny_pipeline(folder / "sd")
    captioned_images(folder / "images", COUNT, column="words")
    text = EXAMPLE.read_text()
    if text.count(LINE + ")") != 1:
        raise ValueError("the example has no such line")
    (folder / "train.py").write_text(text.replace(LINE + ")", f"{LINE}, {SETTINGS})"))
    (folder / "with").mkdir()
    run([folder / "train.py", *COMMAND, "--checkpointing_steps", "12"], folder / "with")
    return folder


def ask(made: Path, *arguments: object, code: int = 0) -> tuple[list[list[int]], str]:
    """The samples that a query finds, and what it says."""
    path = made / "with" / "hits.json"
    path.unlink(missing_ok=True)
    arguments = ("query", "--score", "dmin", "out.trace/trace.zarr", *arguments, "--json", path)
    said, complaints = command_line(arguments if "-k" in arguments else (*arguments, "-k", 3), made / "with", code)
    if code:
        return [], complaints
    found = json.loads(path.read_text())["queries"]
    return [[hit["sample"] for hit in query["hits"]] for query in found], said


def reference(
    made: Path, sample: int, timesteps: list[int], prompt: str | None = None
) -> list[dict[str, torch.Tensor]]:
    """The slow, obvious way: the saved LoRA loaded by diffusers, and plain autograd; with the caption or a prompt."""
    pipeline = StableDiffusionPipeline.from_pretrained(made / "sd", safety_checker=None)
    pipeline.load_lora_weights(made / "with" / "out", adapter_name="default")
    unet = pipeline.unet.eval()
    parameters = {name: p.requires_grad_("lora" in name) for name, p in unet.named_parameters()}
    parameters = {name: p for name, p in parameters.items() if p.requires_grad}
    pixels = torch.from_numpy(np.asarray(picture(sample)) / np.float32(127.5) - 1).permute(2, 0, 1)[None]
    prompt = caption(sample) if prompt is None else prompt
    tokens = pipeline.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    scheduler = DDPMScheduler.from_pretrained(made / "sd", subfolder="scheduler")
    found = []
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
        words = pipeline.text_encoder(tokens)[0]
    for slot, timestep in enumerate(timesteps):
        generator = torch.Generator().manual_seed(slot_seed(0, slot))
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        latents = latents * pipeline.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        kept = scheduler.alphas_cumprod[timestep]
        noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        loss = (unet(noisy, torch.tensor([timestep]), words).sample - noise).square().mean()
        taken = torch.autograd.grad(loss, list(parameters.values()))
        found.append(dict(zip(parameters, taken, strict=True)))
    return found


def test_the_line_changes_nothing(made: Path) -> None:
    bare = without_the_line(made / "train.py", made / "bare.py")
    (made / "without").mkdir()
    run([bare, *COMMAND, "--checkpointing_steps", "12"], made / "without")
    names = ("pytorch_lora_weights", "checkpoint-12/model")
    for name in names:
        paths = [made / way / "out" / f"{name}.safetensors" for way in ("with", "without")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    trained = load_file(made / "without" / "out" / "pytorch_lora_weights.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in trained.values())


def test_gradients_are_those_of_an_independent_reference(made: Path) -> None:
    trace = open_store(made / "with" / "out.trace" / "trace.zarr")
    assert trace.complete and trace.header.timesteps == (100.0, 500.0, 900.0)
    assert list(trace.column("text")) == [caption(k) for k in range(COUNT)]
    for sample in range(COUNT):
        captured = unshuffled(trace, sample)
        for slot, gradients in enumerate(reference(made, sample, [100, 500, 900])):
            assert list(gradients) == list(trace.header.parameters.names)
            expected = torch.cat([gradient.flatten() for gradient in gradients.values()]).numpy()
            assert np.linalg.norm(captured[slot] - expected) <= 1e-5 * np.linalg.norm(expected), (sample, slot)


def test_each_sample_has_its_picture(made: Path) -> None:
    trace = open_store(made / "with" / "out.trace" / "trace.zarr")
    assert trace.header.thumbnails == store.ThumbnailFacts(side=128, entry="pixel_values", low=-1, high=1)
    for row, sample in enumerate(trace.sample.tolist()):
        image = trace.thumbnails.image(row)
        assert image is not None
        assert np.array_equal(np.asarray(image), np.asarray(picture(sample))), sample


def test_on_demand_from_the_saved_lora_is_the_same(made: Path) -> None:
    (made / "saved").mkdir()
    shutil.copy(made / "with" / "out" / "pytorch_lora_weights.safetensors", made / "saved")
    command = [made / "train.py", *COMMAND]
    options = ["--weights", made / "saved", "--out", made / "now.zarr"]
    command_line(["capture", *options, "--", *command], made / "with")
    every = np.arange(COUNT)
    first, again = (
        open_store(p).gradients(every) for p in (made / "with" / "out.trace" / "trace.zarr", made / "now.zarr")
    )
    assert np.linalg.norm(again - first) <= 1e-6 * np.linalg.norm(first)


def test_remembered_encoders_change_no_bit(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = {"vae": 0, "text": 0}

    def counted(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **named: Any) -> Any:
            ran[name] += 1
            return forward(*args, **named)

        return count

    monkeypatch.setattr(Encoder, "forward", counted("vae", Encoder.forward))
    monkeypatch.setattr(CLIPTextModel, "forward", counted("text", CLIPTextModel.forward))
    weights = made / "with" / "out" / "pytorch_lora_weights.safetensors"
    rows = []
    for remembers in (True, False):
        ran.update(vae=0, text=0)
        if not remembers:
            monkeypatch.setattr(frozen, "_is_frozen", lambda module: False)
        out = made / f"remembers-{remembers}.zarr"
        command_line(["capture", "--weights", weights, "--out", out, "--", made / "train.py", *COMMAND], made / "with")
        rows.append(open_store(out).gradients(np.arange(COUNT)))
        # The first sample comes twice more: in two steps that find the timestep's draw, and to be compared.
        assert ran == dict.fromkeys(ran, COUNT + 2 if remembers else COUNT * 3 + 2 + 3)
    assert np.array_equal(*rows)


def test_an_estimate_says_what_a_capture_takes_and_leaves_nothing(made: Path) -> None:
    before = sorted(made.rglob("*"))
    said, _ = command_line(["estimate", "--", made / "train.py", *COMMAND], made / "with")
    assert sorted(made.rglob("*")) == before
    trace = open_store(made / "with" / "out.trace" / "trace.zarr")
    assert f"{COUNT} x 3" in said and f"{trace.header.projection.length:,}" in said
    # All but the texts, the pictures and the metadata.
    files = [f for f in trace.path.rglob("*") if f.is_file() and not {"meta", "thumbnails"} & set(f.parts)]
    assert store.bytes_of(trace.header) == sum(f.stat().st_size for f in files if f.name != "zarr.json")
    assert decimal(store.bytes_of(trace.header)) in said


def test_images_with_their_captions_find_themselves_first(made: Path) -> None:
    (made / "asked").mkdir()
    lines = []
    for n, k in enumerate((5, 2, 6)):
        picture(k).save(made / "asked" / f"a{n}.png")
        lines.append(json.dumps({"image": f"a{n}.png", "prompt": caption(k)}))
    # The last one's caption is another sample's.
    lines.append(json.dumps({"image": "a2.png", "prompt": caption(1)}))
    (made / "asked" / "list.jsonl").write_text("\n".join(lines) + "\n")
    found, said = ask(made, made / "asked" / "list.jsonl", "-k", COUNT)
    assert [ranking[0] for ranking in found[:3]] == [5, 2, 6]
    assert found[3] != found[2]
    assert caption(1) in said


def test_the_examples_of_the_face_for_programs(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(made / "with" / "state"))
    trace = dmin_trace.open_trace(made / "with" / "out.trace" / "trace.zarr")
    assert repr(trace) == f"Trace({COUNT} samples, T=3, v=8,192, float32, complete)"
    queries = trace.query_images([picture(5), made / "images" / "0002.png"], [caption(5), caption(2)])
    assert queries.names == ("image 0", "0002.png") and queries.prompts == (caption(5), caption(2))
    queries.save(tmp_path / "queries.npz")
    queries = dmin_trace.Queries.load(tmp_path / "queries.npz")
    scores = trace.scores(queries)
    assert scores.shape == (2, COUNT)
    np.testing.assert_allclose(trace.scores(queries, per_timestep=True).sum(axis=2), scores, atol=1e-5)
    top = trace.top_k(queries, COUNT)
    assert top.samples[:, 0].tolist() == [5, 2] and top.per_timestep.shape == (2, COUNT, 3)
    assert [hit.columns["text"] for hit in top.hits[0]] == [caption(sample) for sample in top.samples[0]]
    assert trace.top_k(queries, COUNT, largest=False).samples[:, -1].tolist() == [5, 2]
    assert top.to_pandas()["prompt"][0] == caption(5)
    gradients = trace.gradients([3, 5])
    assert gradients.shape == (2, 3, 8192)
    assert np.linalg.norm(gradients[1] - queries.gradients[0]) <= 1e-5 * np.linalg.norm(gradients[1])
    assert trace.self_influence().shape == (COUNT,)
    assert trace.columns["text"] == [caption(k) for k in range(COUNT)]
    hits = dmin_trace.attribute(trace, [picture(5)], [caption(5)], k=3)
    assert [hit.sample for hit in hits[0]] == top.samples[0, :3].tolist()


def test_a_query_for_a_concept_is_the_difference_of_two_gradients(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, hits = made / "with" / "out.trace" / "trace.zarr", tmp_path / "hits.json"
    images = [made / "images" / f"{k:04d}.png" for k in (5, 2)]
    command = ["query", "--score", "dmin", path, *images, "--prompt", caption(5), "--prompt", caption(2)]
    said, _ = command_line([*command, "--concept", "square", "--concept", "2", "--json", hits], made / "with")
    assert "for what the prompt has beyond '5'" in said and "for what the prompt has beyond 'cross'" in said
    found = json.loads(hits.read_text())["queries"]
    assert [(query["prompt"], query["without"]) for query in found] == [("square 5", "5"), ("cross 2", "cross")]
    monkeypatch.setenv("XDG_STATE_HOME", str(made / "with" / "state"))
    trace = dmin_trace.open_trace(path)
    prompts, without = [caption(5), caption(2), caption(2)], ["5", None, "cross"]
    queries = trace.query_images([picture(5), picture(2), picture(2)], prompts, without=without)
    assert queries.without == ("5", None, "cross")
    header = trace.store.header
    plan = make_plan(header.projection.length, header.dimension, header.projection.seed, "uniform")
    for row, sample, rest in ((0, 5, "5"), (2, 2, "cross")):
        pairs = zip(
            reference(made, sample, [100, 500, 900]), reference(made, sample, [100, 500, 900], rest), strict=True
        )
        for slot, (with_it, less) in enumerate(pairs):
            expected, _ = compress_gradient([with_it[name] - less[name] for name in with_it], plan)
            assert torch.linalg.norm(torch.from_numpy(queries.gradients[row, slot]) - expected) < 1e-2
    top = trace.top_k(queries, COUNT, "dmin")
    for of_command, row in zip(found, (0, 2), strict=True):
        assert [hit["sample"] for hit in of_command["hits"]] == top.samples[row].tolist()
    whole = trace.query_images([picture(2)], [caption(2)]).gradients[0]
    assert np.linalg.norm(queries.gradients[1] - whole) <= 1e-6 * np.linalg.norm(whole)


def test_a_query_with_prompts_is_asked_again_without_the_script(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(made / "with" / "state"))
    trace, seen = dmin_trace.open_trace(made / "with" / "out.trace" / "trace.zarr"), list[str]()
    prompts, without = [caption(5), caption(2), caption(2)], ["5", None, "cross"]
    asked = trace.query_images([picture(5), picture(2), picture(2)], prompts, without=without, progress=seen.append)
    assert "Gradients 3 of 3" in seen
    seen.clear()
    again = trace.query_images([picture(2), picture(5)], prompts[1::-1], without=[None, "5"], progress=seen.append)
    assert seen == ["Checking the queries"]
    assert again.gradients.tobytes() == asked.gradients[[1, 0]].tobytes()
    # Compiled code reads the frozen models, in folders whose configurations python reads.
    path = next((made / "sd" / "vae").glob("*.safetensors"))
    before = path.read_bytes()
    values = load_file(path)
    name = next(name for name in values if name.startswith("encoder"))
    save_file(values | {name: values[name] + 1e-3}, path)
    with pytest.raises(dmin_trace.DminTraceError, match="that do not train are not the same"):
        trace.query_images([picture(2)], [caption(2)])
    path.write_bytes(before)


def test_a_concept_that_makes_no_difference_is_refused(made: Path) -> None:
    image = made / "images" / "0001.png"
    for options, message in (
        (("--prompt", "square 1", "--without", "SQUARE 1"), "The two prompts make no difference"),
        (("--prompt", "square 1", "--without", "square  1"), "The two prompts of 0001.png are the same"),
        (("--prompt", "square 1", "--concept", "disc"), "does not have the concept 'disc'"),
        (("--concept", "disc"), "0001.png has no prompt"),
    ):
        _, said = ask(made, image, *options, code=1)
        assert message in " ".join(said.split())
    _, said = ask(made, "--prompt", "square 1", "--concept", "disc", code=1)
    assert "does not have the concept 'disc'" in said


def test_a_prompt_is_asked_for(made: Path) -> None:
    _, said = ask(made, made / "images" / "0001.png", code=1)
    assert "0001.png came without its prompt" in said and "--prompt" in said
    _, said = ask(made, made / "images", "--prompt", "a", "--prompt", "b", code=1)
    assert f"{COUNT} images were given and 2 prompts" in said


def test_a_prompt_alone_makes_an_image(made: Path) -> None:
    found, said = ask(made, "--prompt", caption(3), "--num", "2", "--seed", "7", "-k", "2")
    assert len(found) == 2
    folder = made / "with" / "out.trace" / "generated"
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["stripes-3-7.png", "stripes-3-8.png"]
    pixels = [np.asarray(Image.open(file)).astype(int) for file in files]
    assert pixels[0].shape == (32, 32, 3) and not np.array_equal(*pixels)
    assert "stripes-3-8.png" in said
    pipeline = StableDiffusionPipeline.from_pretrained(made / "sd", safety_checker=None)
    pipeline.load_lora_weights(made / "with" / "out")
    pipeline.set_progress_bar_config(disable=True)
    again = pipeline(caption(3), height=32, width=32, generator=torch.Generator().manual_seed(7)).images[0]
    assert abs(np.asarray(again).astype(int) - pixels[0]).max() <= 1
