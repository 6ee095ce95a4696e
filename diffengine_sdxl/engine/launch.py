"""From the command line to a runner, on one process or many."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

#: A disk that is full or may not be written, or a name that it does not take.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG,
           errno.ENOTDIR, errno.EEXIST)
LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


def start_processes(launcher: str, dist_cfg: Any = None) -> None:
    """Join the process group that `launcher` made. On a machine without a GPU this takes gloo by itself.

    Args:
        launcher: of LAUNCHERS.
        dist_cfg: `backend`, and `timeout` in seconds; two hours by default, as the other processes wait while the
            first one draws pictures or writes an export.

    Raises:
        ValueError: there are more processes than GPUs, or the launcher left no word of the group.
    """
    import torch
    import torch.distributed as dist
    if launcher == 'none' or dist.is_initialized():
        return
    rank, world, local, here = _ranks(launcher)
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if count == 1 and launcher != 'pytorch':
            local = 0  # slurm and mpi may show each process a GPU of its own
        if local >= count:
            raise ValueError(f'Process {local} of this machine has no GPU: there are {count}. Start at most {count} '
                             'processes here (--gpus).')
        torch.cuda.set_device(local)
    else:
        cores = os.cpu_count() or 1
        if here > cores:
            raise ValueError(f'{here} processes were started, but this machine has no GPU and {cores} cores. Start '
                             f'at most {cores} (--gpus).')
    if here < world and 'MASTER_ADDR' not in os.environ:
        raise ValueError(f'--launcher {launcher}: {world} processes on several machines, but MASTER_ADDR is not set; '
                         'it is the address of the machine of process 0.')
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local))
    os.environ.setdefault('MASTER_ADDR', '127.0.0.1')
    # Two jobs on one node must not meet.
    os.environ.setdefault('MASTER_PORT', str(29500 + int(os.environ.get('SLURM_JOB_ID', '0')) % 1000))
    settings = dict(dist_cfg or {})
    backend = settings.get('backend') or ('nccl' if torch.cuda.is_available() else 'gloo')
    dist.init_process_group(backend, rank=rank, world_size=world,
                            timeout=timedelta(seconds=settings.get('timeout', 7200)))


#: Of each launcher: rank, number of processes, rank on this machine; number of processes on this machine, if it says.
VARIABLES = {'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'),
             'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_TASKS_PER_NODE'),
             'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK',
                     'OMPI_COMM_WORLD_LOCAL_SIZE')}
COMMANDS = {'pytorch': 'torchrun, or mim train --launcher pytorch', 'slurm': 'srun', 'mpi': 'mpirun'}


def _ranks(launcher: str) -> tuple[int, int, int, int]:
    """Rank, number of processes, rank on this machine, number of processes on this machine."""
    *needed, number_here = VARIABLES[launcher]
    if launcher == 'slurm':
        nodes = os.environ.get('SLURM_NODELIST') or os.environ.get('SLURM_JOB_NODELIST')
        if nodes and 'MASTER_ADDR' not in os.environ:
            os.environ['MASTER_ADDR'] = _first_host(nodes)
    numbers = []
    for name in needed:
        if name not in os.environ:
            raise ValueError(f"--launcher {launcher}: '{name}' is not set. Start the processes with "
                             f'{COMMANDS[launcher]}.')
        if not os.environ[name].isdigit():
            raise ValueError(f"--launcher {launcher}: {name}='{os.environ[name]}' is no number.")
        numbers.append(int(os.environ[name]))
    # Slurm writes '4(x2)' for four on each of two machines.
    here = re.match(r'\d+', os.environ.get(number_here, ''))
    return numbers[0], numbers[1], numbers[2], int(here[0]) if here else numbers[1]


def _first_host(nodes: str) -> str:
    """'node[03-05,9],other' -> 'node03'."""
    head, bracket, rest = nodes.partition('[')
    if not bracket or ',' in head:
        return nodes.split(',')[0]
    return head + rest.split(']')[0].split(',')[0].split('-')[0]


def _quiet() -> None:
    """Loading takes a moment at these sizes; a bar for each part of the base would bury what matters."""
    import diffusers.utils.logging
    import transformers.utils.logging
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def prepare(args: Any) -> Any:
    """The config that the command line asks for.

    Args:
        args: config, work_dir, launcher, cfg_options and, to train, resume; as the tools parse them.

    Raises:
        ValueError: see engine.config.load.
    """
    from diffengine_sdxl.engine import config
    cfg = config.load(args.config, args.cfg_options or ())
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    if resume := getattr(args, 'resume', None):
        cfg.resume = True if resume == 'auto' else resume
    return cfg


def prepare_training(args: Any) -> Any:
    """As `prepare`.

    Raises:
        ValueError: the config trains nothing; or see `prepare`.
    """
    cfg = prepare(args)
    if cfg.get('train_cfg') is None:
        raise ValueError(f"The config '{args.config}' has no `train_cfg`, so it trains nothing; it may be one to test "
                         'with (mim test).')
    return cfg


def prepare_test(args: Any) -> Any:
    """The config that tests `args.checkpoint` (see `engine.tested.tested`) and trains nothing.

    Args:
        args: config, checkpoint, work_dir, launcher, cfg_options; as tools/test.py parses them.

    Raises:
        ValueError: see engine.config.load and engine.tested.tested.
    """
    from diffengine_sdxl.engine.tested import tested
    return tested(prepare(args), args.checkpoint)


def train(args: Any) -> int:
    """Train as `args` say; the exit code. A user's mistake is a sentence, not a traceback."""
    return _run(args, prepare_training, 'train')


