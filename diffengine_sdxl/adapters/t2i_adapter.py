"""T2I-Adapter: a small network that turns a control image into feature maps, added after the UNet's down blocks.

Mou et al. 2023, arXiv:2302.08453. The network is diffusers' `T2IAdapter` of type `full_adapter_xl`
(diffusers/models/adapter.py), so its folders are diffusers' folders; TencentARC's original files are read too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl.adapters.base import Adapter, Tensors
from diffengine_sdxl.adapters.formats.files import refuse
from diffengine_sdxl.adapters.formats.t2i_adapter import is_file, read_t2i_adapter
from diffengine_sdxl.registry import ADAPTERS
from diffengine_sdxl.structures import UNetCall
from diffengine_sdxl.weights import load_pretrained, told

#: The down blocks of SDXL; a T2I-Adapter gives one feature map for each and one for the mid block.
SDXL_LAYOUT = ('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D')


@ADAPTERS.register_module()
class T2IAdapter(Adapter):
    """Control by an image (edges, depth, sketch, pose ...) of the size of the picture, [B, C, H, W] in [0, 1].

    Features for SDXL: [B, 320, H/16, W/16], [B, 640, H/16, W/16], [B, 1280, H/32, W/32] twice.

    Args:
        reads, trainable, scale, window: see Adapter.
        weights: see Adapter; also a single file, of TencentARC's names or diffusers'.
        subfolder, revision, variant: of `weights`, when it is a folder or hub id.
        in_channels: channels of the control image.
        channels: widths of the four feature maps; None takes the base's.
        num_res_blocks: residual blocks for each feature map.
        downscale_factor: control image over first feature map; None takes twice the VAE's factor.

    Raises:
        ValueError: in `attach`, if the base is not of SDXL's block layout, or `weights` were made for another base.
    """

    of_picture_size = True
    place = 'after the down blocks'

    def __init__(self, reads: str = 'conditioning_image', weights: str | None = None, trainable: bool = True,
                 scale: float = 1.0, window: Sequence[float] = (0.0, 1.0), subfolder: str | None = None,
                 revision: str | None = None, variant: str | None = None, in_channels: int = 3,
                 channels: Sequence[int] | None = None, num_res_blocks: int = 2,
                 downscale_factor: int | None = None) -> None:
        super().__init__(reads, weights, trainable, scale, window)
        self.source = {'subfolder': subfolder, 'revision': revision, 'variant': variant}
        self.shape: dict[str, Any] = {'in_channels': in_channels, 'channels': channels,
                                      'num_res_blocks': num_res_blocks, 'downscale_factor': downscale_factor}

    def attach(self, model: Any) -> None:
        """Build the network for `model`'s widths; fresh weights depend on (seed, adapter name) alone."""
        from diffusers import T2IAdapter as Network
        config = model.unet.config
        layout = tuple(config.down_block_types)
        if layout != SDXL_LAYOUT:
            raise ValueError(f"T2IAdapter '{self.name}' serves bases of SDXL's block layout {SDXL_LAYOUT}; this one "
                             f'has {layout}' + (' (the refiner).' if len(layout) == 4 else '.'))
        widths = tuple(config.block_out_channels)
        # Some distilled models have no mid block; stock would leave a map for it unused and say nothing.
        channels = widths if model.unet.mid_block is None else (*widths, widths[-1])
        self.base = {'channels': channels, 'downscale_factor': 2 * model.vae_factor}
        if self.weights is not None:
            # fp32 whatever the file holds, as it trains; fp64 in an fp64 model.
            dtype = torch.promote_types(model.unet_weight.dtype, torch.float32)
            self.net = self._read(self.weights, dtype, **self.source)
        else:
            shape = {k: v if v is not None else self.base.get(k) for k, v in self.shape.items()}
            self.net = Network(**shape, adapter_type='full_adapter_xl')
        self._check_base(self.weights or 'its config')
        self.size_divisor = self.net.downscale_factor

    def detach(self, model: Any) -> None:
        """Nothing of it lives in the base."""
        del self.net

    def encode(self, batch: Any) -> Tensors:
        """The control image; nothing of a T2I-Adapter is frozen.

        Raises:
            ValueError: it is missing, has other channels, or its sides cannot be divided.
        """
        image = self._condition(batch)
        height, width = image.shape[-2:]
        wanted = self.net.config.in_channels
        if image.shape[1] != wanted:
            raise ValueError(f"Adapter '{self.name}' takes images of {wanted} channels; '{self.reads}' has "
                             f'{image.shape[1]}.')
        if height % self.size_divisor or width % self.size_divisor:
            raise ValueError(f"'{self.reads}' is {height} x {width}; the T2I-Adapter '{self.name}' needs sides that "
                             f'{self.size_divisor} divides. Change `resolution`.')
        return {'image': image}

    def uncond(self, tensors: Tensors) -> Tensors:
        """The control image too: it steers both branches of guidance, as in diffusers."""
        return tensors

    def project(self, tensors: Tensors) -> Tensors:
        """Control image to feature maps: {'f0' ... 'f3'}."""
        features = self.net(tensors['image'].to(self.net.dtype))
        return {f'f{i}': feature for i, feature in enumerate(features)}

    def expand(self, tensors: Tensors, branches: Sequence[str]) -> Tensors:
        """The network runs once and its features are repeated, so that a batch is bitwise diffusers'."""
        return {k: v.repeat(len(branches), 1, 1, 1) for k, v in self.project(tensors).items()}

    def contribute(self, call: UNetCall, tensors: Tensors) -> None:
        """Add the scaled features.

        Raises:
            ValueError: the control image has another size than the picture.
        """
        features: list[Tensor] = [tensors[f'f{i}'] for i in range(len(tensors))]
        expected = tuple((side + 1) // 2 for side in call.sample.shape[-2:])
        if tuple(features[0].shape[-2:]) != expected:
            factor = self.size_divisor
            raise ValueError(f"'{self.reads}' of adapter '{self.name}' must have the picture's size "
                             f'({expected[0] * factor} x {expected[1] * factor}); it gave features of '
                             f'{tuple(features[0].shape[-2:])} instead of {expected}.')
        scale = self._fixed_scale(call, len(features[0]))
        # In fp32, then back: an fp32 scale would promote bf16 features and the UNet fails on them.
        call.add_residuals([(feature.float() if feature.dtype.itemsize < 4 else feature) * scale
                            for feature in features])

    def to_stock(self, stock: Any) -> None:
        """A network of its own; the call is told its scale and the end of its window.

        Raises:
            ValueError: its window begins later than the first step.
        """
        start, end = self.window
        if start > 0:
            self._not_in_stock(f'its window {self.window} begins late, and there every T2I-Adapter acts from the first '
                               'step on')
        stock.add_network('adapter', self.name, self.net, {'adapter_conditioning_factor': end},
                          adapter_conditioning_scale=self.scale)

    def save(self, folder: str | Path) -> None:
        """Write diffusers' folder: config.json and diffusion_pytorch_model.safetensors."""
        self.net.save_pretrained(str(folder), safe_serialization=True)

    def load(self, source: str | Path) -> None:
        """Read diffusers' folder, or a single file of TencentARC's names or diffusers', in place.

        Raises:
            ValueError: a key is missing or misnamed, or the widths are another base's.
        """
        loaded = self._read(str(source), self.net.dtype)
        theirs, ours = _shape(loaded), _shape(self.net)
        if theirs != ours:
            faults = [f'{k}={theirs[k]} instead of {v}' for k, v in ours.items() if theirs[k] != v]
            raise ValueError(f"'{source}' does not fit the T2I-Adapter '{self.name}': it has {', '.join(faults)}.")
        self.net.load_state_dict(loaded.state_dict())

    def _read(self, source: str, dtype: torch.dtype, **settings: Any) -> Any:
        from diffusers import T2IAdapter as Network
        if is_file(source):
            # A file says nothing of the pixels that it takes together; a config or the base does.
            factor = self.shape['downscale_factor'] or self.base['downscale_factor']
            state, shape = read_t2i_adapter(source, len(self.base['channels']), factor,
                                            settings.get('revision'))
            with torch.device('meta'):  # no weights are drawn for what is filled at once
                net = Network(**shape, adapter_type='full_adapter_xl')
            refuse(source, of_another_shape=[k for k, v in net.state_dict().items() if v.shape != state[k].shape])
            net.load_state_dict({k: v.to(dtype) for k, v in state.items()}, assign=True)
        else:
            net = load_pretrained(Network, source, dtype=dtype, **settings)
        told(f"T2I-Adapter '{self.name}'", source, len(net.state_dict()))
        return net

    def _check_base(self, source: str) -> None:
        config = self.net.config
        if config.adapter_type != 'full_adapter_xl':
            raise ValueError(f"'{source}' is a T2I-Adapter of type {config.adapter_type}; SDXL needs full_adapter_xl.")
        found = {k: v for k, v in _shape(self.net).items() if k in self.base}
        if found != self.base:
            raise ValueError(f"'{source}' gives the T2I-Adapter '{self.name}' {found}; the base asks for {self.base}. "
                             'It was made for another base.')


def _shape(net: Any) -> dict[str, Any]:
    names = ('adapter_type', 'in_channels', 'channels', 'num_res_blocks', 'downscale_factor')
    return {**{k: net.config[k] for k in names}, 'channels': tuple(net.config.channels)}
