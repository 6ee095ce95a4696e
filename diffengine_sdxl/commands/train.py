"""`mim train diffengine_sdxl CONFIG`: train."""

from __future__ import annotations

from typing import Any

from diffengine_sdxl.commands.common import load_config, run_task
from diffengine_sdxl.errors import UserError

STOPPED = 'Stopped. Add --resume to continue from the last checkpoint.'
OUT_OF_MEMORY = ('A smaller train_dataloader.batch_size with more optim_wrapper.accumulative_counts, '
                 'speed.checkpointing=full or a smaller resolution may help.')


def run(args: Any, cleanup: Any) -> None:
    """Train what the config describes.

    Args:
        args: config, work_dir, launcher, cfg_options, resume; as `cli` parses them.

    Raises:
        UserError: the config has no `train_cfg`; or see config.load.load and engine.runner.
    """
    cfg = load_config(args)
    if cfg.get('train_cfg') is None:
        raise UserError(f"The config '{args.config}' has no `train_cfg`, so it trains nothing; test with it "
                        '(mim test).')
    run_task(cfg, 'train', cleanup)
