"""ControlNet: a trained copy of the UNet's encoder that reads a control image and adds to every skip connection.

Zhang et al. 2023, arXiv:2302.05543. The network is diffusers' `ControlNetModel`
(diffusers/models/controlnets/controlnet.py), so its folders are diffusers' folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffengine_sdxl.adapters.base import ControlAdapter, Tensors
from diffengine_sdxl.attention import set_backend
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading.strict import load_pretrained, log_loaded
from diffengine_sdxl.protocols import AdapterHost
from diffengine_sdxl.registry import ADAPTERS
from diffengine_sdxl.structures import Batch, UNetCall

#: What a ControlNet and its base must have in common; one with fewer transformer layers fits all the same.
SHARED = ('in_channels', 'block_out_channels', 'layers_per_block', 'cross_attention_dim', 'addition_embed_type',
          'addition_time_embed_dim', 'projection_class_embeddings_input_dim')
#: Widths of the control image's embedding; each after the first halves the size.
EMBEDDING = (16, 32, 96, 256)


@ADAPTERS.register_module()
class ControlNet(ControlAdapter):
    """Control by an image (edges, depth, pose ...) of the output's size, [B, C, H, W] in [0, 1].

    Fresh, it is the base's encoder with zero convolutions at its outputs, so it changes nothing until it trains.

    Args:
        condition_key, weights, trainable, scale, active_range: see Adapter.
        subfolder, revision, variant: of `weights`, a folder or hub id.
        conditioning_channels: channels of the control image, for fresh weights.

    Raises:
        UserError: in `attach`, if `weights` were made for another base, or the base has no middle block.
    """

    file_formats = ('diffusers',)
    diffusers_call = "ControlNetModel.from_pretrained('{out}')"
    attach_point = 'into the skip connections'

    def __init__(self, condition_key: str = 'conditioning_image', weights: str | None = None, trainable: bool = True,
                 scale: float = 1.0, active_range: Sequence[float] = (0.0, 1.0), subfolder: str | None = None,
                 revision: str | None = None, variant: str | None = None, conditioning_channels: int = 3) -> None:
        super().__init__(condition_key, weights, trainable, scale, active_range)
        self.source = {'subfolder': subfolder, 'revision': revision, 'variant': variant}
        self.conditioning_channels = conditioning_channels

    def attach(self, model: AdapterHost) -> None:
        """Build the network. Fresh weights are the base's; what the base lacks depends on (seed, adapter name)."""
        from diffusers import ControlNetModel
        dtype = model.unet_weight.dtype
        if self.trainable:
            dtype = torch.promote_types(dtype, torch.float32)
        if self.weights is not None:
            self.net = load_pretrained(ControlNetModel, self.weights, dtype=dtype, **self.source)
            self._check_base(model)
            log_loaded(f"ControlNet '{self.name}'", self.weights, len(self.net.state_dict()))
        elif model.unet.mid_block is None:
            raise UserError(f"The base of the ControlNet '{self.name}' has no middle block (mid_block_type=None), "
                            "which diffusers' ControlNetModel requires. Use another base, or a T2IAdapter.")
        else:
            num_sizes = model.vae_factor.bit_length()  # a factor of 8 is four sizes, the image's own among them
            net = ControlNetModel.from_unet(
                model.unet, load_weights_from_unet=False, conditioning_channels=self.conditioning_channels,
                conditioning_embedding_out_channels=(EMBEDDING + EMBEDDING[-1:] * num_sizes)[:num_sizes])
            self.net = nn.Module.to(net, dtype)  # diffusers' own `to` warns of an empty list
            _copy_encoder(model.unet, self.net)
        set_backend(self.net, model.attention)
        self.size_divisor = model.vae_factor
        # In a tuple, else torch would register the UNet as a submodule.
        self._unet = (model.unet,)

    def detach(self, model: AdapterHost) -> None:
        """Drop the network, which is all there is."""
        del self.net, self._unet

    def encode(self, batch: Batch) -> Tensors:
        """Return the control image.

        Raises:
            UserError: it is missing, or has other channels.
        """
        # diffusers' memory layout: it selects the kernels and with them the last bits.
        return {'image': self._control_image(batch, self.net.config.conditioning_channels).contiguous()}

    def contribute(self, call: UNetCall, tensors: Tensors) -> None:
        """Run the network on the UNet's input and add its scaled features.

        Raises:
            UserError: the control image hasn't the output's size.
        """
        image, dtype = tensors['image'], self.net.dtype
        height, width = (side * self.size_divisor for side in call.sample.shape[-2:])
        if tuple(image.shape[-2:]) != (height, width):
            raise UserError(f"'{self.condition_key}' of adapter '{self.name}' must have the output's size ({height} x "
                            f'{width}); it is {image.shape[-2]} x {image.shape[-1]}.')
        scale = self._fixed_scale(call, len(call.sample))
        if not call.training and not torch.as_tensor(scale).any():
            return  # a pass costs a third of a UNet
        self._sync_checkpointing()
        down, mid = self.net(
            call.sample.to(dtype), call.timestep, call.text.to(dtype), image.to(dtype), conditioning_scale=scale,
            added_cond_kwargs={'text_embeds': call.pooled.to(dtype), 'time_ids': call.time_ids}, return_dict=False)
        call.add_control(down, mid)

    def add_to_pipeline(self, stock: Any) -> None:
        """Add the network; its scale and active range become arguments of the pipeline's call.

        Raises:
            UserError: it reads more than latents, as one made for an inpainting UNet does.
        """
        in_channels, latent_channels = self.net.config.in_channels, self._unet[0].config.out_channels
        if in_channels != latent_channels:
            self._unsupported_by_diffusers(f'it reads {in_channels} channels, and diffusers gives a ControlNet the '
                                           f'{latent_channels} of the latents')
        start, end = self.active_range
        stock.add_network('controlnet', self.name, self.net, controlnet_conditioning_scale=self.scale,
                          control_guidance_start=start, control_guidance_end=end)

    def load(self, source: str | Path) -> None:
        """Read diffusers' folder, in place.

        Raises:
            UserError: a key is missing or unknown, or the network's settings differ.
        """
        loaded = load_pretrained(type(self.net), str(source), dtype=self.net.dtype)
        self._check_same(source, _settings(loaded), _settings(self.net))
        self.net.load_state_dict(loaded.state_dict())
        log_loaded(f"ControlNet '{self.name}'", source, len(self.net.state_dict()))

    def _check_base(self, model: AdapterHost) -> None:
        theirs, ours = _settings(self.net), _settings(model.unet)
        faults = [f'{k}={theirs[k]} instead of {ours[k]}' for k in SHARED if theirs[k] != ours[k]]
        factor = 2 ** (len(self.net.config.conditioning_embedding_out_channels) - 1)
        if factor != model.vae_factor:
            faults.append(f'control images {factor} times larger than latents instead of {model.vae_factor} times')
        if faults:
            raise UserError(f"'{self.weights}' does not fit the base of the ControlNet '{self.name}': it has "
                            f'{", ".join(faults)}. It was made for another base.')

    def _sync_checkpointing(self) -> None:
        """Recompute activations if the base does; the model enables that after all adapters are attached."""
        base, own = (net.down_blocks[0].gradient_checkpointing for net in (*self._unet, self.net))
        if base != own:
            self.net.enable_gradient_checkpointing() if base else self.net.disable_gradient_checkpointing()


@torch.no_grad()
def _copy_encoder(unet: Any, net: Any) -> None:
    """Copy what a UNet and a ControlNet share by name, without the LoRAs in the UNet.

    diffusers' `from_unet` fails on these, since a layer that peft has wrapped has its weights in `base_layer`.
    """
    unet_state = {name.replace('.base_layer', ''): value for name, value in unet.state_dict().items()}
    net.load_state_dict({name: value if name.startswith('controlnet_') else unet_state[name]
                         for name, value in net.state_dict().items()})


def _settings(net: Any) -> dict[str, Any]:
    """Return a network's config without its origin; lists as tuples."""
    return {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in net.config.items() if not k.startswith('_')}