def test(args: Any) -> int:
    """Test as `args` say; the exit code, likewise."""
    return _run(args, prepare_test, 'test')


def cache(args: Any) -> int:
    """Encode training images as `args` say (see `engine.cache.write_cache`); the exit code, likewise.

    Args:
        args: config, folder, num_samples, cfg_options; as tools/cache.py parses them.
    """
    def work(_: list[Any]) -> None:
        from diffengine_sdxl.engine import config
        from diffengine_sdxl.engine.cache import write_cache
        cfg = config.load(args.config, args.cfg_options or ())
        _quiet()
        print(f'{write_cache(cfg, args.folder, args.num_samples)} samples are in {args.folder}.')
    return _said(work, 'cache')


def write_shapes(args: Any) -> int:
    """Write the shapes world as `args` say (see `engine.write_shapes.write_shapes`); the exit code, likewise.

    Args:
        args: folder, format, and the arguments of `datasets.Shapes`; as tools/write_shapes.py parses them.
    """
    def work(_: list[Any]) -> None:
        from diffengine_sdxl.datasets import Shapes
        from diffengine_sdxl.engine.write_shapes import write_shapes
        data = Shapes(**{k: v for k, v in vars(args).items() if k not in ('folder', 'format')})
        print(f'{write_shapes(data, args.folder, args.format)} rows are in {args.folder}.')
    return _said(work, 'shapes')


def scales(args: Any) -> int:
    """Draw an adapter's contact sheet at several scales (see `engine.scales.write_sheet`); the exit code, likewise.

    Args:
        args: config, cfg_options, work_dir (of a training), adapter, scales.
    """
    def work(_: list[Any]) -> None:
        from diffengine_sdxl.engine import config
        from diffengine_sdxl.engine.scales import write_sheet
        _quiet()
        write_sheet(config.load(args.config, args.cfg_options or ()), Path(args.work_dir), args.adapter, args.scales)
    return _said(work, 'scales')


def export(args: Any) -> int:
    """Write one adapter for other tools (see `engine.convert.convert`); the exit code.

    Args:
        args: config, out, checkpoint, adapter, format, dtype, cfg_options; as tools/export.py parses them.
    """
    def work(_: list[Any]) -> None:
        from diffengine_sdxl.engine import config
        from diffengine_sdxl.engine.convert import convert
        _quiet()
        for line in convert(config.load(args.config, args.cfg_options or ()), args.out, args.checkpoint, args.adapter,
                            args.format, args.dtype):
            print(line)
    return _said(work, 'export')


