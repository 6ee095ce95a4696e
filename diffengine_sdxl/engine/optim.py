"""What turns losses into new weights: optimizers, the wrapper that steps them, parameter groups, learning rates.

An iteration is one optimizer step of `accumulative_counts` micro-batches; everything here counts such steps.

Optimizers by name, beside all of torch.optim: `AdamW8bit` (bitsandbytes), `Prodigy` (prodigyopt), `Adafactor`
(transformers', with relative steps; torch's own is `TorchAdafactor`, as mmengine names it).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import INF, _ParamScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffengine_sdxl.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    nearest,
)


def _third_party(module: str, name: str, package: str) -> Callable[..., Optimizer]:
    """The optimizer class `module.name`, imported only when a config asks for it."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"optimizer type='{name}' needs the package {package}, which could not be used here "
                         f'({error}). Install it with `pip install {package}`, or choose another optimizer, '
                         "for example type='AdamW'.") from error


@OPTIMIZERS.register_module()
def AdamW8bit(params: Any, **kwargs: Any) -> Optimizer:  # noqa: N802
    """AdamW with 8-bit states (Dettmers et al. 2022, arXiv 2110.02861), of bitsandbytes; `--use_8bit_adam`.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    return _third_party('bitsandbytes.optim', 'AdamW8bit', 'bitsandbytes')(params, **kwargs)


@OPTIMIZERS.register_module()
def Prodigy(params: Any, **kwargs: Any) -> Optimizer:  # noqa: N802
    """AdamW that finds its own learning rate (Mishchenko & Defazio 2023, arXiv 2306.06101), of prodigyopt; keep lr=1.

    All parameter groups must share one lr, or have 0.

    Raises:
        ValueError: prodigyopt is not installed.
    """
    return _third_party('prodigyopt', 'Prodigy', 'prodigyopt')(params, **kwargs)


@OPTIMIZERS.register_module()
def Adafactor(params: Any, lr: float | None = None, **kwargs: Any) -> Optimizer:  # noqa: N802
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) of transformers.

    With lr=None its steps are relative to the weights and no schedule applies; with an lr, here or in a parameter
    group, `relative_step` is off unless it is set (transformers leaves it on, and then refuses the lr).

    Raises:
        ValueError: this version of transformers has none, or an lr is combined with relative_step=True.
    """
    params = list(params)
    given = lr is not None or any(isinstance(p, dict) and p.get('lr') is not None for p in params)
    kwargs.setdefault('relative_step', not given)
    if given and kwargs['relative_step']:
        raise ValueError("optimizer type='Adafactor' takes either an lr or relative_step=True, not both.")
    return _third_party('transformers', 'Adafactor', 'transformers')(params, lr=lr, **kwargs)


