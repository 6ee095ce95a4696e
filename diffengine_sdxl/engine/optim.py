"""What turns losses into new weights: optimizers, the wrapper that steps them, parameter groups.

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
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from diffengine_sdxl.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS, nearest


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
        paramwise_cfg: optimizer argument -> {name: value}, for those that differ from `optimizer`. A name is that of
            an adapter or part, or of a module within it, which makes a group of its own (the longest name wins):
            dict(lr={'style': 1e-4, 'style.text_encoder': 5e-6, 'style.unet.mid_block': 2e-5}).

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
        trained = {name: named for name, named in trained.items() if named}
        if not trained:
            raise ValueError('Nothing to train: no adapter has trainable parameters and the config names no part of '
                             'the base to train. Add an adapter to model.adapters.')
        for key, per_name in self.paramwise_cfg.items():
            if not isinstance(per_name, Mapping):
                raise ValueError(f'paramwise_cfg.{key}={per_name!r} must be a dict from adapter or part to value; a '
                                 f'value for all belongs in optimizer.{key}.')
            self.paramwise_cfg[key] = _flat(per_name)
        groups = self._split(trained, list(dict.fromkeys(n for names in self.paramwise_cfg.values() for n in names)))
        for key, per_name in self.paramwise_cfg.items():
            # The shorter first: what is set for an adapter holds for its modules, unless they have their own.
            for name, value in sorted(per_name.items(), key=lambda item: len(item[0])):
                found = [group for own, group in groups.items() if f'{own}.'.startswith(f'{name}.')]
                if not found:
                    raise ValueError(f'paramwise_cfg.{key} names {name!r}, which is not trained; trained are '
                                     f'{", ".join(trained)}, and modules within them.'
                                     f'{nearest(str(name), list(trained))}')
                for group in found:
                    group[key] = value
        return list(groups.values())

    @staticmethod
    def _split(trained: Mapping[str, list[tuple[str, nn.Parameter]]], names: list[str]) -> dict[str, dict[str, Any]]:
        """A group for each adapter or part, and one for each of `names` that is a module within."""
        groups: dict[str, dict[str, Any]] = {}
        for owner, parameters in trained.items():
            within = sorted((n for n in names if n.startswith(f'{owner}.')), key=len, reverse=True)
            for full, parameter in parameters:
                # An adapter's own modules go by their name within it; LoRA's by that of the part that they live in.
                place = f'{owner}.{full.removeprefix(f"adapters.{owner}.").removeprefix(f"{owner}.")}.'
                name = next((n for n in within if place.startswith(f'{n}.')), owner)
                groups.setdefault(name, {'params': [], 'name': name})['params'].append(parameter)
        return groups


def _flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """{'style': {'unet': 1}} as {'style.unet': 1}: dotted names become dicts where an override writes them."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f'{prefix}{name}.') if isinstance(value, Mapping) else {f'{prefix}{name}': value}
    return flat
