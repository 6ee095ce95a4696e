"""mmengine's Runner with our configs, our seed, plain checkpoints, and processes on CPUs too."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from diffengine_sdxl.datasets import KeyedSampler
from diffengine_sdxl.engine import checkpoint, identity
from diffengine_sdxl.engine.config import DEFAULT_HOOKS, resolve
from diffengine_sdxl.engine.export import load_weights
from diffengine_sdxl.registry import DATASETS, PARAM_SCHEDULERS, RUNNERS, SCOPE


@RUNNERS.register_module()
class ExperimentRunner(Runner):
    """Trains, evaluates and samples what a config describes.

    Built by `RUNNERS.build(config)` from a config that `engine.config.load` has read. `cfg` keeps the '$key'
    references, so that the dumped config can be run again with another value; everything else sees them resolved.
    """

    @classmethod
    def from_cfg(cls, cfg: Config) -> ExperimentRunner:
        """Resolve, settle the seed, claim the work_dir, build.

        Raises:
            ValueError: the work_dir belongs to another run, or a part of the config cannot be built.
        """
        from mmengine.registry import init_default_scope
        cfg = copy.deepcopy(cfg)
        cfg.setdefault('default_scope', SCOPE)
        init_default_scope(cfg.default_scope)
        resolved = resolve(cfg)
        _fill_loops(resolved)
        _check_needs(resolved)
        seed = identity.claim(resolved)
        randomness = {**(resolved.get('randomness') or {}), 'seed': seed}
        resolved.randomness = randomness
        if resolved.model.get('type') == 'SDXL':
            resolved.model.setdefault('seed', seed)
        arguments = {key: resolved.get(key) for key in (
            'model', 'work_dir', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'train_cfg', 'val_cfg',
            'test_cfg', 'auto_scale_lr', 'optim_wrapper', 'param_scheduler', 'val_evaluator', 'test_evaluator',
            'default_hooks', 'custom_hooks', 'load_from', 'visualizer', 'experiment_name', 'log_processor')}
        runner = cls(**arguments, resume=resolved.get('resume', False), launcher=resolved.get('launcher', 'none'),
                     env_cfg=resolved.get('env_cfg') or {}, log_level=resolved.get('log_level', 'INFO'),
                     default_scope=resolved.default_scope, randomness=randomness, cfg=cfg)
        runner.resolved = resolved
        return runner

    optim_wrapper: Any
    _hooks: list[Any]
    _has_loaded: bool
    #: The config with every reference resolved; what manifests record.
    resolved: Config
    #: Set by the EMA hook.
    ema: Any = None
    #: What `load_checkpoint` loaded, in words, and the step that it is of, if that is known.
    loaded: str | None = None
    loaded_step: int | None = None

    @property
    def bare_model(self) -> nn.Module:
        """The model without its distributed wrapper."""
        return self.model.module if is_model_wrapper(self.model) else self.model

    @property
    def accumulative_counts(self) -> int:
        """Micro-batches in an optimizer step."""
        wrapper = self.optim_wrapper
        if isinstance(wrapper, dict):
            return int(wrapper.get('accumulative_counts', 1))
        return int(getattr(wrapper, '_accumulative_counts', 1))

    @contextmanager
    def exported_weights(self) -> Iterator[None]:
        """Inside, the model holds what is exported and sampled: the EMA weights if there is an EMA."""
        if self.ema is None:
            yield
            return
        self.ema.swap(self)
        try:
            yield
        finally:
            self.ema.swap(self)

    def setup_env(self, env_cfg: dict) -> None:
        """mmengine's, and TF32 by `env_cfg.allow_tf32`."""
        env_cfg = dict(env_cfg)
        if env_cfg.pop('allow_tf32', False):
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        super().setup_env(env_cfg)

    def build_logger(self, *args: Any, **kwargs: Any) -> Any:
        """mmengine's; its pages on environment, config and hooks go to the log file and not to the terminal."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                # A metric's name starts with whose pictures it is of, so it needs no prefix.
                handler.addFilter(lambda record: '\n' not in str(record.msg)
                                  and not str(record.msg).startswith('The prefix is not set in metric class'))
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """To its device; DDP over what trains when there are several processes, on CPUs without device ids."""
        from mmengine.device import get_device
        model = model.to(get_device())
        if not self.distributed or self._train_loop is None:
            return model
        # Frozen weights are the same file everywhere: broadcasting SDXL's 7 GB at the start would be waste.
        frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
        MMDistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        ids = [torch.cuda.current_device()] if torch.cuda.is_available() else None
        with warnings.catch_warnings():
            # Newer torch has another word for broadcast_buffers; older ones don't know it yet.
            warnings.simplefilter('ignore', FutureWarning)
            return MMDistributedDataParallel(module=model, device_ids=ids, broadcast_buffers=False,
                                             find_unused_parameters=self.cfg.get('find_unused_parameters', False))

    def _init_model_weights(self) -> None:
        """Nothing: an SDXL is whole when it is built, and mmengine's walk takes the mean of every weight."""

    def register_hooks(self, default_hooks: Any = None, custom_hooks: Any = None) -> None:
        """mmengine's; without training those alone that have something to do in a validation or test.

        The others would average, upload or save what is not there.
        """
        super().register_hooks(default_hooks, custom_hooks)
        if self._train_loop is None:
            self._hooks = [hook for hook in self._hooks if any(
                '_val' in stage or '_test' in stage for stage in hook.get_triggered_stages())]

    def dump_config(self) -> None:
        """mmengine's; without training to `<work_dir>/test/`, as the work_dir may be that of a run."""
        if self._train_loop is not None:
            super().dump_config()
        elif is_main_process():
            folder = Path(self.work_dir) / 'test'
            folder.mkdir(exist_ok=True)
            self.cfg.dump(str(folder / Path(self.cfg.filename or 'config.py').name))

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Ours in place of mmengine's; a value of None takes one out."""
        defaults: dict[str, Any] = {name: {'type': kind} for name, kind in DEFAULT_HOOKS.items()}
        for hook in {**defaults, **(hooks or {})}.values():
            if hook is not None:
                self.register_hook(hook)

    @staticmethod
    def build_dataloader(dataloader: Any, seed: int | None = None, diff_rank_seed: bool = False) -> Any:
        """mmengine's, with our collate function and endless keyed order by default; a stream takes no sampler."""
        if not isinstance(dataloader, dict):
            return dataloader
        dataloader = copy.deepcopy(dataloader)
        dataset: Any = dataloader['dataset']
        if isinstance(dataset, dict):
            dataset = DATASETS.build(dataset)
        dataloader['dataset'] = dataset
        dataloader.setdefault('collate_fn', {'type': f'{SCOPE}.collate'})
        if isinstance(dataset, torch.utils.data.IterableDataset):
            stream: Any = dataset
            stream.seed, stream.batch_size = seed or 0, dataloader['batch_size']
            dataloader['sampler'] = None
        elif dataloader.get('sampler') is None:
            dataloader['sampler'] = KeyedSampler(dataset, seed=seed)
        return Runner.build_dataloader(dataloader, seed=seed, diff_rank_seed=False)

    def build_param_scheduler(self, scheduler: Any) -> list[Any]:
        """Schedules that count optimizer steps and end with the run unless they say otherwise."""
        configs = scheduler if isinstance(scheduler, list | tuple) else [scheduler]
        built = []
        for config in configs:
            if isinstance(config, dict):
                config = {'by_epoch': False, 'end': self.max_iters, **config}
                if config['by_epoch']:
                    raise ValueError('param_scheduler: by_epoch=True is not supported; schedules count optimizer '
                                     'steps (one iteration is one step).')
                if config.get('type') == 'DiffusersLR' and config.get('num_training_steps') is None:
                    config['num_training_steps'] = self.max_iters
                config = PARAM_SCHEDULERS.build(config, default_args={'optimizer': self.optim_wrapper})
            built.append(config)
        return built

    def scale_lr(self, optim_wrapper: Any, auto_scale_lr: dict | None = None) -> None:
        """Learning rates times the samples of one optimizer step over `base_batch_size` (diffusers' --scale_lr)."""
        if not auto_scale_lr or not auto_scale_lr.get('enable'):
            return
        ratio = self.train_loop.samples_per_iter / auto_scale_lr.get('base_batch_size', 1)
        # The defaults too: a polynomial schedule reads them.
        for group in [optim_wrapper.optimizer.defaults, *optim_wrapper.optimizer.param_groups]:
            group['lr'] *= ratio
        self.logger.info(f'Learning rates are scaled by {ratio:g}.')

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, after `iter + 1` steps."""
        return {
            'meta': {'step': self.iter + 1, 'position': self.train_loop.position, 'seed': self.seed,
                     'samples_per_iter': self.train_loop.samples_per_iter,
                     'identity': identity.identity(self.resolved)},
            'state_dict': dict(self.bare_model.state_dict()),
            'optimizer': self.optim_wrapper.state_dict(),
            'param_schedulers': [s.state_dict() for s in self.param_schedulers or []],
            # Without those of validations: a run with and one without leave the same checkpoints.
            'log_scalars': {k: v for k, v in self.message_hub.log_scalars.items() if not k.startswith('val/')}}

    def save_checkpoint(self, path: Path) -> None:  # type: ignore[override]
        """Write the run's state to `path`, atomically; the main process alone writes, all learn if it failed.

        Raises:
            ValueError: it could not be written; what was saved before is untouched.
        """
        failed: list[str | None] = [None]
        state = self.state()
        self.call_hook('before_save_checkpoint', checkpoint=state)
        if is_main_process():
            try:
                checkpoint.save(Path(path), state)
            except ValueError as error:
                failed[0] = str(error)
        broadcast_object_list(failed)
        if failed[0] is not None:
            raise ValueError(failed[0])

    def load_or_resume(self) -> None:
        """Go on from the checkpoint that `resume` names or the work_dir's latest; else begin, with `load_from`."""
        if self._has_loaded:
            return
        self._has_loaded = True
        if self._resume:
            path = self._resume if isinstance(self._resume, str) else checkpoint.latest(self.work_dir)
            if path is not None:
                self.resume(str(path))
                return
            self.logger.info(f'{self.work_dir} holds no checkpoint; the run starts at its beginning.')
        if self._load_from is not None:
            self.load_checkpoint(self._load_from)

    def resume(self, filename: str, **_: Any) -> None:  # type: ignore[override]
        """Restore weights, optimizer, schedules, EMA, place in the data and logged scalars, bitwise.

        Raises:
            ValueError: the file is damaged, of another run, or its weights don't fit.
        """
        state = checkpoint.load(filename)
        meta = state['meta']
        identity.refuse_other({**meta['identity'], 'seed': meta['seed']},
                              {**identity.identity(self.resolved), 'seed': self.seed}, f"'{filename}'")
        checkpoint.load_strict(self.bare_model, state['state_dict'], filename)
        self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)
        self.optim_wrapper.load_state_dict(state['optimizer'])
        if len(state['param_schedulers']) != len(self.param_schedulers or []):
            raise ValueError(f"'{filename}' was saved with {len(state['param_schedulers'])} param_scheduler, the "
                             f'config has {len(self.param_schedulers or [])}; set the config back.')
        if 'ema' in state and self.ema is None:
            raise ValueError(f"'{filename}' holds an EMA, but the config has no EMAHook any more; put it back, or "
                             'start a new run from these weights (load_from).')
        for scheduler, stored in zip(self.param_schedulers or [], state['param_schedulers'], strict=True):
            scheduler.load_state_dict(stored)
        self.train_loop.start_at(meta['step'], meta['position'])
        if meta['samples_per_iter'] != self.train_loop.samples_per_iter:
            self.logger.warning(f'A step had {meta["samples_per_iter"]} samples and has now '
                                f'{self.train_loop.samples_per_iter}: the run goes on, but is not the same run.')
        for name, stored in state['log_scalars'].items():
            self.message_hub.log_scalars[name] = checkpoint.buffer(stored)
        self.call_hook('after_load_checkpoint', checkpoint=state)
        self.logger.info(f"Resumed from '{filename}' after step {meta['step']}.")

    def load_checkpoint(self, filename: str, **_: Any) -> None:  # type: ignore[override]
        """Take the trained weights (the EMA's, if it has one) of a checkpoint, or of an export's folder, strictly.

        Raises:
            ValueError: the file is damaged or its weights don't fit; which keys.
        """
        step, averaged = load_weights(self.bare_model, filename)
        self.loaded_step = step
        self.loaded = f"'{filename}'" + (f', step {step}' if step else '') + (', EMA weights' if averaged else '')
        self.logger.info(f'Weights were loaded from {self.loaded}.')


