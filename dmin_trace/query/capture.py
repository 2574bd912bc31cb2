"""Images and prompts in, query gradients out: checks what a query must have, takes what is known from before from the
cache, and runs the traced script on the rest (`script_runs`)."""

import logging
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from dmin_trace.capture.host import Host, script_host
from dmin_trace.command import Command, recall, script_of
from dmin_trace.errors import QueryError, WeightsError, brief
from dmin_trace.query.file_marks import weight_marks
from dmin_trace.query.gradient_cache import GradientCache
from dmin_trace.query.inputs import ImageInput, QueryInput, image_file
from dmin_trace.query.query_key import query_key, run_key
from dmin_trace.query.script_runs import ScriptQuery, ScriptRuns
from dmin_trace.query.stages import Stages
from dmin_trace.start import given_command, with_full_names
from dmin_trace.store import Queries, Store, check_script, weights_beside

logger = logging.getLogger(__name__)
CHECKING = "Checking the queries"


def capture_queries(
    store: Store,
    images: Sequence[ImageInput],
    prompts: Sequence[str | None] | None = None,
    conditioning: Sequence[ImageInput | None] | None = None,
    weights: str | os.PathLike[str] | None = None,
    command: Sequence[str] | None = None,
    edited_script: bool = False,
    any_device: bool = False,
    without: Sequence[str | None] | None = None,
    cache: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Queries:
    """The projected gradients of images. Arguments and errors are those of `Trace.query_images`."""
    stages = Stages(progress)
    stages.begin(CHECKING)
    if not images:
        raise QueryError("No image was given. Give at least one.")
    prompts = [None] * len(images) if prompts is None else list(prompts)
    sources = [None] * len(images) if conditioning is None else list(conditioning)
    lacking = [None] * len(images) if without is None else list(without)
    every = (prompts, "prompts"), (sources, "conditioning images"), (lacking, "prompts without a concept")
    for given, what in every:
        if len(given) != len(images):
            raise QueryError(f"{len(images)} images were given and {len(given)} {what}. Give one for each image.")
    names = tuple(f"image {n}" if isinstance(one, Image.Image) else Path(one).name for n, one in enumerate(images))
    run = traced_command(store, command)
    # Nothing is known of a script that is missing; running it says so.
    script = script_of(run.script)
    if not edited_script:
        same = "if its loss and its data are the same"
        advice = f"Query with the script as it was; or, {same}, with --edited-script (edited_script=True)."
        check_script(store.path, store.header, script.name, script.sha256, advice)
    host, batch = script_host(), store.header.batch
    run = _with_data_argument(run)
    remembered = recall(store.header.id) if command else None
    if remembered is not None and remembered.script:
        _check_arguments(host, with_full_names(remembered), run)
    columns = host.query_columns(run.arguments, batch)
    # Its batches held captions, tokens, or embeddings of them.
    with_captions = any(len(shape) < 3 or "prompt" in name for name, shape in batch.items())
    own_prompts = host.words_its_own_prompts(run.arguments)
    with_prompts = not own_prompts and (with_captions or host.takes_prompts(run.arguments))
    for name, prompt, source, lack in zip(names, prompts, sources, lacking, strict=True):
        _check_prompt(name, prompt, with_prompts, own_prompts)
        _check_concept(name, prompt, lack, with_prompts)
        _check_conditioning(name, source, columns.conditioning)
    loaded = Path(weights) if weights is not None else weights_beside(store.path)
    if not loaded.exists():
        raise WeightsError(f"There are no weights at {loaded}. Give those that were traced, with --weights.")
    shape = store.header.gradient_count, store.header.dimension
    gradients = np.zeros((len(images), *shape), np.float32)
    # What a launcher tells the script is not known before it is run.
    kept = GradientCache() if cache and script.sha256 and not run.launcher else None
    keys = [""] * len(images)
    with tempfile.TemporaryDirectory(prefix="dmin-trace-query-") as temporary:
        folder = Path(temporary).resolve()
        videos = host.takes_videos(run.arguments)
        files = [image_file(image, folder / f"given{k}.png", video=videos) for k, image in enumerate(images)]
        source_files = [None if s is None else image_file(s, folder / f"source{k}.png") for k, s in enumerate(sources)]
        queries = list(map(ScriptQuery, names, files, prompts, source_files, lacking))
        missing = list(range(len(queries)))
        if kept is not None:
            shared = run_key(store.header, run, script, weight_marks(loaded), any_device=any_device)
            keys = [query_key(shared, one.image, one.prompt, one.without, one.conditioning) for one in queries]
            known = {k: found for k, key in enumerate(keys) if (found := kept.find(key, shape)) is not None}
            for k, found in known.items():
                gradients[k] = found
            missing = [k for k in missing if k not in known]
            logger.info("%d of %d queries are known from before.", len(known), len(queries))
        runs = ScriptRuns(store, host, columns, run, loaded, any_device, folder, stages)
        for captured in runs.of([queries[k] for k in missing]):
            for number, of_query in zip(captured.queries, captured.gradients, strict=True):
                k = missing[number]
                gradients[k] = of_query
                if kept is not None and captured.files is not None:
                    kept.keep(keys[k], of_query, captured.files)
    stages.end()
    return Queries(gradients, names, tuple(prompts), store.header.id, tuple(lacking))


def generate_images(
    store: Store,
    prompts: Sequence[str],
    folder: Path,
    *,
    num: int = 1,
    seed: int = 0,
    command: Sequence[str] | None = None,
) -> list[QueryInput]:
    """Makes images with the model that the traced run saved, and writes them to files named by prompt and seed.

    Of each prompt `num` images are made; image k has the seed `seed + k`. `command` is as for `Trace.query_images`.
    Raises QueryError if the run saved no model that makes images.
    """
    run = traced_command(store, command)
    if num < 1:
        raise QueryError(f"The number of images is {num}. Give --num 1 or more.")
    wanted = [(prompt, seed + k) for prompt in prompts for k in range(num)]
    try:
        images = script_host().generate(run.arguments, Path(run.folder), wanted)
    except (ValueError, OSError) as error:
        found = f"No image could be made from the prompt: {error}"
        raise QueryError(f"{found} Make it yourself, and give it before --prompt.") from None
    folder.mkdir(parents=True, exist_ok=True)
    inputs = []
    for image, (prompt, image_seed) in zip(images, wanted, strict=True):
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"
        inputs.append(QueryInput(folder / f"{words}-{image_seed}.png", prompt))
        image.save(inputs[-1].image)
    return inputs


def traced_command(store: Store, given: Sequence[str] | None) -> Command:
    """The command that made a trace: the given one, or the one that this machine remembers; never one from the store,
    which may come from anybody. Raises QueryError if the command is not known."""
    if given:
        return with_full_names(given_command(given))
    remembered = recall(store.header.id)
    if remembered is not None and Path(remembered.folder).is_dir():
        return with_full_names(remembered)
    if remembered is None and "accelerate" not in store.header.writers:
        raise QueryError(
            "This trace was recorded by a loop of its own, not by a script's command. Query it in Python with the same "
            "loop: Trace.query_loss(model, items, loss), or dmin_trace.integrations.lightning.attribute for a "
            "Lightning module."
        )
    found = "The command that made this trace is not known on this machine (it is never taken from a store). Give it"
    if remembered is not None:
        found = f"The trace was made in {remembered.folder}, which no longer exists. Give the command"
    raise QueryError(f"{found} after the images: dmin-trace query TRACE IMAGE -- SCRIPT ARGS.")


def _check_arguments(host: Host, traced: Command, given: Command) -> None:
    """Raises QueryError if the command that a user gave may have another loss than the one that made the trace."""
    if (differ := host.loss_difference(traced.arguments, given.arguments)) is not None:
        raise QueryError(
            f"The given command has {differ[1]}, the one that made the trace has {differ[0]}, so its gradients may be "
            "others. Leave out what stands after -- (command=): the command is remembered."
        )


def _check_prompt(name: str, prompt: str | None, with_prompts: bool, own_prompts: bool) -> None:
    """Raises QueryError if a query lacks a prompt that the model needs, or has one that it does not take."""
    if with_prompts and prompt is None:
        found = f"The model was trained with captions, but {name} came without its prompt"
        advice = "Give the prompt of each image with --prompt, an empty one for an image made without."
        raise QueryError(f"{found}. {advice}")
    if own_prompts and prompt is not None:
        found = f"A prompt was given for {name}, but the script makes its prompts itself, with --placeholder_token"
        raise QueryError(f"{found}. Leave --prompt out.")


def _check_concept(name: str, prompt: str | None, without: str | None, with_prompts: bool) -> None:
    """Raises QueryError for a prompt without a concept where there is no prompt to compare it with."""
    if without is None:
        return
    given = f"A prompt without a concept was given for {name}"
    if not with_prompts:
        advice = "Query the whole image: leave out what is without the concept (--concept, --without)."
        raise QueryError(f"{given}, but the model was trained without captions. {advice}")
    if prompt is None:
        raise QueryError(f"{given}, but not its prompt. Give both (--prompt).")
    if prompt.split() == without.split():
        raise QueryError(f"The two prompts of {name} are the same, {brief(prompt)}, so they make no difference.")


def _check_conditioning(name: str, source: ImageInput | None, column: str | None) -> None:
    """Raises QueryError if a conditioning image is missing, or given where the data set has no column of them."""
    if column is not None and source is None:
        found = f"The model makes images from a conditioning image ({column}), but {name} came without the one that it"
        raise QueryError(f"{found} was made from. Give it with --conditioning.")
    if column is None and source is not None:
        found = f"A conditioning image was given for {name}, but the model takes none"
        raise QueryError(f"{found}. Leave --conditioning out.")


def _with_data_argument(command: Command) -> Command:
    """A command that names its data, which a query replaces. Raises QueryError if the script is not known to take any,
    since it would then be captured on its own data."""
    try:
        source = Path(command.script).read_text(encoding="utf-8", errors="replace")
    except OSError:
        # Running it says that it is missing.
        return command
    name = script_host().find_data_argument(command.arguments, source)
    if name is None:
        raise QueryError(
            f"{Path(command.script).name} is not known to take its data from its command line, so it cannot be pointed "
            "at the query. Give the command after the images, with {data} where it names its data: dmin-trace query "
            "TRACE IMAGE -- SCRIPT ARGS --my_data {data}. For a script that takes no data, record its loss: "
            "dmin_trace.recording, and Trace.query_loss."
        )
    if name == "{data}":
        return command
    return msgspec.structs.replace(command, arguments=(*command.arguments, name, ""))
