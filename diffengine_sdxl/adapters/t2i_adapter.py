"""T2I-Adapter: a small network that turns a control image into feature maps, added after the UNet's down blocks.

Mou et al. 2023, arXiv:2302.08453. The network is diffusers' `T2IAdapter` of type `full_adapter_xl`
(diffusers/models/adapter.py), so its folders are diffusers' folders; TencentARC's original files are read too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffengine_sdxl import limits
from diffengine_sdxl.adapters.base import ControlAdapter, Tensors
from diffengine_sdxl.adapters.formats.files import refuse
from diffengine_sdxl.adapters.formats.t2i_adapter import is_file, read_t2i_adapter
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading.strict import load_pretrained, log_loaded
from diffengine_sdxl.protocols import AdapterHost
from diffengine_sdxl.registry import ADAPTERS
from diffengine_sdxl.structures import Batch, UNetCall

#: The down blocks of SDXL; a T2I-Adapter gives one feature map for each and one for the mid block.
SDXL_LAYOUT = ('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D')


@ADAPTERS.register_module()
class T2IAdapter(ControlAdapter):
    """Control by an image (edges, depth, sketch, pose ...) of the output's size, [B, C, H, W] in [0, 1].

    Features for SDXL: [B, 320, H/16, W/16], [B, 640, H/16, W/16], [B, 1280, H/32, W/32] twice.

    Args:
        condition_key, trainable, scale, active_range, ignore_keys: see Adapter.
        weights: see Adapter; also a single file with TencentARC's or diffusers' keys.
        subfolder, revision, variant: of `weights`, a folder or hub id.
        in_channels: channels of the control image.
        channels: widths of the four feature maps; None for the base's.
        num_res_blocks: residual blocks for each feature map.
        downscale_factor: size of the control image over that of the first feature map; None for twice the VAE's factor.

    Raises:
        UserError: in `attach`, if the base hasn't SDXL's block layout, or `weights` were made for another base.
    """

    brings_precision = True
    file_formats = ('diffusers',)
    diffusers_call = "T2IAdapter.from_pretrained('{out}')"
    attach_point = 'after the down blocks'

    def __init__(self, condition_key: str = 'conditioning_image', weights: str | None = None, trainable: bool = True,
                 scale: float = 1.0, active_range: Sequence[float] = (0.0, 1.0), subfolder: str | None = None,
                 revision: str | None = None, variant: str | None = None, in_channels: int = 3,
                 channels: Sequence[int] | None = None, num_res_blocks: int = 2,
                 downscale_factor: int | None = None, ignore_keys: Sequence[str] = ()) -> None:
        super().__init__(condition_key, weights, trainable, scale, active_range, ignore_keys)
        self.source = {'subfolder': subfolder, 'revision': revision, 'variant': variant}
        if not 0 < num_res_blocks <= limits.CURRENT.network_layers:
            raise UserError(f'num_res_blocks={num_res_blocks} of a T2I-Adapter must be from 1 to '
                            f'{limits.CURRENT.network_layers} (limits.network_layers).')
        if channels is not None and not channels:
            raise UserError('channels of a T2I-Adapter must be a list of widths; it is empty.')
        self.shape: dict[str, Any] = {'in_channels': in_channels, 'channels': channels,
                                      'num_res_blocks': num_res_blocks, 'downscale_factor': downscale_factor}

    def attach(self, model: AdapterHost) -> None:
        """Build the network for `model`'s widths; fresh weights depend on (seed, adapter name) alone."""
        from diffusers import T2IAdapter as Network
        layout, widths = tuple(model.unet.config.down_block_types), tuple(model.unet.config.block_out_channels)
        if layout != SDXL_LAYOUT:
            raise UserError(f"T2IAdapter '{self.name}' needs a base with SDXL's block layout {SDXL_LAYOUT}; this one "
                            f'has {layout}' + (' (the refiner).' if len(layout) == 4 else '.'))
        # Some distilled models have no mid block; diffusers would silently leave its feature map unused.
        channels = widths if model.unet.mid_block is None else (*widths, widths[-1])
        self.base: dict[str, Any] = {'channels': channels, 'downscale_factor': 2 * model.vae_factor}
        if self.weights is not None:
            # fp32 whatever the file holds, as it trains; fp64 in an fp64 model.
            dtype = torch.promote_types(model.unet_weight.dtype, torch.float32)
            self.net = self._read(self.weights, dtype, self.ignore_keys, **self.source)
        else:
            shape = {k: v if v is not None else self.base.get(k) for k, v in self.shape.items()}
            self.net = Network(**shape, adapter_type='full_adapter_xl')
        self._check_base(self.weights or 'its config')
        self.size_divisor = self.net.downscale_factor

    def encode(self, batch: Batch) -> Tensors:
        """Return the control image; a T2I-Adapter has no frozen part.

        Raises:
            UserError: it is missing, has other channels, or its sides are not divisible.
        """
        image = self._control_image(batch, self.net.config.in_channels)
        height, width = image.shape[-2:]
        if height % self.size_divisor or width % self.size_divisor:
            raise UserError(f"'{self.condition_key}' is {height} x {width}; the T2I-Adapter '{self.name}' needs sides "
                            f'divisible by {self.size_divisor}. Change `resolution`.')
        return {'image': image}

    def project(self, tensors: Tensors) -> Tensors:
        """Turn the control image into feature maps, {'f0' ... 'f3'}."""
        features = self.net(tensors['image'].to(self.net.dtype))
        return {f'f{i}': feature for i, feature in enumerate(features)}

    def expand(self, tensors: Tensors, branches: Sequence[str]) -> Tensors:
        """Run the network once and repeat its features, so that a batch is bitwise diffusers'."""
        return {k: v.repeat(len(branches), 1, 1, 1) for k, v in self.project(tensors).items()}

    def contribute(self, call: UNetCall, tensors: Tensors) -> None:
        """Add the scaled features.

        Raises:
            UserError: the control image hasn't the output's size.
        """
        features: list[Tensor] = [tensors[f'f{i}'] for i in range(len(tensors))]
        size, expected = tuple(features[0].shape[-2:]), tuple((side + 1) // 2 for side in call.sample.shape[-2:])
        if size != expected:
            height, width = (side * self.size_divisor for side in expected)
            raise UserError(f"'{self.condition_key}' of adapter '{self.name}' must have the output's size ({height} x "
                            f'{width}); its features are {size} instead of {expected}.')
        scale = self._fixed_scale(call, len(features[0]))
        if isinstance(scale, Tensor) or scale != 1:
            # In fp32, then back: an fp32 scale would promote bf16 features and the UNet fails on them.
            features = [(feature.float() if feature.dtype.itemsize < 4 else feature) * scale for feature in features]
        call.add_residuals(features)

    def add_to_pipeline(self, stock: Any) -> None:
        """Add the network; its scale and the end of its active range become arguments of the pipeline's call.

        Raises:
            UserError: its active range begins later than the first step.
        """
        start, end = self.active_range
        if start > 0:
            self._unsupported_by_diffusers(f'its active_range={self.active_range} begins late, and there every '
                                           'T2I-Adapter acts from the first step on')
        stock.add_network('adapter', self.name, self.net, {'adapter_conditioning_factor': end},
                          adapter_conditioning_scale=self.scale)

    def load(self, source: str | Path) -> None:
        """Read diffusers' folder, or a single file with TencentARC's or diffusers' keys, in place.

        Raises:
            UserError: a key is missing or unknown, or the network's settings differ.
        """
        loaded = self._read(str(source), self.net.dtype)
        self._check_same(source, _settings(loaded), _settings(self.net))
        self.net.load_state_dict(loaded.state_dict())

    def _read(self, source: str, dtype: torch.dtype, ignore_keys: Sequence[str] = (), **settings: Any) -> Any:
        from diffusers import T2IAdapter as Network
        if is_file(source):
            # The downscale factor is not in the file.
            factor = self.shape['downscale_factor'] or self.base['downscale_factor']
            state, shape = read_t2i_adapter(source, len(self.base['channels']), factor, settings.get('revision'),
                                            ignore_keys)
            with torch.device('meta'):  # nothing is drawn for weights that are assigned at once
                net = Network(**shape, adapter_type='full_adapter_xl')
            refuse(source, of_another_shape=[k for k, v in net.state_dict().items() if v.shape != state[k].shape])
            net.load_state_dict({k: v.to(dtype) for k, v in state.items()}, assign=True)
        else:
            net = load_pretrained(Network, source, ignore_keys=ignore_keys, dtype=dtype, **settings)
        log_loaded(f"T2I-Adapter '{self.name}'", source, len(net.state_dict()))
        return net

    def _check_base(self, source: str) -> None:
        settings = _settings(self.net)
        if settings['adapter_type'] != 'full_adapter_xl':
            raise UserError(f"'{source}' is a T2I-Adapter of type {settings['adapter_type']}; SDXL needs "
                            'full_adapter_xl.')
        shape = {k: settings[k] for k in self.base}
        if shape != self.base:
            raise UserError(f"'{source}' gives the T2I-Adapter '{self.name}' {shape}; the base needs {self.base}. "
                            'It was made for another base.')


def _settings(net: Any) -> dict[str, Any]:
    names = ('adapter_type', 'in_channels', 'num_res_blocks', 'downscale_factor')
    return {**{k: net.config[k] for k in names}, 'channels': tuple(net.config.channels)}
