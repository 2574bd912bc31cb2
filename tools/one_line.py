"""Does the one line work in the training scripts of Hugging Face diffusers? Runs them, on tiny models and pictures.

    DIFFUSERS_EXAMPLES=.../diffusers/examples python tools/one_line.py [--only NAME]... [--write docs/scripts.md]

Each script is run as it is, then with `dmin_trace.attach(accelerator, args)` after its Accelerator and nothing else
changed, then on demand with the weights that the first run saved, then by `tools/reference.py` for gradients to compare
with, and is asked about a copy of a training picture.
Needs what the scripts need: torchvision, datasets, peft, transformers, sentencepiece, decord; and av, to make videos.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny_models

from dmin_trace.store import open_store

SETTINGS = {"timesteps": 4, "dimension": 1024, "dtype": "float32", "transform": "none"}
ASKED = 3
"""The sample whose copy is asked about."""

CLOSE = 1e-6
"""How far rows of the same weights may be apart."""

AGREES = 1e-5
"""How far they may be from the reference's, which sums in another order."""

SEEDED = """
import random, runpy, sys
import numpy, torch
random.seed(7); numpy.random.seed(7); torch.manual_seed(7)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script after seeding the generators: some have no --seed."""

PAIRS = ("--train_data_dir", "{data}/pairs")
CAPTIONS = ("--train_data_dir", "{data}/captioned")
CAPTIONED = ("--dataset_name", "{data}/captioned", "--image_column", "image", "--caption_column", "text")
CAPTIONED += ("--instance_prompt", "a digit")
DIGIT = "a handwritten digit"
PLAIN = ("--instance_data_dir", "{data}/plain", "--instance_prompt", DIGIT)
STEPS = ("--train_batch_size", "2", "--max_train_steps", "3", "--learning_rate", "1e-3", "--seed", "7")
STEPS += ("--resolution", "64", "--lr_warmup_steps", "0", "--lr_scheduler", "constant")


@dataclass(frozen=True)
class Script:
    """One upstream script and how to run it.

    path: under the examples folder.
    model: a builder of `tiny_models`.
    arguments: `{data}`, `{model}` and `{out}` stand for folders; `--output_dir` is added.
    weights: what of the output folder to give to `--weights`.
    prompt: the query's; the picture's own caption if it is "own", none if it is empty.
    pair: whether the query also needs the conditioning picture.
    asked: the file of a sample, under the data.
    option: what is particular about the arguments.
    refused: what the capture at the end of the training says where it cannot be.
    demanded: whether it can be captured on demand nevertheless.
    mixed: whether a sample's gradient is of a class picture too, so that its copy need not come first.
    shuffled: whether the script shuffles the samples before it loads them, so that their numbers are not the files'.
    """

    path: str
    model: str
    arguments: tuple[str, ...]
    weights: str = "."
    prompt: str = "own"
    pair: bool = False
    asked: str = "plain/{k:02d}.png"
    option: str = ""
    refused: str = ""
    demanded: bool = False
    mixed: bool = False
    shuffled: bool = False

    @property
    def name(self) -> str:
        """The script's name without its folder, and the option."""
        return " ".join([Path(self.path).stem, self.option]).strip()


def _script(folder: str, name: str, model: str, *arguments: str, **more: object) -> Script:
    given = ("--pretrained_model_name_or_path", "{model}", *STEPS, *arguments)
    return Script(f"{folder}/{name}.py", model, given, **more)  # type: ignore[arg-type]


