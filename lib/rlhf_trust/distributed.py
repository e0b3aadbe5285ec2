"""Several processes in one training, each with a share of every step's examples.

:func:`launched` starts them through ``accelerate launch``. In each the training is the same code:
:func:`share` and :func:`shared` say what is this process's part, :func:`gathered` and
:func:`add_up` bring the parts together, and all processes come to the same numbers. In a process
alone each of these hands back what it is given.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from torch import Tensor, distributed

from . import StudyError, artifacts, require


def size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def writes() -> bool:
    """Is this the one process that writes files?"""
    return size() == 1 or distributed.get_rank() == 0


def share(items: Sequence) -> Sequence:
    """This process's part of the items: neighbours, and as many in every process if the processes
    divide their number."""
    if size() == 1:
        return items
    start, end = (len(items) * (distributed.get_rank() + i) // size() for i in (0, 1))
    return items[start:end]


def gathered(value: Any) -> list:
    """The value that each process has, in their order; no process goes on before all are here."""
    values = [value] * size()
    if size() > 1:
        distributed.all_gather_object(values, value)
    return values


def shared(function: Callable[[Sequence], Iterable], items: Sequence) -> list:
    """``function(items)``, a value for each of them, of which every process computes its part."""
    return [value for part in gathered(list(function(share(items)))) for value in part]


def add_up(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, in place."""
    if size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def add_up_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """The same of gradients; a process that had no examples has none of its own."""
    if size() > 1:
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        whole = add_up(torch.cat([gradient.flatten() for gradient in own]))
        for parameter, part in zip(parameters, whole.split([p.numel() for p in parameters])):
            parameter.grad = part.view_as(parameter)


def launched(
    function: Callable, *arguments: Any, processes: int, options: Sequence[str] = (), **more: Any
) -> Any:
    """``function(*arguments, **more)``, called in several processes that are started for it.

    Parameters
    ----------
    function
        One that can be imported. Of what it writes and returns there is one, not one a process.
    arguments
        Are pickled (a ``models.Base`` as its source, from which each process loads it).
    processes
        Each has a GPU of its own where there are any; else they are on the CPU.
    options
        Of ``accelerate launch``, such as those of FSDP; by default plain data parallelism.

    Raises
    ------
    StudyError
        What one of the processes raised, or the last line that they said.
    """
    gpus, what = torch.cuda.device_count(), f"{function.__name__} in {processes} processes"
    require(not gpus or processes <= gpus, f"{what}: there are {gpus} GPUs; lower processes")
    try:
        job = pickle.dumps((function, arguments, more))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise StudyError(f"{what}: {error}; set processes to 1") from None
    with tempfile.TemporaryDirectory() as made, Path(made, "log").open("w+b") as log:
        Path(made, "job").write_bytes(job)
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *(options or ["--multi_gpu"]),  # its name on CPUs as well
            f"--num_processes={processes}",
            f"--num_cpu_threads_per_process={max(1, torch.get_num_threads() // processes)}",
            # Else accelerate takes them from the user's own configuration.
            *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"),
            "--main_process_port=0",  # any free one
            *("-m", __name__, made, str(os.getpid())),
        ]
        started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            started.wait()
        finally:  # after Ctrl-C, too; the processes end with their launcher
            started.terminate()
            started.wait()
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
        with suppress(FileNotFoundError):
            lines.append(Path(made, "error").read_text(encoding="utf-8"))
        said = [line.strip() for line in lines if line.strip(" =-")]  # no rules
        done = not started.returncode and Path(made, "result").exists()
        require(done, f"{what}: {said[-1] if said else 'ended early'}")
        result, written, read = pickle.loads(Path(made, "result").read_bytes())
    artifacts.WRITTEN.update(written)
    artifacts.READ.update(read)
    return result


def _end_with(parent: int) -> None:
    """End this process as soon as its launcher is gone, or the process that asked for it."""
    launcher = os.getppid()
    while os.getppid() == launcher and psutil.pid_exists(parent):
        time.sleep(1)
    os._exit(1)


def main(folder: Path, parent: int) -> None:
    """One of the processes."""
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    state = PartialState(cpu=not torch.cuda.is_available())
    if not writes():
        os.environ.pop("RLHF_TRUST_PROGRESS", None)
    try:
        function, arguments, more = pickle.loads((folder / "job").read_bytes())
        result = function(*arguments, **more)
    except Exception as error:
        said = error if isinstance(error, StudyError) else f"{type(error).__name__}: {error}"
        # Of the first that fails: the others then miss it.
        with suppress(FileExistsError), (folder / "error").open("x", encoding="utf-8") as file:
            file.write(str(said))
        raise
    if writes():
        records = artifacts.WRITTEN, artifacts.READ
        (folder / "result").write_bytes(pickle.dumps((result, *records)))
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
