"""A loop's own variables, put back after capture batches ran through its body."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dmin_trace.capture.accelerate.loop_variables import LoopVariables


def capturing_loader(batches: int) -> Iterator[int]:
    """Yields `batches` batches, then two that must leave no trace."""
    yield from range(batches)
    variables = LoopVariables()
    yield from (100, 200)
    variables.restore()


def test_restore_gives_a_function_the_variables_of_its_last_own_batch() -> None:
    total, losses, by_name, kept = 0.0, [], {}, set()
    running = torch.zeros(())
    for step, batch in enumerate(capturing_loader(3)):
        loss = batch * 1.5
        total += loss
        losses.append(loss)
        by_name[f"last {batch}"] = step
        kept.add(batch)
        running += loss
    assert (step, batch, loss, total) == (2, 2, 3.0, 4.5)
    assert losses == [0.0, 1.5, 3.0]
    assert by_name == {"last 0": 0, "last 1": 1, "last 2": 2}
    assert kept == {0, 1, 2}
    assert running.item() == 4.5


def test_restore_puts_back_closure_variables() -> None:
    count = 0

    def read() -> int:
        return count

    for batch in capturing_loader(2):
        count += batch
    assert count == read() == 1


def test_undo_of_puts_back_the_state_of_a_scheduler() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in capturing_loader(2):
        optimizer.step()
        scheduler.step()
    assert scheduler.last_epoch == 2


def test_restore_puts_back_module_variables() -> None:
    module: dict[str, object] = {"capturing_loader": capturing_loader, "__name__": "script"}
    exec("total = 0\nfor batch in capturing_loader(3):\n    total += batch\n    last = batch", module)
    assert (module["total"], module["last"], module["batch"]) == (3, 2, 2)


def test_restore_lets_an_outer_loop_over_a_dict_continue() -> None:
    loaders = {"a": 2, "b": 3}
    seen = []
    for name, count in loaders.items():
        for batch in capturing_loader(count):
            last = batch
        seen.append((name, last))
    assert seen == [("a", 1), ("b", 2)]