SCRIPTS = (
    Script(
        "unconditional_image_generation/train_unconditional.py",
        "unconditional",
        ("--train_data_dir", "{data}/plain", "--model_config_name_or_path", "{model}", "--resolution", "16")
        + ("--center_crop", "--train_batch_size", "5", "--gradient_accumulation_steps", "2", "--num_epochs", "2")
        + ("--lr_warmup_steps", "0", "--learning_rate", "1e-3", "--use_ema", "--ddpm_num_inference_steps", "2")
        + ("--eval_batch_size", "1"),
        prompt="",
    ),
    _script("text_to_image", "train_text_to_image", "sd1", *CAPTIONS, "--use_ema"),
    _script("text_to_image", "train_text_to_image_lora", "sd1", *CAPTIONS, "--snr_gamma", "5", "--noise_offset", "0.1"),
    _script("dreambooth", "train_dreambooth_lora_sd3", "sd3", *CAPTIONED),
    _script(
        "controlnet", "train_controlnet", "sd1", *PAIRS, "--conditioning_image_column", "conditioning_image", pair=True
    ),
    _script("text_to_image", "train_text_to_image_sdxl", "sdxl", *CAPTIONS),
    _script("text_to_image", "train_text_to_image_lora_sdxl", "sdxl", *CAPTIONS, "--train_text_encoder"),
    _script("dreambooth", "train_dreambooth", "sd1", *PLAIN, "--train_text_encoder", prompt=DIGIT),
    _script("dreambooth", "train_dreambooth_lora", "sd1", *PLAIN, prompt=DIGIT),
    _script("dreambooth", "train_dreambooth_sd3", "sd3", *CAPTIONED),
    _script("dreambooth", "train_dreambooth_lora_flux", "flux", *CAPTIONED),
    _script(
        "textual_inversion",
        "textual_inversion",
        "sd1",
        *("--train_data_dir", "{data}/plain", "--placeholder_token", "<digit>", "--initializer_token", "a"),
        *("--repeats", "1", "--save_as_full_pipeline"),
        prompt="",
    ),
    _script(
        "instruct_pix2pix",
        "train_instruct_pix2pix",
        "sd1",
        *PAIRS,
        *("--original_image_column", "conditioning_image", "--edited_image_column", "image"),
        *("--edit_prompt_column", "text", "--conditioning_dropout_prob", "0.05"),
        pair=True,
    ),
    _script("dreambooth", "train_dreambooth_lora_sdxl", "sdxl", *CAPTIONED),
    _script("dreambooth", "train_dreambooth_flux", "flux", *CAPTIONED),
    _script("dreambooth", "train_dreambooth_lora_sana", "sana", *CAPTIONED),
    _script(
        "controlnet",
        "train_controlnet_sdxl",
        "sdxl_eighth",
        *PAIRS,
        *("--conditioning_image_column", "conditioning_image"),
        pair=True,
        shuffled=True,
    ),
    _script(
        "controlnet",
        "train_controlnet_sd3",
        "sd3_deep",
        *PAIRS,
        *("--conditioning_image_column", "conditioning_image", "--caption_column", "text", "--image_column", "image"),
        pair=True,
    ),
    _script("dreambooth", "train_dreambooth_lora_qwen_image", "qwen_image", *PLAIN, "--cache_latents", prompt=DIGIT),
    Script(
        "cogvideo/train_cogvideox_lora.py",
        "cogvideox",
        ("--pretrained_model_name_or_path", "{model}", "--instance_data_root", "{data}/videos")
        + ("--caption_column", "prompts.txt", "--video_column", "videos.txt", "--height", "16", "--width", "16")
        + ("--max_num_frames", "9", "--train_batch_size", "2", "--max_train_steps", "3", "--learning_rate", "1e-3")
        + ("--lr_warmup_steps", "0", "--lr_scheduler", "constant", "--rank", "4", "--seed", "7"),
        asked="videos/{k:02d}.mp4",
    ),
    _script(
        "t2i_adapter",
        "train_t2i_adapter_sdxl",
        "sdxl_with_adapter",
        *PAIRS,
        *("--conditioning_image_column", "conditioning_image", "--caption_column", "text", "--image_column", "image"),
        *("--adapter_model_name_or_path", "{model}/t2iadapter"),
        pair=True,
        shuffled=True,
    ),
    _script(
        "amused",
        "train_amused",
        "amused",
        *("--instance_data_dataset", "{data}/captioned", "--image_key", "image", "--prompt_key", "text"),
        # Its default, wandb, must be installed; accelerate passes over another one that is not.
        *("--report_to", "comet_ml"),
    ),
)

