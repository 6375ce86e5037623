"""Two ranks on this machine."""

import os
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress

# What two ranks are forked with, loaded once for all tests of a worker: loading takes longer than their work.
_LOADED = ("torch._dynamo", "torch.distributed.fsdp", "transformers.models.auto", "accelerate")


def free_port(among: Iterable[int] = (0,)) -> int:
    """A port that nobody listens on, the first `among` these."""
    for port in among:
        with socket.socket() as found, suppress(OSError):
            found.bind(("localhost", port))
            return found.getsockname()[1]
    raise AssertionError("no free port")


def on_two_ranks(function: Callable[..., None], *args: object) -> None:
    """`function(rank, *args)` in two processes of a job at once, each forked from one that has done nothing.
    Raises what one of them raises."""
    import multiprocessing

    import torch

    port = free_port()
    multiprocessing.set_forkserver_preload([*_LOADED])
    torch.multiprocessing.start_processes(_rank, (port, function, args), nprocs=2, start_method="forkserver")


def _rank(rank: int, port: int, function: Callable[..., None], args: tuple[object, ...]) -> None:
    import torch

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    function(rank, *args)
    torch.distributed.destroy_process_group()
