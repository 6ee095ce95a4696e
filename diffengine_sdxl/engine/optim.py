"""Optimizers, the wrapper that steps them, and parameter groups.

An iteration is one optimizer step of `accumulative_counts` micro-batches.

Optimizers by name, besides all of torch.optim: `AdamW8bit` (bitsandbytes), `Prodigy` (prodigyopt), `Adafactor`
(transformers, with relative steps; torch's own is `TorchAdafactor`, as mmengine names it).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from diffengine_sdxl.errors import UserError, did_you_mean, first_line, one_of, whole_number
from diffengine_sdxl.protocols import Denoiser
from diffengine_sdxl.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS


def _third_party(module: str, name: str, package: str) -> Callable[..., Optimizer]:
    """Import the optimizer class `module.name`.

    Raises:
        UserError: the package is not installed, or lacks the class.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"optimizer type='{name}' needs the package {package}, which cannot be imported ({error}). "
                        f"Install it with `pip install {package}`, or choose another optimizer, such as type='AdamW'."
                        ) from error


@OPTIMIZERS.register_module()
def AdamW8bit(params: Any, **kwargs: Any) -> Optimizer:  # noqa: N802
    """AdamW with 8-bit states (Dettmers et al. 2022, arXiv 2110.02861), of bitsandbytes.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    return _third_party('bitsandbytes.optim', 'AdamW8bit', 'bitsandbytes')(params, **kwargs)


@OPTIMIZERS.register_module()
def Prodigy(params: Any, **kwargs: Any) -> Optimizer:  # noqa: N802
    """AdamW that finds its own learning rate (Mishchenko & Defazio 2023, arXiv 2306.06101), of prodigyopt; keep lr=1.

    All parameter groups must share one lr, or have lr=0.

    Raises:
        UserError: prodigyopt is not installed.
    """
    return _third_party('prodigyopt', 'Prodigy', 'prodigyopt')(params, **kwargs)


@OPTIMIZERS.register_module()
def Adafactor(params: Any, lr: float | None = None, **kwargs: Any) -> Optimizer:  # noqa: N802
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) of transformers.

    With lr=None its steps are relative to the weights and no schedule applies. With an lr, here or in a parameter
    group, `relative_step` defaults to False (in transformers to True, which then refuses the lr).

    Raises:
        UserError: this version of transformers has none, or an lr is combined with relative_step=True.
    """
    params = list(params)
    has_lr = lr is not None or any(isinstance(p, dict) and p.get('lr') is not None for p in params)
    kwargs.setdefault('relative_step', not has_lr)
    if has_lr and kwargs['relative_step']:
        raise UserError("optimizer type='Adafactor' takes either an lr or relative_step=True, not both.")
    return _third_party('transformers', 'Adafactor', 'transformers')(params, lr=lr, **kwargs)