@OPTIM_WRAPPERS.register_module()
class StepOptimWrapper(OptimWrapper):
    """Steps the optimizer once every `accumulative_counts` micro-batches, and never with a gradient that is not finite.

    Call `update_params(loss)` for every micro-batch, after a forward pass inside `optim_context(model)` (which under
    DDP sends no gradients but for the last micro-batch). Autocast is entered by the model, not here.

    Args:
        optimizer: holds fp32 parameters if `mixed_precision` is 'fp16'.
        accumulative_counts: micro-batches of an iteration; the gradient is that of their mean loss.
        clip_grad: dict(max_norm=1.0) or dict(type='value', clip_value=...): arguments of
            `torch.nn.utils.clip_grad_norm_` or `clip_grad_value_`. The norm before clipping is always logged as
            `grad_norm`.
        mixed_precision: 'no', 'fp16' or 'bf16'; with 'fp16' the loss is scaled, and a step whose gradients overflow
            is left out while the scale halves.
        loss_scale: arguments of `torch.amp.GradScaler` for 'fp16', as dict(init_scale=65536.0, growth_interval=2000).
        set_grads_to_none: free gradients after a step rather than fill them with zeros.

    Raises:
        ValueError: an argument that is not known or out of range, or fp16 parameters under 'fp16'.
    """

    PRECISIONS = ('no', 'fp16', 'bf16')
    CLIP_KEYS = {'norm': ('max_norm', 'norm_type', 'foreach'), 'value': ('clip_value', 'foreach')}
    MIN_LOSS_SCALE = 1e-4  # 30 overflows in a row from the default: the gradients are broken, not large

    def __init__(self, optimizer: Optimizer, accumulative_counts: int = 1, clip_grad: Mapping[str, Any] | None = None,
                 mixed_precision: str = 'no', loss_scale: Mapping[str, Any] | None = None,
                 set_grads_to_none: bool = True) -> None:
        if not isinstance(accumulative_counts, int) or accumulative_counts < 1:
            raise ValueError(f'accumulative_counts={accumulative_counts!r} of optim_wrapper must be 1 or more.')
        if mixed_precision not in self.PRECISIONS:
            raise ValueError(f'mixed_precision={mixed_precision!r} must be one of {", ".join(self.PRECISIONS)}.'
                             f'{nearest(str(mixed_precision), list(self.PRECISIONS))}')
        super().__init__(optimizer, accumulative_counts, self._checked_clip(clip_grad))
        # mmengine logs the rate of a made-up group when there are several; `get_lr` below gives each its own
        self.base_param_settings = None
        self.mixed_precision = mixed_precision
        self.set_grads_to_none = set_grads_to_none
        self.loss_scaler: torch.amp.GradScaler | None = None
        if mixed_precision == 'fp16':
            parameters = self._parameters()
            if any(p.dtype == torch.float16 for p in parameters):
                raise ValueError("mixed_precision='fp16' needs the trained weights in fp32: their gradients cannot be "
                                 "unscaled in fp16. Set the dtype of the trained parts to 'float32'.")
            device = parameters[0].device.type if parameters else 'cpu'
            self.loss_scaler = torch.amp.GradScaler(device, **dict(loss_scale or {}))

    @classmethod
    def _checked_clip(cls, clip_grad: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if clip_grad is None:
            return None
        clip = dict(clip_grad)
        kind = clip.get('type', 'norm')
        if kind not in cls.CLIP_KEYS:
            raise ValueError(f"clip_grad.type={kind!r} must be 'norm' or 'value'.")
        for key in clip:
            if key != 'type' and key not in cls.CLIP_KEYS[kind]:
                raise ValueError(f"clip_grad has no key {key!r} with type='{kind}'; known are "
                                 f'{", ".join(cls.CLIP_KEYS[kind])}.{nearest(key, list(cls.CLIP_KEYS[kind]))}')
        limit = cls.CLIP_KEYS[kind][0]
        if not isinstance(clip.get(limit), int | float) or not clip[limit] > 0:
            raise ValueError(f'clip_grad.{limit}={clip.get(limit)} must be given and above 0; for no clipping set '
                             'clip_grad=None.')
        return clip

    @property
    def accumulative_counts(self) -> int:
        """Micro-batches of an iteration."""
        return self._accumulative_counts

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Called by the runner with its own iterations done and to do; counts micro-batches from then on."""
        counts = self._accumulative_counts
        super().initialize_count_status(model, init_counts * counts, max_counts * counts)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Add the gradients of one micro-batch, scaled under 'fp16'."""
        if self.loss_scaler is not None:
            loss = self.loss_scaler.scale(loss)
        super().backward(loss, **kwargs)

    def zero_grad(self, **kwargs: Any) -> None:
        """Free the gradients, or fill them with zeros."""
        self.optimizer.zero_grad(**{'set_to_none': self.set_grads_to_none, **kwargs})

    def step(self, **kwargs: Any) -> None:
        """Clip the gradients and step the optimizer.

        The norm is read back before the step, also without clipping: one pass over the gradients and one wait for
        the device an iteration, against weights (and the checkpoint after them) that turn NaN without a word.

        Raises:
            FloatingPointError: a gradient is not finite; no weight and no optimizer state has changed. Under 'fp16':
                the loss scale has fallen below `MIN_LOSS_SCALE`.
        """
        if self.loss_scaler is not None:
            self.loss_scaler.unscale_(self.optimizer)
        norm = self._clip()
        if math.isfinite(norm):
            self.message_hub.update_scalar('train/grad_norm', norm)
        elif self.loss_scaler is None:
            raise FloatingPointError(f'The gradients of {self._not_finite()} are not finite (norm {norm}); '
                                     'no weight was changed.')
        if self.loss_scaler is None:
            self.optimizer.step(**kwargs)
            return
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update()
        scale = self.loss_scaler.get_scale()
        self.message_hub.update_scalar('train/loss_scale', scale)
        if scale < self.MIN_LOSS_SCALE:
            raise FloatingPointError(f'The gradients of {self._not_finite() or "all parameters"} overflow at every '
                                     f'loss scale down to {scale:.1e}; no weight was changed since they began to.')

    def _clip(self) -> float:
        """The norm of all gradients before clipping; clips them if that is configured."""
        arguments = dict(self.clip_grad_kwargs or {})
        parameters = [p for p in self._parameters() if p.grad is not None]
        by_norm = 'max_norm' in arguments
        norm_type = arguments.get('norm_type', 2.0) if by_norm else 2.0
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], norm_type,
                                              foreach=arguments.get('foreach'))
        norm = float(total)
        if math.isfinite(norm) and by_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, arguments['max_norm'], total, arguments.get('foreach'))
        elif math.isfinite(norm) and arguments:
            torch.nn.utils.clip_grad_value_(parameters, **arguments)
        return norm

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group['params']]

    def _not_finite(self) -> str:
        """The names of the groups whose gradients are not finite."""
        bad = [str(group.get('name', i)) for i, group in enumerate(self.optimizer.param_groups)
               if not all(bool(torch.isfinite(p.grad).all()) for p in group['params'] if p.grad is not None)]
        return ', '.join(repr(name) for name in bad)

    def get_lr(self) -> dict[str, list[float]]:
        """Learning rates for the log: 'lr' of the first group and, if there are several, '<group name>_lr' of each.

        A group without one (Adafactor's relative steps) is left out.
        """
        groups = self.optimizer.param_groups
        named = {f'{g.get("name", i)}_lr': g for i, g in enumerate(groups)} if len(groups) > 1 else {}
        return {name: [float(g['lr'])] for name, g in {'lr': groups[0], **named}.items() if g['lr'] is not None}

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and, under 'fp16', the loss scale as 'loss_scaler'."""
        state = super().state_dict()
        if self.loss_scaler is not None:
            state['loss_scaler'] = self.loss_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` gave, also from a run of another precision.

        Raises:
            ValueError: the state belongs to other parameter groups (torch matches them by order alone).
        """
        state = {k: v for k, v in state_dict.items() if k not in ('loss_scaler', 'base_param_settings')}
        saved = [group.get('name') for group in state['param_groups']]
        here = [group.get('name') for group in self.optimizer.param_groups]
        if saved != here:
            raise ValueError(f'The optimizer state was saved for {saved}, in this order, and cannot be loaded for '
                             f'{here}: resume with the adapters and trained parts that the run began with.')
        self.optimizer.load_state_dict(state)
        if self.loss_scaler is not None and state_dict.get('loss_scaler'):
            self.loss_scaler.load_state_dict(state_dict['loss_scaler'])


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class AdapterOptimWrapperConstructor:
    """One parameter group for each adapter or trained part of the base, as `model.trainables()` names them.

    Args:
        optim_wrapper_cfg: dict(type='StepOptimWrapper', optimizer=dict(type='AdamW', lr=1e-5), ...).
        paramwise_cfg: optimizer argument -> {name: value}, for those that differ from `optimizer`:
            dict(lr={'style': 1e-4, 'text_encoder': 5e-6}, weight_decay={'style': 0.0}).

    Raises:
        ValueError: when called: nothing is trained, or a name or argument that is not known.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        if not isinstance(optim_wrapper_cfg, dict) or 'optimizer' not in optim_wrapper_cfg:
            raise ValueError("optim_wrapper must be a dict that holds `optimizer`, as dict(type='AdamW', lr=1e-5).")
        self.optim_wrapper_cfg = optim_wrapper_cfg
        self.paramwise_cfg = dict(paramwise_cfg or {})

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """The optimizer wrapper for `model`, which may be wrapped in DDP."""
        cfg = dict(self.optim_wrapper_cfg)
        cfg.setdefault('type', 'StepOptimWrapper')
        # None stands for the optimizer's own default, so that an override can take a key out.
        settings = {k: v for k, v in cfg['optimizer'].items() if v is not None}
        try:
            optimizer = OPTIMIZERS.build({**settings, 'params': self.groups(model)})
        except TypeError as error:
            raise ValueError(f"optim_wrapper.optimizer (type='{settings.get('type')}'): {error}. Take a key out by "
                             'setting it to None.') from error
        for key in self.paramwise_cfg:
            if key not in optimizer.defaults:
                raise ValueError(f"paramwise_cfg.{key} is no argument of {type(optimizer).__name__}."
                                 f'{nearest(key, list(optimizer.defaults))}')
        return OPTIM_WRAPPERS.build({**cfg, 'optimizer': optimizer})

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameter groups, each with its 'name'."""
        model = getattr(model, 'module', model)
        trained: dict[str, list[tuple[str, nn.Parameter]]] = model.trainables()  # type: ignore[operator]
        groups: dict[str, dict[str, Any]] = {name: {'params': [p for _, p in named], 'name': name}
                                             for name, named in trained.items() if named}
        if not groups:
            raise ValueError('Nothing to train: no adapter has trainable parameters and the config names no part of '
                             'the base to train. Add an adapter to model.adapters.')
        for key, per_name in self.paramwise_cfg.items():
            if not isinstance(per_name, Mapping):
                raise ValueError(f'paramwise_cfg.{key}={per_name!r} must be a dict from adapter or part to value; a '
                                 f'value for all belongs in optimizer.{key}.')
            for name, value in per_name.items():
                if name not in groups:
                    raise ValueError(f'paramwise_cfg.{key} names {name!r}, which is not trained; trained are '
                                     f'{", ".join(groups)}.{nearest(str(name), list(groups))}')
                groups[name][key] = value
        return list(groups.values())


