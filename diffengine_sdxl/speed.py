"""The key `speed`: what makes a training step or an image cheaper, and what this machine and config allow of it.

'auto' is off on a CPU. `Speed.check` refuses before anything is loaded, `Speed.resolve` decides once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from diffengine_sdxl.errors import UserError, did_you_mean, one_of

#: Setting -> its values.
CHOICES = {
    'compile': ('auto', 'off', 'blocks', 'graph'),
    'checkpointing': ('auto', 'off', 'blocks', 'full'),
    'base_dtype': ('auto', 'bf16', 'fp16', 'fp8', 'int8'),
}
#: base_dtype -> what it stores the frozen linear layers of the UNet in, by torchao.
QUANTIZED = ('fp8', 'int8')
#: Names of torch's dtypes.
DTYPES = {'float64': 'fp64', 'float32': 'fp32', 'bfloat16': 'bf16', 'float16': 'fp16'}
#: Optimizer steps below which compiling takes longer than it gains.
MIN_STEPS = 200
#: The compute capability from which on a GPU has fp8.
FP8_CAPABILITY = (8, 9)

#: GiB that a training step in bf16 saves for the backward pass, per image of 1024 x 1024 pixels, without compile, by
#: checkpointing: what `diffengine-sdxl plan` counts. By the type of the adapter that trains, or 'unet'.
SAVED_GIB = {
    'T2IAdapter': {'off': 5.1, 'blocks': 2.6, 'full': 0.7}, 'LoRA': {'off': 5.3, 'blocks': 2.6, 'full': 0.5},
    'IPAdapter': {'off': 5.8, 'blocks': 3.3, 'full': 1.3}, 'ControlNet': {'off': 8.6, 'blocks': 6.3, 'full': 3.2},
    'unet': {'off': 7.5, 'blocks': 4.2, 'full': 0.7}}
#: GiB of the weights that autocast casts once a step, where the whole UNet trains.
CAST_GIB = 4.8
#: The part of the free memory that may be planned for: the rest is workspace, fragments and the optimizer's transients.
USABLE = 0.85


@dataclass(frozen=True)
class Speed:
    """The config's `speed`, or what became of it.

    Attributes:
        compile: 'off'; 'blocks', torch.compile of the UNet's blocks; 'graph', its call as a CUDA graph, for images.
        checkpointing: which activations the backward pass recomputes: none ('off'), some ('blocks') or all ('full').
        base_dtype: what the frozen UNet is stored in. 'bf16' and 'fp16' are `mixed_precision`'s; 'fp8' and 'int8'
            quantize its linear layers (torchao), which changes results.
    """

    compile: str = 'auto'
    checkpointing: str = 'auto'
    base_dtype: str = 'auto'

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None, model: Mapping[str, Any]) -> Speed:
        """Read the key `speed` of a config, and `gradient_checkpointing` of its `model`, an alias of 'full'.

        Raises:
            UserError: a name or value is unknown, or the two contradict each other.
        """
        check_settings(settings or {})
        speed = cls(**(settings or {}))
        if model.get('gradient_checkpointing'):
            if speed.checkpointing not in ('auto', 'full'):
                raise UserError(f'model.gradient_checkpointing=True means speed.checkpointing=full, but the config has '
                                f"speed.checkpointing='{speed.checkpointing}'; set model.gradient_checkpointing=False.")
            speed = replace(speed, checkpointing='full')
        return speed

    def check(self, device: Any, model: Mapping[str, Any], *, training: bool, offload: bool = False,
              deterministic: bool = False) -> None:
        """Check that this device and config can do what the settings name; before anything is loaded.

        Args:
            device: a torch.device.
            model: the resolved config of the SDXL.
            offload: whether parts wait in the CPU's memory (`infer_cfg.offload`).
            deterministic: `randomness.deterministic`.

        Raises:
            UserError: it cannot; why, and what to set.
        """
        if self.compile == 'graph' and training:
            raise UserError("speed.compile='graph' is for images only: a training step's shapes and memory change; use "
                            "'blocks'.")
        if self.compile == 'graph' and device.type != 'cuda':
            raise UserError(f"speed.compile='graph' needs CUDA, and the device is {device.type}; use 'off' or "
                            "'blocks'.")
        if self.compile in ('blocks', 'graph') and offload:
            raise UserError(f"speed.compile='{self.compile}' does not go with offload=True, which moves the UNet away "
                            "after each use; set one of them: speed.compile=off, or infer_cfg.offload=False.")
        if self.compile == 'blocks' and deterministic:
            raise UserError("speed.compile='blocks' does not go with randomness.deterministic=True: the compiler "
                            'chooses kernels by measuring, so two runs may round differently. Set speed.compile=off.')
        if deterministic and model.get('attention') == 'xformers':
            raise UserError("model.attention='xformers' has no deterministic backward pass; use 'sdpa' with "
                            'randomness.deterministic=True.')
        if self.base_dtype in QUANTIZED:
            self._check_quantized(device, model)
        elif self.base_dtype != 'auto' and self.base_dtype != (stored := _stored(model)):
            raise UserError(f"speed.base_dtype='{self.base_dtype}', but the config stores the UNet in {stored}: set "
                            f"mixed_precision={self.base_dtype}, which is what it is computed in, or leave base_dtype "
                            "'auto'.")

    def _check_quantized(self, device: Any, model: Mapping[str, Any]) -> None:
        name = f"speed.base_dtype='{self.base_dtype}'"
        if model.get('trainable'):
            raise UserError(f'{name} is for a frozen base, but {", ".join(model["trainable"])} trains '
                            "(model.trainable); its export would hold the quantized UNet. Leave base_dtype 'auto'.")
        if self.base_dtype == 'fp8':
            self._check_fp8(device)
        if importlib.util.find_spec('torchao') is None:
            raise UserError(f'{name} needs the package torchao, which is not installed: pip install torchao.')

    @staticmethod
    def _check_fp8(device: Any) -> None:
        import torch
        if device.type != 'cuda':
            raise UserError(f"speed.base_dtype='fp8' needs a GPU, and the device is {device.type}; use 'int8'.")
        if (capability := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
            raise UserError(f"speed.base_dtype='fp8' needs a GPU of compute capability {_dotted(FP8_CAPABILITY)} or "
                            f"more; {torch.cuda.get_device_name(device)} has {_dotted(capability)}. Use 'int8'.")

    def resolve(self, device_type: str, dtype: Any, *, steps: int = 0, attention: str = 'sdpa', offload: bool = False,
                deterministic: bool = False, memory: Memory | None = None,
                recorded: Mapping[str, str] | None = None) -> Speed:
        """Decide what is 'auto'; `base_dtype` becomes the name of what the UNet is stored in.

        Args:
            device_type: 'cpu', 'cuda', ...
            dtype: the torch.dtype of the UNet before it is quantized.
            steps: optimizer steps to do; 0 for images, where a single one would wait for the compiler in vain.
            memory: of a training on CUDA; None keeps everything that is saved.
            recorded: what a resumed run had chosen, on a device of this type.
        """
        recorded = recorded or {}
        gains = device_type == 'cuda' and steps >= MIN_STEPS and attention == 'sdpa' and not (offload or deterministic)
        automatic = {'compile': 'blocks' if gains else 'off',
                     'checkpointing': 'off' if memory is None else memory.checkpointing(),
                     'base_dtype': DTYPES[str(dtype).removeprefix('torch.')]}
        chosen = {name: recorded.get(name, automatic[name]) if value == 'auto' else value
                  for name, value in asdict(self).items()}
        return Speed(**chosen)

    def __str__(self) -> str:
        """Describe what was resolved, for people: 'blocks compiled, checkpointing off, base bf16'."""
        compiled = {'off': 'not compiled', 'blocks': 'blocks compiled', 'graph': 'the UNet as a CUDA graph'}
        return f'{compiled.get(self.compile, self.compile)}, checkpointing {self.checkpointing}, base {self.base_dtype}'


@dataclass(frozen=True)
class Memory:
    """What a training step needs, counted, and what the device has free.

    Attributes:
        free: bytes, once the weights are on the device.
        trained: bytes of the gradients and optimizer states to come.
        saved: bytes that the forward pass keeps for the backward pass, by checkpointing.
    """

    free: int
    trained: int
    saved: Mapping[str, int]

    @classmethod
    def of(cls, model: Mapping[str, Any], *, free: int, trained: int, batch_size: int, pixels: int,
           bytes_per_value: int) -> Memory:
        """Estimate it.

        Args:
            model: the resolved config of the SDXL, for what trains.
            trained: parameters that train, each with an fp32 gradient and two moments.
            pixels: of one image.
            bytes_per_value: of the dtype that the UNet computes in.
        """
        kinds = [str(config.get('type')) for config in (model.get('adapters') or {}).values()
                 if config is not None and config.get('trainable', True)]
        kinds += ['unet'] if 'unet' in (model.get('trainable') or ()) else []
        images = batch_size * pixels / 2**20 * bytes_per_value / 2
        cast = CAST_GIB if kinds[-1:] == ['unet'] and bytes_per_value < 4 else 0.0
        rows = [SAVED_GIB.get(kind, SAVED_GIB['LoRA']) for kind in kinds] or [SAVED_GIB['LoRA']]
        return cls(free, trained * 12, {mode: int((cast + images * max(row[mode] for row in rows)) * 2**30)
                                        for mode in rows[0]})

    def checkpointing(self) -> str:
        """Return the least checkpointing with which the step fits, 'full' if none does."""
        usable = USABLE * self.free - self.trained
        return next((mode for mode in ('off', 'blocks') if self.saved[mode] <= usable), 'full')


def image_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width of a config's images, in pixels: of its key `resolution`, else SDXL's own."""
    size = config.get('resolution', 1024)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the names and values of the key `speed`.

    Raises:
        UserError: one is unknown.
    """
    for name, value in settings.items():
        if name not in CHOICES:
            raise UserError(f"speed has no setting '{name}'.{did_you_mean(name, CHOICES)} They are "
                            f'{", ".join(CHOICES)}.')
        one_of(f'speed.{name}', value, CHOICES[name])


def _stored(model: Mapping[str, Any]) -> str:
    """Return the name of the dtype in which the config stores the UNet."""
    dtype = model.get('dtype')
    name = dtype.get('unet') if isinstance(dtype, Mapping) else dtype
    if name is not None:
        return DTYPES.get(str(name), str(name))
    precision = 'no' if 'unet' in (model.get('trainable') or ()) else model.get('mixed_precision', 'no')
    return 'fp32' if precision == 'no' else str(precision)


def _dotted(capability: tuple[int, ...]) -> str:
    return '.'.join(map(str, capability))
