"""ControlNet: a trained copy of the UNet's encoder that reads a control image and adds to every skip connection.

Zhang et al. 2023, arXiv:2302.05543. The network is diffusers' `ControlNetModel`
(diffusers/models/controlnets/controlnet.py), so its folders are diffusers' folders.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffengine_sdxl.adapters.base import Adapter, Tensors
from diffengine_sdxl.models.attention import set_backend
from diffengine_sdxl.registry import ADAPTERS
from diffengine_sdxl.structures import UNetCall
from diffengine_sdxl.weights import load_pretrained, told

#: What a ControlNet and its base must have in common; one with fewer transformers fits all the same.
SHARED = ('in_channels', 'block_out_channels', 'layers_per_block', 'cross_attention_dim', 'addition_embed_type',
          'addition_time_embed_dim', 'projection_class_embeddings_input_dim')
#: Widths in which the control image is embedded, each after the first at half the size of the one before.
EMBEDDING = (16, 32, 96, 256)


@ADAPTERS.register_module()
class ControlNet(Adapter):
    """Control by an image (edges, depth, pose ...) of the size of the picture, [B, C, H, W] in [0, 1].

    Fresh, it is the base's own encoder with convolutions of zeros at its outputs: the base's pictures until it trains.

    Args:
        reads, weights, trainable, scale, window: see Adapter.
        subfolder, revision, variant: of `weights`, a folder or hub id.
        conditioning_channels: channels of the control image, of fresh weights.

    Raises:
        ValueError: in `attach`, if `weights` were made for another base, or the base has no middle block.
    """

    of_picture_size = True
    place = 'into the skip connections'

    def __init__(self, reads: str = 'conditioning_image', weights: str | None = None, trainable: bool = True,
                 scale: float = 1.0, window: Sequence[float] = (0.0, 1.0), subfolder: str | None = None,
                 revision: str | None = None, variant: str | None = None, conditioning_channels: int = 3) -> None:
        super().__init__(reads, weights, trainable, scale, window)
        self.source = {'subfolder': subfolder, 'revision': revision, 'variant': variant}
        self.conditioning_channels = conditioning_channels

    def attach(self, model: Any) -> None:
        """Build the network; fresh weights are the base's, and what it has not depends on (seed, adapter name)."""
        from diffusers import ControlNetModel as Network
        dtype = model.unet_weight.dtype
        if self.trainable:
            dtype = torch.promote_types(dtype, torch.float32)
        if self.weights is not None:
            self.net = load_pretrained(Network, self.weights, dtype=dtype, **self.source)
            self._check_base(model)
            told(f"ControlNet '{self.name}'", self.weights, len(self.net.state_dict()))
        elif model.unet.mid_block is None:
            raise ValueError(f"The base of the ControlNet '{self.name}' has no middle block (mid_block_type=None), and "
                             "diffusers' ControlNetModel must have one. Take another base, or a T2IAdapter.")
        else:
            sizes = model.vae_factor.bit_length()  # a factor of 8 is four sizes, the image's own among them
            net = Network.from_unet(
                model.unet, load_weights_from_unet=False, conditioning_channels=self.conditioning_channels,
                conditioning_embedding_out_channels=(EMBEDDING + EMBEDDING[-1:] * sizes)[:sizes])
            self.net = nn.Module.to(net, dtype)  # diffusers' own `to` warns of an empty list
            _copy_encoder(model.unet, self.net)
        set_backend(self.net, model.attention)
        self.size_divisor = model.vae_factor
        # In a tuple, else torch would count the UNet among our own modules.
        self._unet = (model.unet,)

    def detach(self, model: Any) -> None:
        """Nothing of it lives in the base."""
        del self.net, self._unet

    def encode(self, batch: Any) -> Tensors:
        """The control image.

        Raises:
            ValueError: it is missing, or has other channels.
        """
        image = self._condition(batch)
        wanted = self.net.config.conditioning_channels
        if image.dim() != 4 or image.shape[1] != wanted:
            raise ValueError(f"Adapter '{self.name}' takes images of {wanted} channels, [B, {wanted}, H, W]; "
                             f"'{self.reads}' is of shape {tuple(image.shape)}.")
        # In memory as diffusers leaves it: the kernels depend on it, and with them the last bits.
        return {'image': image.contiguous()}

    def uncond(self, tensors: Tensors) -> Tensors:
        """The control image too: it steers both branches of guidance, as in diffusers."""
        return tensors

    def contribute(self, call: UNetCall, tensors: Tensors) -> None:
        """Run the network on the denoiser's own input, and add its scaled features.

        Raises:
            ValueError: the control image has another size than the picture.
        """
        image, dtype = tensors['image'], self.net.dtype
        height, width = (side * self.size_divisor for side in call.sample.shape[-2:])
        if tuple(image.shape[-2:]) != (height, width):
            raise ValueError(f"'{self.reads}' of adapter '{self.name}' must have the picture's size ({height} x "
                             f'{width}); it is {image.shape[-2]} x {image.shape[-1]}.')
        scale = self._fixed_scale(call, len(call.sample))
        if not call.training and not torch.as_tensor(scale).any():
            return  # it costs a third of a UNet
        self._follow_checkpointing()
        down, mid = self.net(
            call.sample.to(dtype), call.timestep, call.text.to(dtype), image.to(dtype), conditioning_scale=scale,
            added_cond_kwargs={'text_embeds': call.pooled.to(dtype), 'time_ids': call.time_ids}, return_dict=False)
        call.add_control(down, mid)

    def to_stock(self, stock: Any) -> None:
        """A network of its own; the call is told its scale and its window.

        Raises:
            ValueError: it reads more than latents, as one of an inpainting UNet does.
        """
        theirs, latents = self.net.config.in_channels, self._unet[0].config.out_channels
        if theirs != latents:
            self._not_in_stock(f'it reads {theirs} channels, and there a ControlNet is given the {latents} of latents')
        start, end = self.window
        stock.add_network('controlnet', self.name, self.net, controlnet_conditioning_scale=self.scale,
                          control_guidance_start=start, control_guidance_end=end)

    def save(self, folder: str | Path) -> None:
        """Write diffusers' folder: config.json and diffusion_pytorch_model.safetensors."""
        self.net.save_pretrained(str(folder), safe_serialization=True)

    def load(self, source: str | Path) -> None:
        """Read diffusers' folder, in place.

        Raises:
            ValueError: a key is missing or misnamed, or the network is another.
        """
        from diffusers import ControlNetModel as Network
        loaded = load_pretrained(Network, str(source), dtype=self.net.dtype)
        theirs, ours = _settings(loaded), _settings(self.net)
        faults = [f'{k}={theirs.get(k)} instead of {v}' for k, v in ours.items() if theirs.get(k) != v]
        if faults:
            raise ValueError(f"'{source}' does not fit the ControlNet '{self.name}': it has {', '.join(faults)}.")
        self.net.load_state_dict(loaded.state_dict())
        told(f"ControlNet '{self.name}'", source, len(self.net.state_dict()))

    def _check_base(self, model: Any) -> None:
        theirs, ours = _settings(self.net), _settings(model.unet)
        faults = [f'{k}={theirs[k]} instead of {ours[k]}' for k in SHARED if theirs[k] != ours[k]]
        factor = 2 ** (len(self.net.config.conditioning_embedding_out_channels) - 1)
        if factor != model.vae_factor:
            faults.append(f'control images {factor} times larger than latents instead of {model.vae_factor} times')
        if faults:
            raise ValueError(f"'{self.weights}' does not fit the base of the ControlNet '{self.name}': it has "
                             f'{", ".join(faults)}. It was made for another base.')

    def _follow_checkpointing(self) -> None:
        """Recompute activations where the base does; the model says so after all adapters are attached."""
        wanted, found = (net.down_blocks[0].gradient_checkpointing for net in (*self._unet, self.net))
        if wanted and not found:
            self.net.enable_gradient_checkpointing()
        elif found and not wanted:
            self.net.disable_gradient_checkpointing()


@torch.no_grad()
def _copy_encoder(unet: Any, net: Any) -> None:
    """Copy into a ControlNet what a UNet has of the same name; LoRAs in the UNet are left out.

    diffusers' own `from_unet` fails on them, since a layer that peft has wrapped has its weights in `base_layer`.
    """
    state = {name.replace('.base_layer', ''): value for name, value in unet.state_dict().items()}
    own = {name: value for name, value in net.state_dict().items() if name.startswith('controlnet_')}
    net.load_state_dict({**{name: state[name] for name in net.state_dict() if name not in own}, **own})


def _settings(net: Any) -> dict[str, Any]:
    """Its config without where it came from; lists as tuples."""
    return {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in net.config.items() if not k.startswith('_')}