@OPTIM_WRAPPERS.register_module()
class StepOptimWrapper(OptimWrapper):
    """Step the optimizer once every `accumulative_counts` micro-batches, never with a gradient that is not finite.

    Call `update_params(loss)` for every micro-batch, after a forward pass inside `optim_context(model)` (which makes
    DDP synchronize gradients in the last micro-batch only). The model enters autocast itself.

    Args:
        optimizer: holds fp32 parameters if `mixed_precision` is 'fp16'.
        accumulative_counts: micro-batches of an iteration; the gradient is that of their mean loss.
        clip_grad: dict(max_norm=1.0) or dict(type='value', clip_value=...): arguments of
            `torch.nn.utils.clip_grad_norm_` or `clip_grad_value_`. The norm before clipping is always logged as
            `grad_norm`.
        mixed_precision: 'no', 'fp16' or 'bf16'. 'fp16' scales the loss; a step whose gradients overflow is skipped
            and the scale halves.
        loss_scale: arguments of `torch.amp.GradScaler` for 'fp16', as dict(init_scale=65536.0, growth_interval=2000).
        set_grads_to_none: free gradients after a step instead of filling them with zeros.

    Raises:
        UserError: an argument is unknown or out of range, or parameters are fp16 under 'fp16'.
    """

    PRECISIONS = ('no', 'fp16', 'bf16')
    #: clip_grad.type -> the limit, and the other arguments.
    CLIP_KEYS = {'norm': ('max_norm', 'norm_type', 'foreach'), 'value': ('clip_value', 'foreach')}
    MIN_LOSS_SCALE = 1e-4  # 30 overflows in a row from the default: the gradients are broken, not large

    def __init__(self, optimizer: Optimizer, accumulative_counts: int = 1, clip_grad: Mapping[str, Any] | None = None,
                 mixed_precision: str = 'no', loss_scale: Mapping[str, Any] | None = None,
                 set_grads_to_none: bool = True) -> None:
        accumulative_counts = whole_number('optim_wrapper.accumulative_counts', accumulative_counts, 1)
        one_of('optim_wrapper.mixed_precision', mixed_precision, self.PRECISIONS)
        super().__init__(optimizer, accumulative_counts, self._check_clip(clip_grad))
        # With several groups mmengine logs the rate of a made-up one; `get_lr` below logs each group's.
        self.base_param_settings = None
        self.set_grads_to_none = set_grads_to_none
        self.loss_scaler: torch.amp.GradScaler | None = None
        if mixed_precision == 'fp16':
            parameters = self._parameters()
            if any(p.dtype == torch.float16 for p in parameters):
                raise UserError("mixed_precision='fp16' needs the trained weights in fp32: their gradients cannot be "
                                "unscaled in fp16. Set the dtype of the trained parts to 'float32'.")
            device = parameters[0].device.type if parameters else 'cpu'
            try:
                self.loss_scaler = torch.amp.GradScaler(device, **dict(loss_scale or {}))
            except (AssertionError, TypeError) as error:  # assert: a factor out of range
                raise UserError(f'optim_wrapper.loss_scale={loss_scale!r}: {first_line(error)}') from error

    @classmethod
    def _check_clip(cls, clip_grad: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if clip_grad is None:
            return None
        one_of('clip_grad.type', kind := clip_grad.get('type', 'norm'), cls.CLIP_KEYS)
        for key in clip_grad:
            if key != 'type' and key not in cls.CLIP_KEYS[kind]:
                raise UserError(f"clip_grad has no key {key!r} with type='{kind}'; known are "
                                f'{", ".join(cls.CLIP_KEYS[kind])}.{did_you_mean(key, cls.CLIP_KEYS[kind])}')
        key = cls.CLIP_KEYS[kind][0]
        limit = clip_grad.get(key)
        if not isinstance(limit, int | float) or not limit > 0:
            raise UserError(f'clip_grad.{key}={limit} must be set and above 0; for no clipping set clip_grad=None.')
        return dict(clip_grad)

    @property
    def accumulative_counts(self) -> int:
        """Micro-batches of an iteration."""
        return self._accumulative_counts

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Convert the runner's counts of iterations to micro-batches."""
        counts = self._accumulative_counts
        super().initialize_count_status(model, init_counts * counts, max_counts * counts)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Accumulate the gradients of one micro-batch, scaled under 'fp16'."""
        if self.loss_scaler is not None:
            loss = self.loss_scaler.scale(loss)
        super().backward(loss, **kwargs)

    def zero_grad(self, **kwargs: Any) -> None:
        """Free the gradients, or fill them with zeros."""
        self.optimizer.zero_grad(**{'set_to_none': self.set_grads_to_none, **kwargs})

    def step(self, **kwargs: Any) -> None:
        """Clip the gradients and step the optimizer.

        The norm is read back before the step, even without clipping: one pass over the gradients and one device sync
        per iteration, so that weights and checkpoints never silently become NaN.

        Raises:
            FloatingPointError: a gradient is not finite; weights and optimizer state are unchanged. Under 'fp16': the
                loss scale has fallen below `MIN_LOSS_SCALE`.
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
                                     f'loss scale down to {scale:.1e}; no weight has changed since.')

    def _clip(self) -> float:
        """Clip the gradients if configured; return their norm before clipping."""
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
        """Return the names of the groups with gradients that are not finite."""
        bad = [str(group.get('name', i)) for i, group in enumerate(self.optimizer.param_groups)
               if not all(bool(torch.isfinite(p.grad).all()) for p in group['params'] if p.grad is not None)]
        return ', '.join(repr(name) for name in bad)

    def get_lr(self) -> dict[str, list[float]]:
        """Return learning rates for the log: 'lr' of the first group and, of several, '<group name>_lr' of each.

        Groups without one (Adafactor's relative steps) are left out.
        """
        groups = self.optimizer.param_groups
        named = {f'{g.get("name", i)}_lr': g for i, g in enumerate(groups)} if len(groups) > 1 else {}
        return {name: [float(g['lr'])] for name, g in {'lr': groups[0], **named}.items() if g['lr'] is not None}

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state and, under 'fp16', the loss scale as 'loss_scaler'."""
        state = super().state_dict()
        if self.loss_scaler is not None:
            state['loss_scaler'] = self.loss_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state dict, also from a run of another precision.

        Raises:
            UserError: the state belongs to other parameter groups (torch matches them by order alone).
        """
        state = {k: v for k, v in state_dict.items() if k not in ('loss_scaler', 'base_param_settings')}
        saved = [group.get('name') for group in state['param_groups']]
        current = [group.get('name') for group in self.optimizer.param_groups]
        if saved != current:
            raise UserError(f'The optimizer state was saved for {saved}, in this order, and cannot be loaded for '
                            f'{current}: resume with the adapters and trained parts that the run started with.')
        self.optimizer.load_state_dict(state)
        if self.loss_scaler is not None and state_dict.get('loss_scaler'):
            self.loss_scaler.load_state_dict(state_dict['loss_scaler'])


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class AdapterOptimWrapperConstructor:
    """Build the optimizer with one parameter group for each adapter or trained part of the base.

    Args:
        optim_wrapper_cfg: dict(type='StepOptimWrapper', optimizer=dict(type='AdamW', lr=1e-5), ...).
        paramwise_cfg: optimizer argument -> {name: value}, where it differs from `optimizer`. A name is that of an
            adapter or part, or of a module within it, which then has its own group (the longest name wins):
            dict(lr={'style': 1e-4, 'style.text_encoder': 5e-6, 'style.unet.mid_block': 2e-5}).

    Raises:
        UserError: when called: nothing is trained, or a name or argument is unknown.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        if not isinstance(optim_wrapper_cfg, dict) or 'optimizer' not in optim_wrapper_cfg:
            raise UserError("optim_wrapper must be a dict with the key `optimizer`, as dict(type='AdamW', lr=1e-5).")
        self.optim_wrapper_cfg = optim_wrapper_cfg
        self.paramwise_cfg: dict[str, dict[str, Any]] = {}
        for key, values in (paramwise_cfg or {}).items():
            if not isinstance(values, Mapping):
                raise UserError(f'paramwise_cfg.{key}={values!r} must be a dict from adapter or part to value; a value '
                                f'for all belongs in optimizer.{key}.')
            self.paramwise_cfg[key] = _flatten(values)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Return the optimizer wrapper for `model`, which may be wrapped in DDP."""
        # None means the optimizer's default, so that an override can remove a key.
        settings = {k: v for k, v in self.optim_wrapper_cfg['optimizer'].items() if v is not None}
        host: Any = model
        kind = str(settings.pop('type', None))
        groups = self.param_groups(getattr(host, 'module', host))
        try:
            optimizer = OPTIMIZERS.get(kind)(groups, **settings)
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise UserError(f"optim_wrapper.optimizer (type='{kind}'): {first_line(error)}. Remove a "
                            'key by setting it to None.') from error
        for key in self.paramwise_cfg:
            if key not in optimizer.defaults:
                raise UserError(f'paramwise_cfg.{key} is not an argument of {type(optimizer).__name__}.'
                               f'{did_you_mean(key, list(optimizer.defaults))}')
            for name, value in self.paramwise_cfg[key].items():
                if isinstance(optimizer.defaults[key], float) and not isinstance(value, int | float):
                    raise UserError(f"paramwise_cfg.{key}['{name}']={value!r} must be a number.")
        return OPTIM_WRAPPERS.build({'type': 'StepOptimWrapper', **self.optim_wrapper_cfg, 'optimizer': optimizer})

    def param_groups(self, model: Denoiser) -> list[dict[str, Any]]:
        """Return the parameter groups, each with its 'name'."""
        trained = {name: parameters for name, parameters in model.trainables().items() if parameters}
        if not trained:
            raise UserError('Nothing to train: no adapter has trainable parameters and the config names no part of '
                            'the base to train. Add an adapter to model.adapters.')
        groups = self._split(trained)
        for key, values in self.paramwise_cfg.items():
            # Shorter names first: an adapter's value holds for its modules that have none.
            for name, value in sorted(values.items(), key=lambda item: len(item[0])):
                matching = [group for group in groups if f'{group["name"]}.'.startswith(f'{name}.')]
                if not matching:
                    raise UserError(f'paramwise_cfg.{key} names {name!r}, which is not trained; trained are '
                                    f'{", ".join(trained)}, and modules within them.{did_you_mean(name, trained)}')
                for group in matching:
                    group[key] = value
        return groups

    def _split(self, trained: Mapping[str, list[tuple[str, nn.Parameter]]]) -> list[dict[str, Any]]:
        """Make a group for each adapter or part, and for each module within it that `paramwise_cfg` names."""
        groups: dict[str, dict[str, Any]] = {}
        names = {name for values in self.paramwise_cfg.values() for name in values}
        for owner, parameters in trained.items():
            modules = sorted((n for n in names if n.startswith(f'{owner}.')), key=len, reverse=True)
            for full_name, parameter in parameters:
                # An adapter's own modules go by their name within it, LoRA's by that of the base's module.
                path = f'{owner}.{full_name.removeprefix(f"adapters.{owner}.").removeprefix(f"{owner}.")}.'
                name = next((n for n in modules if path.startswith(f'{n}.')), owner)
                groups.setdefault(name, {'params': [], 'name': name})['params'].append(parameter)
        return list(groups.values())


def _flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Turn {'style': {'unet': 1}} into {'style.unet': 1}: overrides with dotted names write nested dicts."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f'{prefix}{name}.') if isinstance(value, Mapping) else {f'{prefix}{name}': value}
    return flat