def infer(args: Any) -> int:
    """Make pictures as `args` say (see `engine.inference.infer`); the exit code, also 1 where a row of several failed.

    Args:
        args: as tools/infer.py parses them.
    """
    codes: list[int] = []

    def work(_: list[Any]) -> None:
        from diffengine_sdxl.engine.inference import infer as pictures
        from diffengine_sdxl.engine.inference.making import say
        if args.batch_size < 1:
            raise ValueError(f'--batch-size {args.batch_size} must be at least 1.')
        _quiet()
        codes.append(say(pictures.infer(args)))
    return _said(work, 'infer') or codes[0]


#: What may help where the device has no room, and what is said of a run that was stopped.
SMALLER = {'train': 'A smaller train_dataloader.batch_size with more optim_wrapper.accumulative_counts, '
                    'model.gradient_checkpointing=True or a smaller resolution may help.',
           'test': 'A smaller test_dataloader.batch_size or a smaller resolution may help.',
           'cache': 'A smaller train_dataloader.batch_size or a smaller resolution may help.', 'shapes': '',
           'scales': '', 'export': '',
           'infer': 'A smaller --batch-size or size, vae_tiling=True or offload=True (--set) may help.'}
STOPPED = {'train': 'Stopped. Add --resume to go on from the last checkpoint.', 'test': 'Stopped.',
           'cache': 'Stopped; nothing was written.', 'shapes': 'Stopped; nothing was written.', 'scales': 'Stopped.',
           'export': 'Stopped; nothing was written.',
           'infer': 'Stopped. The same command goes on with what is not there yet.'}


def _run(args: Any, config_of: Callable[[Any], Any], task: str) -> int:
    def work(runners: list[Any]) -> None:
        cfg = config_of(args)
        start_processes(args.launcher, (cfg.get('env_cfg') or {}).get('dist_cfg'))
        _quiet()
        from diffengine_sdxl.registry import RUNNERS
        runners.append(RUNNERS.build(cfg))
        getattr(runners[0], task)()
    return _said(work, task, args.launcher)


def _said(work: Callable[[list[Any]], None], task: str, launcher: str = 'none') -> int:
    """Do `work`, which lists the runner that it builds; the exit code. What a user can mend is said in a sentence."""
    runners: list[Any] = []
    try:
        work(runners)
    except (ValueError, OSError) as error:
        _close(runners)
        if isinstance(error, OSError) and error.errno not in NO_ROOM:
            raise
        print(f'error: {sentence(error)}', file=sys.stderr, flush=True)
        # The other processes wait for this one; leaving hard lets the launcher end them.
        if launcher != 'none':
            os._exit(1)
        return 1
    except torch_out_of_memory() as error:
        _close(runners)
        print(f'error: the device has no memory left ({str(error).splitlines()[0]}). {SMALLER[task]}',
              file=sys.stderr, flush=True)
        if launcher != 'none':
            os._exit(1)
        return 1
    except ImportError as error:
        _close(runners)
        print(f'error: a package that the config asks for is missing: {error}', file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        _close(runners)
        print(STOPPED[task], file=sys.stderr)
        return 130
    return 0


def torch_out_of_memory() -> type[BaseException]:
    """The error of a device without room."""
    import torch
    return torch.OutOfMemoryError


def _close(runners: list[Any]) -> None:
    for hook in (h for runner in runners for h in getattr(runner, 'hooks', ())):
        if hasattr(hook, 'close'):
            hook.close()


def sentence(error: BaseException) -> str:
    """The words of `error`; of one that a data loader's worker wrapped into a traceback, the last line's."""
    text = str(error).strip()
    if text.startswith('Caught '):
        last = text.splitlines()[-1]
        return last.partition(': ')[2] or last
    return text
