"""Join the processes that a launcher started into one process group."""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

from diffengine_sdxl.errors import UserError, first_line, whole_number


class Variables(NamedTuple):
    """The environment variables of a launcher, and the command that sets them."""

    rank: str
    world_size: str
    local_rank: str
    local_world_size: str  # optional
    command: str


LAUNCHERS = {
    'pytorch': Variables('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE',
                         'torchrun, or mim train --launcher pytorch'),
    'slurm': Variables('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_TASKS_PER_NODE', 'srun'),
    'mpi': Variables('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK',
                     'OMPI_COMM_WORLD_LOCAL_SIZE', 'mpirun')}


def start_processes(launcher: str, dist_cfg: Mapping[str, Any] | None = None) -> None:
    """Join the process group of `launcher`, with NCCL on GPUs and gloo without.

    Args:
        launcher: 'none' or one of LAUNCHERS.
        dist_cfg: `backend`, and `timeout` in seconds; two hours by default, as the other processes wait while the
            first one makes sample images or writes an export.

    Raises:
        UserError: there are more processes than GPUs, the launcher's variables are missing, or the group cannot be
            joined.
    """
    import torch
    import torch.distributed as dist
    if dist.is_initialized():
        return
    if launcher == 'none':
        _refuse_several()
        return
    rank, world_size, local_rank, local_world_size = _ranks(launcher)
    if torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        if num_gpus == 1 and launcher != 'pytorch':
            local_rank = 0  # slurm and mpi may show each process one GPU of its own
        if local_rank >= num_gpus:
            raise UserError(f'Process {local_rank} of this machine has no GPU: there are {num_gpus}. Start at most '
                            f'{num_gpus} processes here (--gpus).')
        torch.cuda.set_device(local_rank)
    elif local_world_size > (num_cores := os.cpu_count() or 1):
        raise UserError(f'{local_world_size} processes were started, but this machine has no GPU and {num_cores} '
                        f'cores. Start at most {num_cores} (--gpus).')
    if local_world_size < world_size and 'MASTER_ADDR' not in os.environ:
        raise UserError(f'--launcher {launcher}: {world_size} processes on several machines, but MASTER_ADDR is not '
                        'set; it is the address of the machine of process 0.')
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    os.environ.setdefault('MASTER_ADDR', '127.0.0.1')
    # Two jobs on one node need different ports.
    job = int(os.environ['SLURM_JOB_ID']) if os.environ.get('SLURM_JOB_ID', '').isdecimal() else 0
    os.environ.setdefault('MASTER_PORT', str(29500 + job % 1000))
    settings = dict(dist_cfg or {})
    backend = settings.get('backend') or ('nccl' if torch.cuda.is_available() else 'gloo')
    timeout = timedelta(seconds=whole_number('env_cfg.dist_cfg.timeout', settings.get('timeout', 7200), 1))
    try:
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError, AssertionError) as error:  # AssertionError: an unknown backend
        raise UserError(f"--launcher {launcher}: process {rank} of {world_size} cannot join the group at "
                        f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} with backend '{backend}': "
                        f'{first_line(error)}') from error
    # Else the group's threads end with the interpreter, which now and then aborts a process that has done its work.
    atexit.register(leave_processes)


def leave_processes() -> None:
    """Leave the process group, if there is one."""
    import torch.distributed as dist
    if dist.is_initialized():
        dist.destroy_process_group()


def _refuse_several() -> None:
    """Refuse several processes that do not know of each other: each would do all of the work, in the same folder.

    Raises:
        UserError: a launcher's variables tell of several.
    """
    for launcher, variable in (('pytorch', 'WORLD_SIZE'), ('mpi', 'OMPI_COMM_WORLD_SIZE'),
                               ('slurm', 'SLURM_STEP_NUM_TASKS')):
        number = os.environ.get(variable, '')
        if number.isdecimal() and int(number) > 1:
            raise UserError(f'{number} processes were started ({variable}), but each would work alone: add --launcher '
                            f'{launcher}.')


def _ranks(launcher: str) -> tuple[int, int, int, int]:
    """Return rank, world size, rank on this machine and number of processes on this machine."""
    variables = LAUNCHERS[launcher]
    nodes = os.environ.get('SLURM_NODELIST') or os.environ.get('SLURM_JOB_NODELIST')
    if launcher == 'slurm' and nodes:
        os.environ.setdefault('MASTER_ADDR', _first_host(nodes))
    rank, world_size, local_rank = (_read_number(launcher, name) for name in variables[:3])
    # Slurm writes '4(x2)' for four on each of two machines.
    local_size = re.match(r'\d+', os.environ.get(variables.local_world_size, ''))
    return rank, world_size, local_rank, int(local_size[0]) if local_size else world_size


def _read_number(launcher: str, variable: str) -> int:
    if variable not in os.environ:
        raise UserError(f"--launcher {launcher}: '{variable}' is not set. Start the processes with "
                        f'{LAUNCHERS[launcher].command}.')
    if not os.environ[variable].isdecimal():
        raise UserError(f"--launcher {launcher}: {variable}='{os.environ[variable]}' is not a number.")
    return int(os.environ[variable])


def _first_host(nodes: str) -> str:
    """Return 'node03' of 'node[03-05,9],other'."""
    head, bracket, rest = nodes.partition('[')
    if not bracket or ',' in head:
        return nodes.split(',')[0]
    return head + rest.split(']')[0].split(',')[0].split('-')[0]
