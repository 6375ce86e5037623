"""Rank and world size from the launcher's environment variables, and switches such as LPSPARSE_QUIET.

Imports nothing heavy: `--help` needs it.
"""

import os
import re
from collections.abc import Generator
from contextlib import contextmanager

from lpsparse.errors import UsageError

WORDS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("", "0", "false", "no", "off"), False),
}

# Rank, world size and local rank in the variables of MPICH's and Intel's mpirun, and of Open MPI's.
_MPI = (
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


def set_torch_names() -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK, as torchrun does, in a process that srun or mpirun started
    (`accelerate launch --cpu` calls mpirun). A SLURM batch script with tasks is not a step of several."""
    given = os.environ.get
    if "RANK" in os.environ:
        return
    for rank, count, local in _MPI:
        if rank in os.environ and int(given(count, 1)) > 1:
            os.environ |= {"RANK": given(rank, ""), "WORLD_SIZE": given(count, "")}
            os.environ["LOCAL_RANK"] = given(local, "0")
            os.environ.setdefault("MASTER_ADDR", "localhost")
            os.environ.setdefault("MASTER_PORT", "29500")
            return
    if "SLURM_PROCID" not in os.environ or int(given("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return
    first = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", given("SLURM_STEP_NODELIST", "localhost")).partition(",")[0]
    port = 15000 + int(given("SLURM_JOB_ID", 0)) % 10000 + int(given("SLURM_STEP_ID", 0)) % 1000
    os.environ |= {"RANK": given("SLURM_PROCID", ""), "WORLD_SIZE": given("SLURM_STEP_NUM_TASKS", "")}
    os.environ["LOCAL_RANK"] = given("SLURM_LOCALID", "0")
    os.environ.setdefault("MASTER_ADDR", first)
    os.environ.setdefault("MASTER_PORT", str(port))


def is_launched() -> bool:
    """Whether a launcher (torchrun, accelerate, our own) started this process, even as the only one."""
    return "RANK" in os.environ


def is_rank_0() -> bool:
    """Whether this is rank 0 of a job, or its only process. Other ranks print nothing."""
    return os.environ.get("RANK", "0") == "0"


def has_other_ranks() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """Rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def switched_on(name: str) -> bool:
    """Whether a variable of yes or no says yes. Raises UsageError for another word."""
    value = os.environ.get(name, "")
    if value.lower() not in WORDS:
        raise UsageError(201, f"{name} {value!r}: must be 1 or 0", hint=f"{name}=1, or unset it")
    return WORDS[value.lower()]


@contextmanager
def together() -> Generator[None]:
    """Share the work of prune, pack, unpack, verify and report inside among all ranks of a launched job
    (torchrun, accelerate, srun), which all enter here and see one file system. A single process is
    unaffected. Raises ResourceError when a rank is gone.
    """
    set_torch_names()
    if not has_other_ranks():
        yield
        return
    from lpsparse.parallel import ranks  # and torch with it

    with ranks.together():
        yield
