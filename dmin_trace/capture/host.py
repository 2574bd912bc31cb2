"""What a family of training scripts must tell dmin_trace: `Host`. `script_host` finds the one that is installed.

A package registers an object with these functions as an entry point of the group `dmin_trace.hosts`, as
`dmin_trace.integrations.diffusers` does for the scripts of Hugging Face diffusers. This module imports no torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dmin_trace.errors import ScriptError

if TYPE_CHECKING:
    import torch

ENTRY_POINT_GROUP = "dmin_trace.hosts"


@dataclass(frozen=True)
class QueryColumns:
    """The data set's columns of the image, of its caption, and of the image that it was made from, if there is one."""

    image: str = "image"
    caption: str = "text"
    conditioning: str | None = None


@dataclass(frozen=True)
class QueryRun:
    """One run of the script on queries: its command line, and the queries' numbers in the order of its samples."""

    arguments: tuple[str, ...]
    queries: tuple[int, ...]


class Host(Protocol):
    """What is known of a family of training scripts. `arguments` are always those of the script's command line."""

    def refusal(self, args: Any, variables: Mapping[str, Any]) -> str | None:
        """Why a run cannot be attributed, by its parsed arguments and its loop's variables; None if it can be."""

    def drawn_before_loop(self, args: Any, variables: Mapping[str, Any]) -> str | None:
        """What a run drew once for each sample before its loop, such as flips, for a person to read; None if nothing.

        By its parsed arguments and its loop's variables.
        """

    def forget_drawn(self, script: Path) -> None:
        """Called before a script is run on demand: what an earlier run drew and kept in a cache must not be used."""

    def rows_of_sample(self, args: Any) -> int:
        """How many pictures a sample's batch holds, by the parsed arguments: 2 if a class picture comes with each."""

    def averaged_models(self, values: Iterable[Any]) -> list[Any]:
        """The averages of weights (EMA) among a loop's variables whose weights the script will save."""

    def averaged_weights(
        self, ema: Any, parameters: "Sequence[torch.nn.Parameter]", step_first: bool
    ) -> AbstractContextManager[None]:
        """While entered, the parameters hold the average; afterwards both are as before, bit for bit.

        `ema` is one of `averaged_models`, of exactly these parameters. `step_first`: average the last step in first.
        """

    def parameter_key(self, key: str) -> str:
        """A key of a saved weight file, as the name of a parameter."""

    def query_columns(self, arguments: Sequence[str], entries: Iterable[str]) -> QueryColumns:
        """The columns that the script reads, by its command line and the names of its batches' entries."""

    def find_data_argument(self, arguments: Sequence[str], source: str) -> str | None:
        """The argument that names the data, or "{data}"; by the command line, or else by the text of the script.

        None if the script is not known to take its data from its command line.
        """

    def words_its_own_prompts(self, arguments: Sequence[str]) -> bool:
        """Whether the script makes the captions up itself."""

    def takes_prompts(self, arguments: Sequence[str]) -> bool:
        """Whether the command line names captions or a prompt."""

    def loss_difference(self, traced: Sequence[str], given: Sequence[str]) -> tuple[str, str] | None:
        """The first argument that may change the loss and differs in two command lines, as each has it; None if there
        is none. Arguments of data, of places and of the course of a training do not count."""

    def takes_videos(self, arguments: Sequence[str]) -> bool:
        """Whether the script trains on videos."""

    def on_demand_arguments(self, arguments: Sequence[str]) -> list[str]:
        """The command line for a capture on demand: without what uploads, or what goes on with an earlier run."""

    def prepare_queries(
        self,
        arguments: Sequence[str],
        columns: QueryColumns,
        images: Sequence[Path],
        prompts: Sequence[str | None],
        conditioning: Sequence[Path | None],
        folder: Path,
    ) -> list[QueryRun]:
        """Copies the queries into `folder`, and gives the runs of the script that read them.

        `{data}` in an argument stands for the folder with the images. Raises OSError if a file cannot be copied.
        """

    def generate(self, arguments: Sequence[str], folder: Path, wanted: Sequence[tuple[str, int]]) -> list[Any]:
        """A PIL image of each prompt and seed, made with the model that the run started in `folder` saved.

        Raises ValueError if that run saved no such model, OSError if a file is missing.
        """


def script_host() -> Host:
    """The installed host for training scripts. Raises ScriptError if there is none, or more than one."""
    installed = list(entry_points(group=ENTRY_POINT_GROUP))
    if len(installed) != 1:
        names = ", ".join(entry.name for entry in installed) or "none"
        raise ScriptError(
            f"The installed packages register {names} in the entry point group {ENTRY_POINT_GROUP}; expected one host "
            "for training scripts. Install dmin_trace with pip, and one package of hosts."
        )
    host: Host = installed[0].load()
    return host
