"""Ranks come from a launcher's environment variables; missing ones and too many processes are reported."""

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import command

from diffengine_sdxl.commands import launch
from diffengine_sdxl.commands.common import load_config
from diffengine_sdxl.errors import UserError

SLURM = {'SLURM_PROCID': '3', 'SLURM_NTASKS': '4', 'SLURM_LOCALID': '1', 'SLURM_NODELIST': 'node[07-09,12],other'}
MPI = {'OMPI_COMM_WORLD_RANK': '1', 'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_LOCAL_RANK': '1'}


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove launchers' variables, and restore them afterwards."""
    for name in [n for n in os.environ if n.startswith(('SLURM_', 'OMPI_', 'MASTER_', 'LOCAL_'))]:
        monkeypatch.delenv(name)
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, '')
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def joined(clean: pytest.MonkeyPatch) -> dict[str, Any]:
    """Record the arguments of the process group, on a machine of four cores without a GPU."""
    arguments: dict[str, Any] = {}
    clean.setattr(torch.distributed, 'init_process_group', lambda backend, **kwargs: arguments.update(
        kwargs, backend=backend, env={k: os.environ.get(k) for k in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR',
                                                                     'MASTER_PORT')}))
    clean.setattr(torch.cuda, 'is_available', lambda: False)
    clean.setattr(os, 'cpu_count', lambda: 4)
    return arguments


@pytest.mark.parametrize(('launcher', 'env', 'expected'), [
    ('pytorch', {'RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_RANK': '1', 'LOCAL_WORLD_SIZE': '2', 'MASTER_ADDR': 'me',
                 'MASTER_PORT': '1234'}, (1, 2, 1, 'me', '1234')),
    ('slurm', SLURM, (3, 4, 1, 'node07', '29500')),
    ('slurm', {**SLURM, 'MASTER_ADDR': 'boss', 'MASTER_PORT': '7'}, (3, 4, 1, 'boss', '7')),
    ('slurm', {k: v for k, v in SLURM.items() if k != 'SLURM_NODELIST'} | {'SLURM_JOB_NODELIST': 'a5'},
     (3, 4, 1, 'a5', '29500')),
    ('mpi', MPI, (1, 2, 1, '127.0.0.1', '29500')),
])
def test_ranks_come_from_the_launcher(launcher: str, env: dict[str, str], expected: tuple[Any, ...],
                                      joined: dict[str, Any], clean: pytest.MonkeyPatch) -> None:
    for key, value in env.items():
        clean.setenv(key, value)
    launch.start_processes(launcher)
    rank, world, local, address, port = expected
    assert joined['backend'] == 'gloo' and (joined['rank'], joined['world_size']) == (rank, world)
    assert joined['env'] == {'RANK': str(rank), 'WORLD_SIZE': str(world), 'LOCAL_RANK': str(local),
                             'MASTER_ADDR': address, 'MASTER_PORT': port}


def test_none_joins_nothing(joined: dict[str, Any]) -> None:
    launch.start_processes('none')
    assert not joined


@pytest.mark.parametrize(('nodes', 'first'), [
    ('node1', 'node1'), ('a,b', 'a'), ('node[03-05,9],other', 'node03'), ('n[1,3]', 'n1'), ('a,n[1-2]', 'a'),
    ('rack2-n[10-12]', 'rack2-n10')])
def test_the_first_host(nodes: str, first: str) -> None:
    assert launch._first_host(nodes) == first


@pytest.mark.parametrize(('launcher', 'env', 'words'), [
    ('pytorch', {}, "'RANK' is not set. Start the processes with torchrun"),
    ('pytorch', {'RANK': '0', 'WORLD_SIZE': '2'}, "'LOCAL_RANK' is not set"),
    ('slurm', {}, "'SLURM_PROCID' is not set. Start the processes with srun"),
    ('slurm', {**{k: v for k, v in SLURM.items() if k != 'SLURM_NODELIST'}, 'SLURM_TASKS_PER_NODE': '2'},
     'MASTER_ADDR is not set'),
    ('mpi', {}, "'OMPI_COMM_WORLD_RANK' is not set. Start the processes with mpirun"),
    ('mpi', {**MPI, 'OMPI_COMM_WORLD_RANK': 'one'}, "OMPI_COMM_WORLD_RANK='one'"),
    ('mpi', {**MPI, 'OMPI_COMM_WORLD_SIZE': '8', 'OMPI_COMM_WORLD_LOCAL_SIZE': '4'}, 'MASTER_ADDR'),
])
def test_missing_and_invalid_variables_are_named(launcher: str, env: dict[str, str], words: str, joined: dict[str, Any],
                                          clean: pytest.MonkeyPatch) -> None:
    for key, value in env.items():
        clean.setenv(key, value)
    with pytest.raises(UserError, match=words):
        launch.start_processes(launcher)
    assert not joined