PRIOR = (*PLAIN, "--with_prior_preservation", "--class_prompt", "a digit", "--class_data_dir", "{data}/class")
PRIOR += ("--num_class_images", "4", "--prior_loss_weight", "0.5")


def _option(option: str, folder: str, name: str, model: str, *arguments: str, **more: object) -> Script:
    return _script(folder, name, model, *arguments, option=option, **more)


OPTIONS = (
    _option("bf16", "text_to_image", "train_text_to_image_lora", "sd1", *CAPTIONS, "--mixed_precision", "bf16"),
    _option(
        "v-prediction, checkpointing",
        *("text_to_image", "train_text_to_image", "sd1", *CAPTIONS),
        *("--prediction_type", "v_prediction", "--gradient_checkpointing", "--input_perturbation", "0.1"),
    ),
    _option(
        "validation images",
        *("text_to_image", "train_text_to_image_lora", "sd1", *CAPTIONS),
        *("--validation_prompt", "a digit", "--num_validation_images", "1", "--validation_epochs", "1"),
        *("--max_train_steps", "7"),
    ),
    _option(
        "timestep bias",
        *("text_to_image", "train_text_to_image_sdxl", "sdxl", *CAPTIONS, "--timestep_bias_strategy", "later"),
        *("--timestep_bias_multiplier", "2", "--use_ema"),
    ),
    _option("prior preservation", "dreambooth", "train_dreambooth", "sd1", *PRIOR, prompt=DIGIT, mixed=True),
    _option(
        "prior preservation, text encoders",
        # At a batch of two the script itself fails, in its first step.
        *("dreambooth", "train_dreambooth_lora_sd3", "sd3", *PRIOR, "--train_text_encoder", "--train_batch_size", "1"),
        prompt=DIGIT,
        mixed=True,
    ),
    _option(
        "DoRA, dropout, Prodigy",
        *("dreambooth", "train_dreambooth_lora_sdxl", "sdxl", *CAPTIONED, "--use_dora", "--lora_dropout", "0.2"),
        *("--optimizer", "prodigy", "--snr_gamma", "5"),
    ),
    _option("text encoders", "dreambooth", "train_dreambooth_lora_flux", "flux", *CAPTIONED, "--train_text_encoder"),
    _option("8-bit Adam", "text_to_image", "train_text_to_image_lora", "sd1", *CAPTIONS, "--use_8bit_adam"),
    _option(
        "cached latents",
        *("dreambooth", "train_dreambooth_lora_sd3", "sd3", *CAPTIONED, "--cache_latents"),
        refused="by the number of the batch",
    ),
    _option("flips", "text_to_image", "train_text_to_image_lora", "sd1", *CAPTIONS, "--random_flip"),
    _option(
        "flips before the loop",
        *("dreambooth", "train_dreambooth_lora_sd3", "sd3", *CAPTIONED, "--random_flip"),
        refused="once for each sample, before its loop",
        demanded=True,
    ),
    _option(
        "empty captions before the loop",
        *("text_to_image", "train_text_to_image_sdxl", "sdxl", *CAPTIONS, "--proportion_empty_prompts", "0.4"),
        refused="once for each sample, before its loop",
        demanded=True,
    ),
)
"""Options that people use; the scripts' defaults are with the scripts."""


@dataclass
class Outcome:
    """What one script showed; `why` is empty if all of it held."""

    script: Script
    numbers: int = 0
    gradients: str = ""
    undisturbed: str = ""
    on_demand: str = ""
    reference: str = ""
    self_query: str = ""
    seconds: float = 0.0
    why: str = ""
    differences: list[str] = field(default_factory=list)


class Unmet(Exception):  # noqa: N818
    """A check that did not hold."""