#: The loop that evaluates where a config names data and metrics but no loop.
LOOP_TYPES = {'val': 'ValLoop', 'test': 'TestLoop'}


def _fill_loops(config: Config) -> None:
    """`val_cfg` and `test_cfg`, or their types, where they are left out."""
    for mode, kind in LOOP_TYPES.items():
        if config.get(f'{mode}_cfg') is not None or config.get(f'{mode}_dataloader') is not None:
            config[f'{mode}_cfg'] = {'type': kind, **(config.get(f'{mode}_cfg') or {})}


def _check_needs(config: Config) -> None:
    """Refuse early what would fail late."""
    if config.get('model') is None:
        raise ValueError('The config has no `model`.')
    if config.get('work_dir') is None:
        raise ValueError('The config has no `work_dir`; pass --work-dir.')
    if config.get('train_cfg') is not None:
        if config.model.get('type') == 'SDXL' and not config.model.get('objective'):
            raise ValueError('The config trains, but model.objective is not set.')
        for key in ('train_dataloader', 'optim_wrapper'):
            if config.get(key) is None:
                raise ValueError(f'The config trains, but has no `{key}`.')
        if config.train_cfg.get('val_interval') is not None and config.get('val_dataloader') is None:
            raise ValueError('train_cfg.val_interval is set, but the config has no `val_dataloader` to validate on; '
                             'name one (docs/evaluation.md), or set val_interval=None.')
    for mode in LOOP_TYPES:
        keys = [f'{mode}_dataloader', f'{mode}_evaluator']
        there = [key for key in (*keys, f'{mode}_cfg') if config.get(key) is not None]
        missing = [key for key in keys if not config.get(key)]
        if there and missing:
            raise ValueError(f'The config has `{there[0]}`, but no `{missing[0]}`; an evaluation needs '
                             f'`{keys[0]}` and `{keys[1]}` (docs/evaluation.md), or neither.')
        if there and config.model.get('type') == 'SDXL' and not config.model.get('sampler'):
            raise ValueError(f'The config has `{keys[0]}`, but model.sampler, which makes the pictures, is not set.')