@pytest.mark.parametrize(('launcher', 'env'), [
    ('pytorch', {'RANK': '0', 'WORLD_SIZE': '5', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '5'}),
    ('pytorch', {'RANK': '0', 'WORLD_SIZE': '5', 'LOCAL_RANK': '0'}),
    ('mpi', {**MPI, 'OMPI_COMM_WORLD_SIZE': '5', 'OMPI_COMM_WORLD_LOCAL_SIZE': '5'}),
    ('slurm', {**SLURM, 'SLURM_NTASKS': '5', 'SLURM_TASKS_PER_NODE': '5'}),
])
def test_more_processes_than_cores(launcher: str, env: dict[str, str], joined: dict[str, Any],
                                   clean: pytest.MonkeyPatch) -> None:
    """Every process raises, so that none waits for the others."""
    for key, value in env.items():
        clean.setenv(key, value)
    with pytest.raises(UserError, match='5 processes were started.* no GPU and 4 cores. Start at most 4'):
        launch.start_processes(launcher)


def test_cores_are_counted_on_each_machine(joined: dict[str, Any], clean: pytest.MonkeyPatch) -> None:
    """Two machines of four cores take eight processes."""
    for key, value in {**SLURM, 'SLURM_NTASKS': '8', 'SLURM_TASKS_PER_NODE': '4(x2)'}.items():
        clean.setenv(key, value)
    launch.start_processes('slurm')
    assert joined['world_size'] == 8


def test_more_processes_than_gpus(joined: dict[str, Any], clean: pytest.MonkeyPatch) -> None:
    clean.setattr(torch.cuda, 'is_available', lambda: True)
    clean.setattr(torch.cuda, 'device_count', lambda: 2)
    for key, value in {'RANK': '0', 'WORLD_SIZE': '3', 'LOCAL_RANK': '2'}.items():
        clean.setenv(key, value)
    with pytest.raises(UserError, match='Process 2 of this machine has no GPU: there are 2. Start at most 2'):
        launch.start_processes('pytorch')
    assert not joined


@pytest.mark.parametrize(('dist_cfg', 'words'), [
    (dict(timeout='2h'), "env_cfg.dist_cfg.timeout='2h' must be a whole number"),
    (dict(backend='glo'), "process 0 of 1 cannot join the group at 127.0.0.1:29500 with backend 'glo': ")])
def test_an_invalid_dist_cfg(dist_cfg: dict[str, Any], words: str, clean: pytest.MonkeyPatch) -> None:
    """Refused by name; and a job id that is not a number does not matter."""
    clean.setattr(torch.cuda, 'is_available', lambda: False)
    for key, value in {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0', 'SLURM_JOB_ID': 'x'}.items():
        clean.setenv(key, value)
    with pytest.raises(UserError, match=words):
        launch.start_processes('pytorch', dist_cfg)


@pytest.mark.parametrize(('variable', 'launcher'), [
    ('WORLD_SIZE', 'pytorch'), ('OMPI_COMM_WORLD_SIZE', 'mpi'), ('SLURM_STEP_NUM_TASKS', 'slurm')])
def test_several_processes_without_a_launcher_are_refused(variable: str, launcher: str,
                                                          clean: pytest.MonkeyPatch) -> None:
    """Each would train alone, in the same folder."""
    clean.setenv(variable, '1')
    launch.start_processes('none')
    clean.setenv(variable, '2')
    with pytest.raises(UserError, match=f'2 processes were started .{variable}.*add --launcher {launcher}'):
        launch.start_processes('none')


def test_the_command_line_becomes_a_config(tmp_path: Path, tiny: dict[str, Any]) -> None:
    def parsed(**changes: Any) -> Any:
        options = dict(config='tiny_t2i_adapter.py', work_dir=None, resume=None, launcher='none', cfg_options=None)
        return load_config(argparse.Namespace(**{**options, **changes}))
    assert parsed().work_dir == str(Path('work_dirs') / 'tiny_t2i_adapter') and not parsed().resume
    cfg = parsed(work_dir=str(tmp_path), resume='auto', launcher='pytorch', cfg_options=['resolution=32'])
    assert (cfg.work_dir, cfg.resume, cfg.launcher, cfg.resolution) == (str(tmp_path), True, 'pytorch', 32)
    assert parsed(resume='a/step2.pth').resume == 'a/step2.pth'
    assert parsed(cfg_options=['work_dir=there']).work_dir == 'there'


def test_ctrl_c_says_how_to_resume(tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
                                  capfd: pytest.CaptureFixture[str]) -> None:
    from runs import Die

    def interrupt(self: Die, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt
    from diffengine_sdxl.engine.hooks.curves import CurvesHook
    monkeypatch.setattr(CurvesHook, 'after_train_iter', interrupt)
    assert command(tmp_path, tiny) == 130
    assert '--resume' in capfd.readouterr().err