def insert_the_line(source: str) -> str:
    """The script with the import and the one line after `accelerator = Accelerator(...)`; nothing else is touched."""
    tree = ast.parse(source)
    made = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and getattr(node.value.func, "id", None) == "Accelerator"
    ]
    if len(made) != 1 or made[0].end_lineno is None:
        raise Unmet(f"the script makes {len(made)} Accelerators")
    settings = ", ".join(f"{name}={value!r}" for name, value in SETTINGS.items())
    lines = source.splitlines()
    lines.insert(made[0].end_lineno, " " * made[0].col_offset + f"dmin_trace.attach(accelerator, args, {settings})")
    first = next(n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) and not _is_future(n))
    lines.insert(first.lineno - 1, "import dmin_trace")
    return "\n".join(lines) + "\n"


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def run(command: Sequence[object], work: Path, log: Path, cache: str) -> None:
    """Runs a Python program without a network. Raises Unmet with its last words if it fails."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        # A cache of its own: with another run's, mapped data are not computed again and other numbers are drawn.
        "HF_HOME": str(work / "cache" / cache),
        "XDG_STATE_HOME": str(work / "state"),
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    with log.open("wb") as out:
        code = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=900,
            check=False,
        ).returncode
    if code != 0:
        words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        # A progress bar that is drawn anew at exit may come after the error.
        told = [line for line in words if not ("%|" in line and "it" in line)] or [f"exit code {code}"]
        raise Unmet(f"{log.stem}: {told[-1]}")


def check(script: Script, examples: Path, work: Path) -> Outcome:
    """Runs one script all four ways."""
    outcome = Outcome(script)
    started = time.perf_counter()
    try:
        for _ in _steps(script, examples, work, outcome):
            outcome.seconds = time.perf_counter() - started
    except Unmet as unmet:
        outcome.why = str(unmet)
    except subprocess.TimeoutExpired:
        outcome.why = "took longer than 15 minutes"
    return outcome


def _steps(script: Script, examples: Path, work: Path, outcome: Outcome) -> Iterator[None]:
    """One check after the other, each noted in the outcome."""
    here = work / script.name.replace(" ", "-")
    here.mkdir(parents=True)
    source = examples / script.path
    model = tiny_models.build(script.model, work / "models" / script.model)
    places = {"{data}": str(work / "data"), "{model}": str(model)}

    def command(out: str) -> list[str]:
        given = list(script.arguments)
        for mark, place in places.items():
            given = [argument.replace(mark, place) for argument in given]
        return [*given, "--output_dir", str(here / out)]

    if not source.is_file():
        raise Unmet(f"there is no {script.path}")
    run(["-c", SEEDED, source, *command("without")], work, here / "without.log", here.name + "-without")
    yield

    attached = here / source.name
    attached.write_text(insert_the_line(source.read_text(encoding="utf-8")), encoding="utf-8")
    run(["-c", SEEDED, attached, *command("with")], work, here / "with.log", here.name + "-with")
    outcome.undisturbed = _same_weights(here / "without", here / "with")
    final = here / "with.trace" / "trace.zarr"
    said = [line for line in (here / "with.log").read_text(errors="replace").splitlines() if "dmin_trace" in line]
    if script.refused:
        if final.exists() or not any(script.refused in line for line in said):
            raise Unmet("the capture was not refused")
        outcome.gradients = "refused"
        if not script.demanded:
            return
    else:
        if not final.exists():
            raise Unmet(f"with: {said[-1] if said else 'no store was written'}")
        trace = open_store(final)
        expected = (tiny_models.SAMPLES, SETTINGS["timesteps"])
        if trace.norm.shape != expected or not trace.complete:
            raise Unmet(f"the store holds {trace.norm.shape}, expected {expected}")
        outcome.numbers = trace.header.projection.length
        outcome.gradients = f"{trace.header.samples} x {len(trace.header.timesteps)}"
    yield

    demanded = here / "demand.zarr"
    settings = [word for name, value in SETTINGS.items() for word in (f"--{name}", value)]
    given = ["-m", "dmin_trace.cli.app", "capture", "--weights", here / "without" / script.weights, *settings]
    run([*given, "--out", demanded, "--", source, *command("demand")], work, here / "demand.log", "demand")
    if script.refused:
        outcome.on_demand = "captured"
    else:
        outcome.on_demand = _apart(_rows(final), _rows(demanded), CLOSE, "the final")
    yield

    longer = [
        *command("reference"),
        *(("--max_train_steps", "1000000") if "--max_train_steps" in script.arguments else ()),
    ]
    if not script.refused:
        expected_rows = here / "reference.npy"
        given = [Path(__file__).parent / "reference.py", final, expected_rows, "--", source, *longer]
        run(given, work, here / "reference.log", "reference")
        outcome.reference = _apart(np.load(expected_rows), _rows(final), AGREES, "the reference's")
        yield

    alone = {"--instance_data_dir", "--placeholder_token"} & set(script.arguments)
    files = list((work / "data" / "plain").iterdir())
    # A folder without captions is read in the order in which the file system lists it.
    at = files.index(work / "data" / "plain" / f"{ASKED:02d}.png") if alone else ASKED
    query = [
        "-m",
        "dmin_trace.cli.app",
        "query",
        "--no-cache",
        "--score",
        "dmin",
        demanded,
        work / "data" / script.asked.format(k=ASKED),
        "-k",
        "3",
    ]
    prompt = tiny_models.caption(ASKED) if script.prompt == "own" else script.prompt
    query += ["--prompt", prompt] if prompt else []
    if script.pair:
        query += ["--conditioning", work / "data" / "pairs" / f"{ASKED:02d}.edges.png"]
    run([*query, "--json", here / "answer.json"], work, here / "query.log", "query")
    hits = json.loads((here / "answer.json").read_text(encoding="utf-8"))["queries"][0]["hits"]
    first, second = hits[0], hits[1]
    outcome.self_query = f"{first['score']:.4f} > {second['score']:.4f}"
    same = first["score"] > SETTINGS["timesteps"] - CLOSE if script.shuffled else first["sample"] == at
    if not same and not script.mixed:
        raise Unmet(f"the copy of sample {at} found sample {first['sample']} first")
    yield


def _same_weights(without: Path, attached: Path) -> str:
    """How many tensors were saved by both runs. Raises Unmet if a bit differs."""
    files = sorted(p.relative_to(without) for p in without.rglob("*.safetensors"))
    count = 0
    for file in files:
        expected, found = load_file(without / file), load_file(attached / file)
        count += len(expected)
        if differ := [n for n in expected if not torch.equal(_bits(expected[n]), _bits(found[n]))]:
            raise Unmet(f"{len(differ)} of {len(expected)} tensors of {file} differ, such as {differ[0]}")
    if not count:
        raise Unmet("the script saved no safetensors file")
    return f"{count} tensors"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _rows(path: Path) -> np.ndarray:
    trace = open_store(path)
    return trace.gradients(np.arange(trace.header.samples))


def _apart(expected: np.ndarray, found: np.ndarray, most: float, whose: str) -> str:
    """The largest difference between rows. Raises Unmet if it is more than rounding."""
    if expected.shape != found.shape:
        raise Unmet(f"{whose} rows are {expected.shape}, those found {found.shape}")
    largest = float(np.abs(expected - found).max())
    if not largest <= most:
        raise Unmet(f"rows differ from {whose} by {largest:.2g}, expected {most:g} at most")
    return f"{largest:.1g}"


def as_table(outcomes: Sequence[Outcome]) -> Table:
    """The outcomes for a terminal."""
    table = Table(title="The one line in diffusers' training scripts")
    for name in HEADINGS:
        table.add_column(name, justify="right" if name in ("trainable numbers", "seconds") else "left")
    for outcome in outcomes:
        table.add_row(*_cells(outcome))
    return table


HEADINGS = (
    "script",
    "trainable numbers",
    "gradients",
    "undisturbed",
    "on demand",
    "reference",
    "copy finds itself",
    "seconds",
    "",
)


def _cells(o: Outcome) -> list[str]:
    numbers = f"{o.numbers:,}" if o.numbers else ""
    result = o.why or "works"
    name = o.script.name
    return [
        name,
        numbers,
        o.gradients,
        o.undisturbed,
        o.on_demand,
        o.reference,
        o.self_query,
        f"{o.seconds:.0f}",
        result,
    ]


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a page."""
    rows = [HEADINGS, ["---"] * len(HEADINGS), *(_cells(outcome) for outcome in outcomes)]
    return PAGE + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n" + REST


