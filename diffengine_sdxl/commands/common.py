"""Functions shared by several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffengine_sdxl import config
from diffengine_sdxl.errors import UserError


def load_config(args: Any) -> Any:
    """Load the config of the command line, with its work_dir, launcher and resume.

    Args:
        args: config, work_dir, launcher, cfg_options and, to train, resume; as the tools parse them.

    Raises:
        UserError: see config.load.load.
    """
    cfg = config.load(args.config, args.cfg_options or ())
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    if resume := getattr(args, 'resume', None):
        cfg.resume = True if resume == 'auto' else resume
    return cfg


def run_task(cfg: Any, task: str, cleanup: Any) -> None:
    """Start the processes, build the runner of `cfg` and call its method `task` ('train' or 'test')."""
    from diffengine_sdxl.commands.launch import start_processes
    from diffengine_sdxl.registry import RUNNERS
    start_processes(cfg.launcher, (cfg.get('env_cfg') or {}).get('dist_cfg'))
    hide_loading_bars()
    runner = RUNNERS.build(cfg)
    # Close progress bars before an error is printed.
    for hook in runner.hooks:
        if hasattr(hook, 'close'):
            cleanup.callback(hook.close)
    getattr(runner, task)()


def hide_loading_bars() -> None:
    """Hide the progress bars of diffusers and transformers, one per component of the base."""
    import diffusers.utils.logging
    import transformers.utils.logging
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def check_output_folder(folder: Path, mark: str) -> Path:
    """Resolve the folder that a command writes; it must be new, empty, or hold `mark`, which the command wrote before.

    Raises:
        UserError: it holds something else.
    """
    folder = folder.expanduser().resolve()
    if folder.exists() and not (folder / mark).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"'{folder}' exists and was not written by this command; name another folder.")
    return folder
