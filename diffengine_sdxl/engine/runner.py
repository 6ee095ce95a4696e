"""mmengine's Runner with our configs, seeds and checkpoints; also for several processes on CPUs."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from diffengine_sdxl import limits
from diffengine_sdxl.config.overrides import DEFAULT_HOOKS
from diffengine_sdxl.config.references import resolve
from diffengine_sdxl.datasets import KeyedSampler
from diffengine_sdxl.engine import branches, complete, determinism, run_identity, speed_choice, work_dir_lock
from diffengine_sdxl.engine.main_process import on_main_process
from diffengine_sdxl.engine.run_cache import RunCache, open_store
from diffengine_sdxl.errors import UserError, first_line, whole_number
from diffengine_sdxl.loading import checkpoint
from diffengine_sdxl.loading.trained import check_same_adapters, load_trained, weights_label
from diffengine_sdxl.models import measured
from diffengine_sdxl.models.apply_speed import apply_speed
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import DATASETS, PARAM_SCHEDULERS, RUNNERS, SCOPE
from diffengine_sdxl.speed import Speed


@RUNNERS.register_module()
class ExperimentRunner(Runner):
    """Train, evaluate and sample what a config describes.

    `RUNNERS.build(config)` builds it from the config that `config.load.load` returns. `cfg` keeps the '$key'
    references, so that the dumped config can be run again with another value; `resolved` holds their values.
    """

    @classmethod
    def from_cfg(cls, cfg: Config) -> ExperimentRunner:
        """Resolve the config, claim the work_dir, determine the seed, and build the runner.

        Raises:
            UserError: the work_dir belongs to another run or is in use, `speed` asks for what cannot be done here, or a
                part of the config cannot be built.
        """
        from mmengine.registry import init_default_scope
        cfg = copy.deepcopy(cfg)
        cfg.setdefault('default_scope', SCOPE)
        init_default_scope(cfg.default_scope)
        resolved = resolve(cfg)
        limits.set_limits(resolved.get('limits') or {})
        complete.fill_loops(resolved)
        complete.check_complete(resolved)
        speed = speed_choice.checked(resolved)
        seed = run_identity.claim(resolved)
        randomness = {**(resolved.get('randomness') or {}), 'seed': seed}
        resolved.randomness = randomness
        if resolved.model.get('type') == 'SDXL':
            resolved.model.setdefault('seed', seed)
        arguments = {key: resolved.get(key) for key in (
            'model', 'work_dir', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'train_cfg', 'val_cfg',
            'test_cfg', 'auto_scale_lr', 'optim_wrapper', 'param_scheduler', 'val_evaluator', 'test_evaluator',
            'default_hooks', 'custom_hooks', 'load_from', 'visualizer', 'experiment_name', 'log_processor')}
        try:
            # Only what trains looks anything up.
            store = open_store(resolved) if resolved.get('train_cfg') is not None else None
            if store is not None and resolved.model.get('type') == 'SDXL':
                arguments['model'] = {**resolved.model, 'lazy_encoders': True}
            runner = cls(**arguments, resume=resolved.get('resume', False), launcher=resolved.get('launcher', 'none'),
                         env_cfg=resolved.get('env_cfg') or {}, log_level=resolved.get('log_level', 'INFO'),
                         default_scope=resolved.default_scope, randomness=randomness, cfg=cfg)
        except BaseException:
            work_dir_lock.release(resolved.work_dir)
            raise
        runner.resolved, runner.speed, runner.measured, runner._kernels = resolved, speed, {}, ExitStack()
        runner.cache = None if store is None else RunCache(store, runner.bare_model)
        return runner

    optim_wrapper: Any
    _hooks: list[Any]
    _has_loaded: bool
    #: The config with every reference resolved; manifests record it.
    resolved: Config
    #: The config's `speed`; what became of it once the weights are loaded.
    speed: Speed
    #: What was chosen by measuring this device, by name; plain values. Checkpoints keep it, and a resumed run takes it.
    measured: dict[str, Any]
    #: Holds the order of attention kernels for as long as the run trains.
    _kernels: ExitStack
    #: What the resumed run's `speed` had become.
    _recorded_speed: dict[str, str] | None = None
    #: What the training looks up and keeps of what frozen encoders compute.
    cache: RunCache | None = None
    #: The EMAHook, which sets itself.
    ema: Any = None
    #: The weights that `load_checkpoint` loaded, for people, and their step if it is known.
    loaded: str | None = None
    loaded_step: int | None = None

    @property
    def bare_model(self) -> SDXL:
        """The model without its distributed wrapper."""
        return self.model.module if is_model_wrapper(self.model) else self.model

    @property
    def accumulative_counts(self) -> int:
        """Micro-batches of an optimizer step."""
        wrapper = self.optim_wrapper
        if isinstance(wrapper, dict):
            return int(wrapper.get('accumulative_counts', 1))
        return int(getattr(wrapper, '_accumulative_counts', 1))

    @contextmanager
    def exported_weights(self) -> Iterator[None]:
        """Give the model the weights that are exported and sampled, the EMA's if there is an EMA; then swap back."""
        self.settle()
        if self.ema is None:
            yield
            return
        self.ema.swap()
        try:
            yield
        finally:
            self.ema.swap()

    def settle(self) -> None:
        """Wait for the values of the steps done and check them (`StepLoop.flush`): before anything reads the weights.

        Raises:
            UserError: a gradient or a loss of theirs is not finite.
        """
        if hasattr(self._train_loop, 'flush'):  # built, and ours
            self._train_loop.flush()

    def attach_cache(self, dataset: Any) -> None:
        """Let a data set look up its samples in the run's cache, if there is one, before its loader's workers start."""
        if self.cache is not None:
            self.cache.attach(dataset)

    def keep_samples(self, collated: Any) -> None:
        """Keep in the run's cache what is new in a collated batch, before it goes to the device."""
        if self.cache is not None:
            self.cache.keep_samples(collated)

    def set_randomness(self, seed: int, diff_rank_seed: bool = False, deterministic: bool = False) -> None:
        """Seed the global random states; `deterministic` allows kernels only that give equal bits every time."""
        if deterministic:
            determinism.enable()
        super().set_randomness(seed, diff_rank_seed, deterministic)

    def setup_env(self, env_cfg: dict) -> None:
        """Set up the environment; `env_cfg.allow_tf32` allows TF32."""
        env_cfg = dict(env_cfg)
        if env_cfg.pop('allow_tf32', False):
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        super().setup_env(env_cfg)

    def build_logger(self, *args: Any, **kwargs: Any) -> Any:
        """Build the logger; mmengine's records of several lines (environment, config, hooks) go to the file only."""
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                # Our metrics' names start with their image set, so they need no prefix.
                handler.addFilter(lambda record: getattr(record, 'on_console', '\n' not in str(record.msg))
                                  and not str(record.msg).startswith('The prefix is not set in metric class'))
        return logger

    def log_lines(self, text: str) -> None:
        """Log several lines, to the console too."""
        self.logger.info(text, extra={'on_console': True})

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Move the model to its device; wrap it in DDP if several processes train, on CPUs without device ids."""
        from mmengine.device import get_device
        model = model.to(get_device())
        if not self.distributed or self._train_loop is None:
            return model
        # All processes read the same frozen weights, so DDP need not broadcast SDXL's 7 GB at the start.
        frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
        MMDistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        ids = [torch.cuda.current_device()] if torch.cuda.is_available() else None
        with warnings.catch_warnings():
            # Newer torch renames broadcast_buffers; older torch lacks the new name.
            warnings.simplefilter('ignore', FutureWarning)
            return MMDistributedDataParallel(module=model, device_ids=ids, broadcast_buffers=False,
                                             gradient_as_bucket_view=True,  # else gradients lie in memory twice
                                             find_unused_parameters=self.cfg.get('find_unused_parameters', False))

    def _init_model_weights(self) -> None:
        """Do nothing: the model is initialized when built, and mmengine would take the mean of every weight."""

    def register_hooks(self, default_hooks: Any = None, custom_hooks: Any = None) -> None:
        """Register the hooks; without training only those with a validation or test stage.

        The others would average, upload or save weights that were not trained.
        """
        super().register_hooks(default_hooks, custom_hooks)
        if self._train_loop is None:
            self._hooks = [hook for hook in self._hooks if any(
                '_val' in stage or '_test' in stage for stage in hook.get_triggered_stages())]

    def dump_config(self) -> None:
        """Write the config of a training; see `dump_test_config`."""
        if self._train_loop is not None:
            super().dump_config()

    def dump_test_config(self) -> None:
        """Write a test's config, once nothing refuses it, beside its images: the work_dir may hold a run's config."""
        path = Path(self.work_dir) / 'test' / Path(self.cfg.filename or 'config.py').name
        on_main_process(lambda: self.cfg.dump(str(path)))

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """Register our default hooks instead of mmengine's; a value of None removes one."""
        defaults: dict[str, Any] = {name: {'type': kind} for name, kind in DEFAULT_HOOKS.items()}
        for hook in {**defaults, **(hooks or {})}.values():
            if hook is not None:
                self.register_hook(hook)

    @staticmethod
    def build_dataloader(dataloader: Any, seed: int | None = None, diff_rank_seed: bool = False) -> Any:
        """Build a data loader, by default with our collate function and KeyedSampler; a stream has no sampler.

        Raises:
            UserError: an argument of torch's DataLoader is invalid.
        """
        if not isinstance(dataloader, dict):
            return dataloader
        dataloader = {'collate_fn': {'type': f'{SCOPE}.collate'}, 'pin_memory': torch.cuda.is_available(),
                      **copy.deepcopy(dataloader)}
        most = 16 + 4 * (os.cpu_count() or 1)
        if (dataloader.get('num_workers') or 0) > most:
            raise UserError(f'num_workers={dataloader["num_workers"]} must be at most {most} on this machine.')
        dataset: Any = dataloader.get('dataset')
        if dataset is None:
            raise UserError('A data loader of the config has no `dataset`.')
        if isinstance(dataset, dict):
            dataset = dataloader['dataset'] = DATASETS.build(dataset)
        if isinstance(dataset, torch.utils.data.IterableDataset):
            stream: Any = dataset
            stream.seed, stream.batch_size = seed or 0, dataloader.get('batch_size', 1)
            dataloader['sampler'] = None
        elif dataloader.get('sampler') is None:
            dataloader['sampler'] = KeyedSampler(dataset, seed=seed)
        try:
            return Runner.build_dataloader(dataloader, seed=seed, diff_rank_seed=False)
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise UserError(f'The data loader of {type(dataset).__name__} cannot be built: {first_line(error)}.'
                            ) from error

    def build_param_scheduler(self, scheduler: Any) -> list[Any]:
        """Build learning rate schedules, which count optimizer steps and by default end with the run."""
        configs = scheduler if isinstance(scheduler, list | tuple) else [scheduler]
        built = []
        for config in configs:
            if isinstance(config, dict):
                config = {'by_epoch': False, 'end': self.max_iters, **config}
                if config['by_epoch']:
                    raise UserError('param_scheduler: by_epoch=True is not supported; schedules count optimizer steps.')
                if config.get('type') == 'DiffusersLR' and config.get('num_training_steps') is None:
                    config['num_training_steps'] = self.max_iters
                config = PARAM_SCHEDULERS.build(config, default_args={'optimizer': self.optim_wrapper})
            built.append(config)
        return built

    def scale_lr(self, optim_wrapper: Any, auto_scale_lr: dict | None = None) -> None:
        """Multiply learning rates by samples per optimizer step / `base_batch_size` (diffusers' --scale_lr)."""
        if not auto_scale_lr or not auto_scale_lr.get('enable'):
            return
        base_batch_size = whole_number('auto_scale_lr.base_batch_size', auto_scale_lr.get('base_batch_size', 1), 1)
        ratio = self.train_loop.samples_per_iter / base_batch_size
        # The defaults too, which a polynomial schedule reads.
        for group in [optim_wrapper.optimizer.defaults, *optim_wrapper.optimizer.param_groups]:
            group['lr'] *= ratio
        self.logger.info(f'Learning rates are scaled by {ratio:g}.')

    def state(self) -> dict[str, Any]:
        """Return all that a resumed run needs, after `train_loop.num_done` steps."""
        self.settle()
        return {
            'meta': {'step': self.train_loop.num_done, 'position': self.train_loop.position, 'seed': self.seed,
                     'samples_per_iter': self.train_loop.samples_per_iter,
                     'identity': run_identity.identity(self.resolved),
                     'speed': speed_choice.record(self.speed, self.bare_model.device), 'measured': self.measured},
            'state_dict': dict(self.bare_model.state_dict()),
            'optimizer': self.optim_wrapper.state_dict(),
            'param_schedulers': [s.state_dict() for s in self.param_schedulers or []],
            # Without those of validations, so that runs with and without one write equal checkpoints.
            'log_scalars': {k: v for k, v in self.message_hub.log_scalars.items() if not k.startswith('val/')}}

    def save_checkpoint(self, path: Path) -> None:  # type: ignore[override]
        """Write the run's state to `path` atomically, in the main process.

        Raises:
            UserError: it cannot be written; what was saved before is untouched.
        """
        state = self.state()
        self.call_hook('before_save_checkpoint', checkpoint=state)
        on_main_process(lambda: checkpoint.save(Path(path), state))
        if self.cache is not None:
            self.cache.store.flush()

    def train(self) -> nn.Module:
        """Train to the end; return the model. Then other processes may train in the work_dir."""
        try:
            with determinism.named_kernels(), self._kernels:
                return super().train()
        finally:
            if self.cache is not None:
                self.cache.close()
            work_dir_lock.release(self.work_dir)

    def load_or_resume(self) -> None:
        """Resume from the checkpoint that `resume` names or the work_dir's latest; else start, from `load_from`.

        Then let the model compute as `speed` says.
        """
        if self._has_loaded:
            return
        self._has_loaded = True
        if self.cache is not None and hasattr(self._train_loop, 'dataloader'):
            self.cache.attach(self.train_dataloader.dataset, trains=True)
        self._load_or_resume()
        steps = 0 if self._train_loop is None else self.max_iters - self.iter
        self.speed, line = speed_choice.choose(self.speed, self.resolved, self.bare_model, steps, self._recorded_speed)
        if line is not None:
            self.logger.warning(line)
        if steps and not self.measured:
            self.measured = on_main_process(lambda: speed_choice.measure(self.resolved, self.bare_model))
        if self.measured:
            self.logger.info(f'Measured on this device: {self.measured}.')
        self._kernels.enter_context(measured.applied(self.bare_model.unet, self.measured))
        apply_speed(self.bare_model, self.speed)

    def _load_or_resume(self) -> None:
        if self._resume:
            path = self._resume if isinstance(self._resume, str) else checkpoint.latest(self.work_dir)
            if path is not None:
                self.resume(str(path))
                return
            self.logger.info(f'{self.work_dir} holds no checkpoint; the run starts from step 0.')
        if self._load_from is not None:
            self.load_checkpoint(self._load_from)

    def resume(self, filename: str, **_: Any) -> None:  # type: ignore[override]
        """Restore weights, optimizer, schedules, EMA, position in the data and logged scalars, bitwise.

        What the work_dir holds of later steps is set aside.

        Raises:
            UserError: the file is damaged or belongs to another run, its weights don't fit, or later files cannot be
                moved.
        """
        state = checkpoint.load(filename)
        meta = state['meta']
        old = {**meta['identity'], 'seed': meta['seed']}
        new = {**run_identity.identity(self.resolved), 'seed': self.seed}
        run_identity.check_same_run(old, new, filename, Path(filename))
        checkpoint.load_strict(self.bare_model, state['state_dict'], filename)
        self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)
        self.optim_wrapper.load_state_dict(state['optimizer'])
        if len(state['param_schedulers']) != len(self.param_schedulers or []):
            raise UserError(f"'{filename}' was saved with {len(state['param_schedulers'])} param_scheduler, the "
                            f'config has {len(self.param_schedulers or [])}; set the config back.')
        if 'ema' in state and self.ema is None:
            raise UserError(f"'{filename}' holds an EMA, but the config has no EMAHook; add it, or start a new run "
                            'from these weights (load_from).')
        for scheduler, stored in zip(self.param_schedulers or [], state['param_schedulers'], strict=True):
            scheduler.load_state_dict(stored)
        self.train_loop.start_at(meta['step'], meta['position'])
        # Checkpoints of earlier versions have neither.
        self._recorded_speed, self.measured = meta.get('speed'), dict(meta.get('measured') or {})
        for name, stored in state['log_scalars'].items():
            self.message_hub.log_scalars[name] = checkpoint.restore_buffer(stored)
        self.call_hook('after_load_checkpoint', checkpoint=state)
        for line in (on_main_process(lambda: branches.go_back(Path(self.work_dir), Path(filename), meta['step'])),
                     run_identity.describe_split(old['split'], new['split'])):
            if line is not None:
                self.logger.warning(line)
        self.logger.info(f"Resumed from '{filename}' after step {meta['step']}.")

    def load_checkpoint(self, filename: str, **_: Any) -> None:  # type: ignore[override]
        """Load the trained weights of a checkpoint (its EMA's, if it has one) or of an exported folder, strictly.

        Raises:
            UserError: the file is damaged or its weights don't fit; which keys.
        """
        check_same_adapters(self.resolved.model, Path(filename))
        self.loaded_step, is_ema = load_trained(self.bare_model, filename)
        self.loaded = weights_label(filename, self.loaded_step, is_ema)
        self.logger.info(f'Loaded weights from {self.loaded}.')