PAGE = """# The one line in diffusers' training scripts

Written by `tools/one_line.py`, which runs each script on a tiny random model and ten pictures. In each script,
`dmin_trace.attach(accelerator, args)` stands after the `accelerator = Accelerator(...)` statement; nothing else is
changed.

- *gradients*: captured, samples x timesteps.
- *undisturbed*: the number of saved tensors, all the same bit for bit with and without the line.
- *on demand*: the largest difference between rows captured at the end of the training and rows captured afterwards from
  the saved weights with `dmin-trace capture`; or that it was captured, if the capture at the end is refused.
- *reference*: the largest difference from the rows that `tools/reference.py` computes, which shares no code with the
  loop driver.
- *copy finds itself*: for a query that is a copy of a training picture, the score of that picture and the second best
  score (4 is the largest possible). With prior preservation a sample's gradient includes a class picture, which the
  query does not have: its score is below 4, and need not be the best (with SD3 it was the third).

"""

REST = """
## Not served

- `train_lcm_distill_*_wds`: read a webdataset, whose samples have no index.
- `train_vqgan`, `train_llada2`: not diffusion models with a timestep (a GAN with two losses a step; a masked language
  model).
- `--cache_latents` in the scripts that look latents up by the number of the batch, not of the sample; refused with that
  reason. The newer scripts look them up by the sample's index, and are served (`train_dreambooth_lora_qwen_image`).

## Not run

They have the same shape of loop by reading (`prepare`, `accumulate`, one `backward`, one draw of the timestep):
`train_cosmos_predict25_lora`, `train_cogvideox_image_to_video_lora`, `train_control_cogview4`,
`train_lcm_distill_lora_sdxl`,
`train_controlnet_flux`, `train_custom_diffusion`, `train_control_flux`, `train_control_lora_flux`,
`train_instruct_pix2pix_sdxl`, `textual_inversion_sdxl`, the four of `kandinsky2_2`, the three
of `advanced_diffusion_training`, and of `dreambooth` the LoRA scripts for Flux.2, Flux Kontext, HiDream, Ideogram 4,
Krea 2, Lumina 2 and Z-Image. Nor was a GPU.
"""


