"""The wrapper that steps the optimizer, and parameter groups.

An iteration is one optimizer step of `accumulative_counts` micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from diffengine_sdxl.errors import UserError, did_you_mean, first_line, one_of, whole_number
from diffengine_sdxl.protocols import Denoiser
from diffengine_sdxl.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS


def decides_on_device(parameters: Sequence[nn.Parameter]) -> bool:
    """Return whether the device itself shall leave out a step whose gradients are not finite.

    So on an accelerator, whose queue would run empty while the host waits for their norm.
    """
    return bool(parameters) and all(p.device.type != 'cpu' for p in parameters)


@OPTIM_WRAPPERS.register_module()
class StepOptimWrapper(OptimWrapper):
    """Step the optimizer once every `accumulative_counts` micro-batches, never with a gradient that is not finite.

    Call `update_params(loss)` for every micro-batch, after a forward pass inside `optim_context(model)` (which makes
    DDP synchronize gradients in the last micro-batch only). The model enters autocast itself.

    With fused Adam or AdamW on an accelerator the host never waits: the optimizer's kernel leaves out a step whose
    gradients are not finite, and all later ones, until the run stops because the host has read that step's `reports`.
    Under 'fp16' it leaves out steps that overflow, and all once the loss scale is too small. Schedules go on in steps
    left out, on every device: the host learns of them too late.

    Attributes:
        on_device: whether it is so. Then pass what came of `reports` to `arrived`, and losses to `stop_if`.
        skipped: whether the last step changed nothing: a bool, or fp32 0 or 1 on the device.
        reports: scalars of the last step on the device: 'grad_norm', and under 'fp16' 'loss_scale'.
        group_norms: the norms of the gradients of each parameter group, on the device.

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
        parameters = self._parameters()
        self.on_device = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and all(
            group['fused'] for group in optimizer.param_groups) and decides_on_device(parameters)
        self.skipped: bool | Tensor = False
        self.reports: dict[str, Tensor] = {}
        self.group_norms: dict[str, Tensor] = {}
        #: fp32 1 from the first step on that stops the run.
        self._stopped = torch.zeros((), device=parameters[0].device) if self.on_device else torch.zeros(())
        if mixed_precision == 'fp16':
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

        The norm is taken before the step, even without clipping: one pass over the gradients, so that weights and
        checkpoints never silently become NaN. It is read back here, unless `on_device`.

        Raises:
            FloatingPointError: see `arrived`; not here if `on_device`.
        """
        if self.loss_scaler is not None:
            self.loss_scaler.unscale_(self.optimizer)
        if self.on_device:
            self._step_on_device(**kwargs)
            return
        self._check_norm(self._clip(), self._not_finite)
        if self.loss_scaler is None:
            self.optimizer.step(**kwargs)
            return
        self.loss_scaler.step(self.optimizer, **kwargs)
        before = self.loss_scaler.get_scale()
        self.loss_scaler.update()
        scale = self.loss_scaler.get_scale()
        self.skipped = scale < before
        self._check_scale(scale, self._not_finite)

    def _step_on_device(self, **kwargs: Any) -> None:
        """Clip and step; the kernel changes nothing, the optimizer's count of steps included, if `found_inf` is 1."""
        self.group_norms = {}
        for i, group in enumerate(self.optimizer.param_groups):
            if grads := [p.grad for p in group['params'] if p.grad is not None]:
                self.group_norms[str(group.get('name', i))] = self._norm(grads)
        total = torch.linalg.vector_norm(torch.stack(list(self.group_norms.values())), self._norm_type)
        self._limit(total)
        self.reports = {'grad_norm': total}
        optimizer: Any = self.optimizer
        skipped = torch.maximum(self._stopped, (~torch.isfinite(total)).float())
        # torch.amp's contract with fused optimizers; GradScaler.step would not know of the other reasons to stop.
        optimizer.grad_scale, optimizer.found_inf = None, skipped
        optimizer.step(**kwargs)
        self.skipped = skipped
        if self.loss_scaler is None:
            self._stopped = skipped
            return
        self.loss_scaler.update()
        scaler: Any = self.loss_scaler
        self.reports['loss_scale'] = scaler._scale  # `get_scale` would wait
        self._stopped = torch.maximum(self._stopped, (scaler._scale < self.MIN_LOSS_SCALE).float())

    def stop_if(self, bad: Tensor) -> None:
        """Change nothing from now on if `bad` (bool, one number on the device; the same in all processes)."""
        self._stopped = torch.maximum(self._stopped, bad.float())
        self.skipped = torch.maximum(torch.as_tensor(self.skipped), bad.float())

    def arrived(self, reports: Mapping[str, float], group_norms: Mapping[str, float]) -> None:
        """Log a step's norm and loss scale, `reports` and `group_norms` of it having come from the device.

        Raises:
            FloatingPointError: a gradient was not finite; weights and optimizer state are as before the step. Under
                'fp16': the loss scale has fallen below `MIN_LOSS_SCALE`.
        """
        def bad() -> str:
            return ', '.join(repr(name) for name, norm in group_norms.items() if not math.isfinite(norm))
        if reports:
            self._check_norm(reports['grad_norm'], bad)
        if 'loss_scale' in reports:
            self._check_scale(reports['loss_scale'], bad)

    def _check_norm(self, norm: float, bad: Callable[[], str]) -> None:
        """Log the norm; `bad` names the groups that are not finite."""
        if math.isfinite(norm):
            self.message_hub.update_scalar('train/grad_norm', norm)
        elif self.loss_scaler is None:
            raise FloatingPointError(f'The gradients of {bad()} are not finite (norm {norm}); no weight was changed.')

    def _check_scale(self, scale: float, bad: Callable[[], str]) -> None:
        self.message_hub.update_scalar('train/loss_scale', scale)
        if scale < self.MIN_LOSS_SCALE:
            raise FloatingPointError(f'The gradients of {bad() or "all parameters"} overflow at every loss scale down '
                                     f'to {scale:.1e}; no weight has changed since.')

    @property
    def _norm_type(self) -> float:
        return float((self.clip_grad_kwargs or {}).get('norm_type', 2.0))

    def _norm(self, grads: list[Tensor]) -> Tensor:
        foreach = (self.clip_grad_kwargs or {}).get('foreach')
        return torch.nn.utils.get_total_norm(grads, self._norm_type, foreach=foreach)

    def _clip(self) -> float:
        """Clip the gradients if configured and finite; return their norm before clipping."""
        total = self._norm([p.grad for p in self._parameters() if p.grad is not None])
        norm = float(total)
        if math.isfinite(norm):
            self._limit(total)
        return norm

    def _limit(self, total: Tensor) -> None:
        """Clip the gradients, whose norm is `total`, if configured, without reading anything back."""
        arguments = dict(self.clip_grad_kwargs or {})
        parameters = [p for p in self._parameters() if p.grad is not None]
        if 'max_norm' in arguments:
            torch.nn.utils.clip_grads_with_norm_(parameters, arguments['max_norm'], total, arguments.get('foreach'))
        elif arguments:
            torch.nn.utils.clip_grad_value_(parameters, **arguments)

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
        # How this machine computes a step is not the run's: fused on an accelerator, else not.
        groups = [{**group, **{key: own[key] for key in ('foreach', 'fused') if key in own}}
                  for group, own in zip(state['param_groups'], self.optimizer.param_groups, strict=True)]
        self.optimizer.load_state_dict({**state, 'param_groups': groups})
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
        if kind in ('Adam', 'AdamW') and decides_on_device([p for group in groups for p in group['params']]):
            settings.setdefault('fused', not settings.get('foreach') and not settings.get('differentiable'))
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