_COUNTS = ('num_warmup_steps', 'num_training_steps')
_SCHEDULE_ARGUMENTS = {'constant': (), 'constant_with_warmup': ('num_warmup_steps',), 'linear': _COUNTS,
                       'cosine': (*_COUNTS, 'num_cycles'), 'cosine_with_restarts': (*_COUNTS, 'num_cycles'),
                       'polynomial': (*_COUNTS, 'power', 'lr_end'), 'piecewise_constant': ('step_rules',)}


@PARAM_SCHEDULERS.register_module()
class DiffusersLR(LRSchedulerMixin, _ParamScheduler):
    """The learning rates of the diffusers scripts: each group's own rate times diffusers' factor, bitwise.

    The factor itself comes from `diffusers.optimization`. Arguments that a schedule doesn't have are ignored, as by
    `--lr_scheduler` there. Counts are optimizer steps.

    Args:
        optimizer: optimizer or wrapper.
        name: 'constant', 'constant_with_warmup', 'linear', 'cosine', 'cosine_with_restarts', 'polynomial' or
            'piecewise_constant'.
        num_warmup_steps: steps from 0 to the full rate.
        num_training_steps: where the schedule ends; None means `end`, which the runner sets to its `max_iters`.
        num_cycles: of the cosine; None means diffusers' own: 0.5 for 'cosine', 1 for 'cosine_with_restarts'. (The
            scripts pass theirs to the latter only.)
        power, lr_end: of 'polynomial'; lr_end is the end of a group that has the optimizer's default rate.
        step_rules: of 'piecewise_constant', as '1:10,0.1:20,0.01'.
        begin: first step at which the rate is touched; the schedule counts from there. end: first step at which it
            is not touched any more.

    Raises:
        ValueError: an unknown name, or a schedule that lacks its arguments.
    """

    def __init__(self, optimizer: Any, name: str = 'constant', num_warmup_steps: int = 0,
                 num_training_steps: int | None = None, num_cycles: float | None = None, power: float = 1.0,
                 lr_end: float = 1e-7, step_rules: str | None = None, begin: int = 0, end: int = INF,
                 by_epoch: bool = False, last_step: int = -1, verbose: bool = False) -> None:
        if name not in _SCHEDULE_ARGUMENTS:
            raise ValueError(f'name={name!r} of DiffusersLR must be one of {", ".join(_SCHEDULE_ARGUMENTS)}.'
                             f'{nearest(str(name), list(_SCHEDULE_ARGUMENTS))}')
        if by_epoch:
            raise ValueError('DiffusersLR counts optimizer steps: by_epoch must be False.')
        if num_training_steps is None and end < INF:
            num_training_steps = end - begin
        given = {'num_warmup_steps': num_warmup_steps, 'num_training_steps': num_training_steps, 'power': power,
                 'lr_end': lr_end, 'step_rules': step_rules}
        arguments = {key: given[key] for key in _SCHEDULE_ARGUMENTS[name] if key != 'num_cycles'}
        missing = [key for key, value in arguments.items() if value is None]
        if missing:
            raise ValueError(f'DiffusersLR with name={name!r} needs {" and ".join(missing)}.')
        if num_cycles is not None and 'num_cycles' in _SCHEDULE_ARGUMENTS[name]:
            arguments['num_cycles'] = num_cycles
        # 'polynomial' reads the default rate from the optimizer; nothing else of this stand-in matters
        stand_in = torch.optim.SGD([torch.zeros(1)], lr=optimizer.defaults.get('lr') or 1.0)
        make: Callable[..., LambdaLR] = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]  # type: ignore[assignment]
        self._factor = make(stand_in, **arguments).lr_lambdas[0]
        super().__init__(optimizer, begin=begin, end=end, by_epoch=False, last_step=last_step, verbose=verbose)

    def _get_value(self) -> list[float | None]:
        """Each group's rate at `last_step`; None stays None (Adafactor's relative steps)."""
        factor = self._factor(self.last_step)
        return [None if base is None else base * factor for base in self.base_values]

    def print_value(self, is_verbose: bool, group: int, value: float | None) -> None:
        """As mmengine's, for a group that has a rate."""
        if value is not None:
            super().print_value(is_verbose, group, value)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, as plain numbers. Its shape is the config's, so that a run may be made longer."""
        return {'_global_step': self._global_step, 'base_values': list(self.base_values)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to the saved step and set the rates of that step; load the optimizer's state first."""
        self._global_step = int(state_dict['_global_step'])
        self.base_values = list(state_dict['base_values'])
        # the place in the schedule follows from the step: a run that had ended goes on where a longer one would be
        self.last_step = max(-1, min(self._global_step, self.end - 1) - self.begin)
        if self.begin <= self._global_step < self.end:
            for group, value in zip(self.optimizer.param_groups, self._get_value(), strict=True):
                group['lr'] = value
        self._last_value = [group['lr'] for group in self.optimizer.param_groups]