def main() -> int:
    """Runs the scripts; the exit code is 1 if one of them did not work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="A script's name without .py; may be repeated.")
    parser.add_argument("--work", type=Path, help="A folder to work in and keep; a temporary one if not given.")
    parser.add_argument("--write", type=Path, help="Also write the table as a Markdown page.")
    given = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    examples = Path(os.environ.get("DIFFUSERS_EXAMPLES", ""))
    if not (examples / "text_to_image").is_dir():
        console.print("Set DIFFUSERS_EXAMPLES to the examples folder of a checkout of huggingface/diffusers.")
        return 2
    unknown = set(given.only or ()) - {script.name for script in (*SCRIPTS, *OPTIONS)}
    if unknown:
        console.print(
            f"No such script here: {', '.join(unknown)}. There are {', '.join(s.name for s in (*SCRIPTS, *OPTIONS))}."
        )
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        work = (given.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        (work / "models").mkdir(exist_ok=True)
        if not (work / "data").exists():
            tiny_models.write_pictures(work / "data")
            tiny_models.write_videos(work / "data" / "videos")
        outcomes = []
        for script in (*SCRIPTS, *OPTIONS):
            if not given.only or script.name in given.only:
                outcome = check(script, examples, work)
                console.print(f"{script.name}: {outcome.why or 'works'} ({outcome.seconds:.0f} s)", soft_wrap=True)
                outcomes.append(outcome)
    console.print(as_table(outcomes))
    if given.write is not None:
        given.write.parent.mkdir(parents=True, exist_ok=True)
        given.write.write_text(as_markdown(outcomes), encoding="utf-8")
    return int(any(outcome.why for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
