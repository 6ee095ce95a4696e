"""ControlNet: a trained copy of the UNet's encoder that reads a control image and adds to every skip connection.

Zhang et al. 2023, arXiv:2302.05543. The network is diffusers' `ControlNetModel`
(diffusers/models/controlnets/controlnet.py), or `ControlNetUnionModel`, which reads images of several control types and
is told the type. So its folders are diffusers' folders; single files are read too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from diffengine_sdxl.adapters.base import ControlAdapter, Tensors
from diffengine_sdxl.adapters.formats import controlnet as formats
from diffengine_sdxl.adapters.formats.files import refuse
from diffengine_sdxl.attention import set_backend
from diffengine_sdxl.errors import UserError, did_you_mean, one_of
from diffengine_sdxl.loading.strict import as_user_error, load_pretrained, log_loaded
from diffengine_sdxl.protocols import AdapterHost
from diffengine_sdxl.registry import ADAPTERS
from diffengine_sdxl.structures import Batch, UNetCall

#: What a ControlNet and its base must have in common; one with fewer transformer layers fits all the same.
SHARED = ('in_channels', 'block_out_channels', 'layers_per_block', 'downsample_padding', 'cross_attention_dim',
          'addition_embed_type', 'addition_time_embed_dim', 'projection_class_embeddings_input_dim')
#: Settings of diffusers' classes for inputs that an SDXL does not give, or that no forward pass reads.
UNUSED = ('class_embed_type', 'num_class_embeds', 'encoder_hid_dim', 'encoder_hid_dim_type')
#: Widths of the control image's embedding; each after the first halves the size.
EMBEDDING = (16, 32, 96, 256)
#: The control types of xinsir's union ControlNets by name; the last two are those of promax.
CONTROL_TYPES = {'openpose': 0, 'depth': 1, 'hed': 2, 'pidi': 2, 'scribble': 2, 'ted': 2, 'canny': 3, 'lineart': 3,
                 'anime_lineart': 3, 'mlsd': 3, 'normal': 4, 'segment': 5, 'tile': 6, 'repaint': 7}


@ADAPTERS.register_module()
class ControlNet(ControlAdapter):
    """Control by an image (edges, depth, pose ...) of the output's size, [B, C, H, W] in [0, 1].

    Fresh, it is the base's encoder with zero convolutions at its outputs, so it changes nothing until it trains.

    Args:
        condition_key, trainable, scale, active_range, ignore_keys: see Adapter.
        weights: see Adapter; also a single file, with diffusers' keys, the original ones, or of a Control-LoRA.
        subfolder, revision, variant: of `weights`, a folder or hub id.
        conditioning_channels: channels of the control image, for fresh weights.
        control_type: of a union ControlNet, which kind of image it reads: a name of CONTROL_TYPES, or its number.
        guess_mode: sample as diffusers' guess mode: only conditional rows are controlled, the first skip connections
            less. None: if the network pools its outputs (`global_pool_conditions` in its config), as in diffusers.

    Raises:
        UserError: `control_type` is unknown; in `attach`, if `weights` are no ControlNet or were made for another base,
            the base has no middle block, or a union has no control type.
    """

    brings_precision = True
    file_formats = ('diffusers',)
    diffusers_call = "ControlNetModel.from_pretrained('{out}')"
    attach_point = 'into the skip connections'

    def __init__(self, condition_key: str = 'conditioning_image', weights: str | None = None, trainable: bool = True,
                 scale: float = 1.0, active_range: Sequence[float] = (0.0, 1.0), subfolder: str | None = None,
                 revision: str | None = None, variant: str | None = None, conditioning_channels: int = 3,
                 control_type: int | str | None = None, guess_mode: bool | None = None,
                 ignore_keys: Sequence[str] = ()) -> None:
        super().__init__(condition_key, weights, trainable, scale, active_range, ignore_keys)
        self.source = {'subfolder': subfolder, 'revision': revision, 'variant': variant}
        self.conditioning_channels, self._guess_mode = conditioning_channels, guess_mode
        self.control_type = _control_type(control_type)
        if weights is None and control_type is not None:
            raise UserError(f'control_type={control_type!r} is of a union ControlNet, which is not trained from '
                            'scratch here; give its `weights`, or leave out control_type.')

    @property
    def guess_mode(self) -> bool:
        """Whether only conditional rows are controlled in sampling."""
        return bool(self.net.config.global_pool_conditions if self._guess_mode is None else self._guess_mode)

    def attach(self, model: AdapterHost) -> None:
        """Build the network. Fresh weights are the base's; what the base lacks depends on (seed, adapter name)."""
        # In a tuple, else torch would register the UNet as a submodule.
        self._unet, self.size_divisor = (model.unet,), model.vae_factor
        dtype = model.unet_weight.dtype
        if self.trainable:
            dtype = torch.promote_types(dtype, torch.float32)
        if self.weights is not None:
            self.net = self._read(self.weights, dtype, None, self.ignore_keys, **self.source)
        elif model.unet.mid_block is None:
            raise UserError(f"The base of the ControlNet '{self.name}' has no middle block (mid_block_type=None), "
                            "which diffusers' ControlNetModel requires. Use another base, or a T2IAdapter.")
        else:
            num_sizes = model.vae_factor.bit_length()  # a factor of 8 is four sizes, the image's own among them
            net = formats.network_class(is_union=False).from_unet(
                model.unet, load_weights_from_unet=False, conditioning_channels=self.conditioning_channels,
                conditioning_embedding_out_channels=(EMBEDDING + EMBEDDING[-1:] * num_sizes)[:num_sizes])
            self.net = nn.Module.to(net, dtype)  # diffusers' own `to` warns of an empty list
            _copy_encoder(model.unet, self.net)
        self.diffusers_call = f"{type(self.net).__name__}.from_pretrained('{{out}}')"
        set_backend(self.net, model.attention)
        in_base = {name: m for name, m in model.unet.named_modules() if hasattr(m, 'gradient_checkpointing')}
        self._checkpointed = [(m, in_base[name]) for name, m in self.net.named_modules() if name and name in in_base]

    def detach(self, model: AdapterHost) -> None:
        """Drop the network, which is all there is."""
        del self.net, self._unet, self._checkpointed

    def read_image(self, image: Image.Image | Sequence[Image.Image], size: tuple[int, int]) -> torch.Tensor:
        """Return the control image, [C, H, W]; of a network that reads one channel, the image's brightness.

        Raises:
            UserError: there are several images.
        """
        if isinstance(image, Image.Image) and self.net.config.conditioning_channels == 1:
            image = image.convert('L').convert('RGB')
            return super().read_image(image, size)[:1]
        return super().read_image(image, size)

    def encode(self, batch: Batch) -> Tensors:
        """Return the control image.

        Raises:
            UserError: it is missing, or has other channels.
        """
        # diffusers' memory layout: it selects the kernels and with them the last bits.
        return {'image': self._control_image(batch, self.net.config.conditioning_channels).contiguous()}

    def expand(self, tensors: Tensors, branches: Sequence[str]) -> Tensors:
        """Repeat the control image; in guess mode, mark the rows that it controls."""
        expanded, num = super().expand(tensors, branches), len(tensors['image'])
        if self.guess_mode:
            # On the CPU: what selects rows there does not wait for the device.
            expanded['controlled'] = torch.tensor([branch != 'uncond' for branch in branches for _ in range(num)])
        return expanded

    def contribute(self, call: UNetCall, tensors: Tensors) -> None:
        """Run the network on the UNet's input and add its scaled features.

        Raises:
            UserError: the control image hasn't the output's size.
        """
        image = tensors['image']
        height, width = (side * self.size_divisor for side in call.sample.shape[-2:])
        if tuple(image.shape[-2:]) != (height, width):
            raise UserError(f"'{self.condition_key}' of adapter '{self.name}' must have the output's size ({height} x "
                            f'{width}); it is {image.shape[-2]} x {image.shape[-1]}.')
        if call.skips(self.scale, self.active_range):
            return  # a pass costs a third of a UNet
        scale = self._fixed_scale(call, len(call.sample))
        controlled = tensors.get('controlled')
        if controlled is None or controlled.all():
            call.add_control(*self._run(call, image, scale))
        elif controlled.any():
            rows = controlled.nonzero().squeeze(1).to(image.device)
            down, mid = self._run(call, image, scale, rows)
            *down, mid = (f.new_zeros((len(image), *f.shape[1:])).index_copy_(0, rows, f) for f in (*down, mid))
            call.add_control(down, mid)

    def _run(self, call: UNetCall, image: torch.Tensor, scale: torch.Tensor | float, rows: torch.Tensor | None = None
             ) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        """Return the network's features of the rows with these numbers, None for all."""
        self._sync_checkpointing()
        dtype = self.net.dtype
        sample, t, text, pooled, time_ids, image = (
            value if rows is None or not value.dim() else value[rows]
            for value in (call.sample, call.timestep, call.text, call.pooled, call.time_ids, image))
        # In guess mode diffusers scales each connection, which a scale for each row, as training has, is not made for.
        arguments: dict[str, Any] = {'guess_mode': self.guess_mode and not call.training, 'conditioning_scale': scale,
                                     'controlnet_cond': image.to(dtype)}
        if self.control_type is not None:
            one_hot = text.new_zeros((len(sample), self.net.config.num_control_type))
            one_hot[:, self.control_type] = 1
            arguments.update(controlnet_cond=[image.to(dtype)], conditioning_scale=[scale], control_type=one_hot,
                             control_type_idx=[self.control_type])
        down, mid = self.net(
            sample.to(dtype), t, text.to(dtype), return_dict=False, **arguments,
            added_cond_kwargs={'text_embeds': pooled.to(dtype), 'time_ids': time_ids})
        return down, mid

    def add_to_pipeline(self, stock: Any) -> None:
        """Add the network; its scale and active range become arguments of the pipeline's call.

        Raises:
            UserError: it reads more than latents, as one made for an inpainting UNet does; it is a union; or its guess
                mode is not what its config says.
        """
        in_channels, latent_channels = self.net.config.in_channels, self._unet[0].config.out_channels
        if in_channels != latent_channels:
            self._unsupported_by_diffusers(f'it reads {in_channels} channels, and diffusers gives a ControlNet the '
                                           f'{latent_channels} of the latents')
        if self.net.config.global_pool_conditions and not self.guess_mode:
            self._unsupported_by_diffusers('there a network that pools its outputs is always in guess mode. Leave out '
                                           'guess_mode, or sample here')
        kind, mode = ('controlnet', {}) if self.control_type is None else (
            'controlnet_union', {'control_mode': self.control_type})
        if mode and self.guess_mode:
            self._unsupported_by_diffusers("there a union's guess mode fails")
        start, end = self.active_range
        stock.add_network(kind, self.name, self.net, {'guess_mode': self.guess_mode},
                          controlnet_conditioning_scale=self.scale, control_guidance_start=start,
                          control_guidance_end=end, **mode)

    def load(self, source: str | Path) -> None:
        """Read diffusers' folder or a single file, in place.

        Raises:
            UserError: a key is missing or unknown, or the network's settings differ.
        """
        self.net.load_state_dict(self._read(str(source), self.net.dtype, self.net).state_dict())

    def _read(self, source: str, dtype: torch.dtype, net: Any, ignore_keys: Sequence[str] = (),
              subfolder: str | None = None, revision: str | None = None, variant: str | None = None) -> Any:
        """Return the network in `source`, which must fit the base, or be like `net` if there is one."""
        path, config = formats.locate(source, subfolder, revision)
        state = None
        if path is not None:
            cls, settings, state = formats.read_controlnet(path, config, self._unet[0].config, _state(self._unet[0]),
                                                           ignore_keys)
        else:
            assert config is not None
            if os.path.isfile(local := os.path.expanduser(source)):  # its config, a shard or their index
                source = os.path.dirname(local)
            cls, settings = formats.full_config(source, config)
        # Before anything is built: a config may ask for any number of layers.
        if net is None:
            self._check_base(settings, source)
        else:
            self._check_same(source, settings, _settings(net))
        self._check_type(settings, source)
        if state is None:
            new = load_pretrained(cls, source, revision=revision, ignore_keys=ignore_keys, dtype=dtype,
                                  subfolder=subfolder, variant=variant)
        else:
            with torch.device('meta'):  # nothing is drawn for weights that are assigned at once
                new = as_user_error(source, cls, **settings).eval()
            ours = new.state_dict()
            refuse(path or source, unknown=[k for k in state if k not in ours],
                   missing=[k for k in ours if k not in state], of_another_shape=[
                       k for k, v in ours.items() if k in state and v.shape != state[k].shape])
            new.load_state_dict({k: state[k].to(dtype, copy=True).contiguous() for k in ours}, assign=True)
        log_loaded(f"ControlNet '{self.name}'", source, len(new.state_dict()))
        return new

    def _check_base(self, theirs: Mapping[str, Any], source: str) -> None:
        ours = _settings(self._unet[0])
        faults = [f'{k}={theirs[k]} instead of {ours[k]}' for k in SHARED if theirs[k] != ours[k]]
        factor = 2 ** (len(theirs['conditioning_embedding_out_channels'] or ()) - 1)
        if factor != self.size_divisor:
            faults.append(f'control images {factor} times larger than latents instead of {self.size_divisor} times '
                          '(conditioning_embedding_out_channels)')
        if faults:
            raise UserError(f"'{source}' does not fit the base of the ControlNet '{self.name}': it has "
                            f'{", ".join(faults)}. It was made for another base.')
        if unused := [f'{k}={theirs[k]}' for k in UNUSED if theirs[k] is not None]:
            raise UserError(f"'{source}' has {', '.join(unused)}, an input that an SDXL does not give to a ControlNet.")

    def _check_type(self, theirs: Mapping[str, Any], source: str) -> None:
        """Refuse a control type without a union, a union without one, and what diffusers' class does not compute."""
        num = theirs.get('num_control_type')
        if num is None and self.control_type is not None:
            raise UserError(f"'{source}' is no union ControlNet and takes no control_type; leave it out of adapter "
                            f"'{self.name}'.")
        if num is not None:
            if self.control_type is None or self.control_type >= num:
                names = [name for name, number in CONTROL_TYPES.items() if number < num]
                what = 'needs a control_type' if self.control_type is None else f'has no type {self.control_type}'
                raise UserError(f"The union ControlNet '{source}' of adapter '{self.name}' {what}; set control_type to "
                                f'one of {", ".join(names)}, or a number below {num}.')
            if theirs['num_trans_channel'] != theirs['block_out_channels'][0]:
                raise UserError(f"'{source}' has num_trans_channel={theirs['num_trans_channel']}, which must be the "
                                f'width of the first block, {theirs["block_out_channels"][0]}.')
        one_of(f"controlnet_conditioning_channel_order of '{source}'", theirs['controlnet_conditioning_channel_order'],
               ('rgb', 'bgr') if num is None else ('rgb',))

    def _sync_checkpointing(self) -> None:
        """Recompute activations where the base does; the model enables that after all adapters are attached."""
        if any(own.gradient_checkpointing != base.gradient_checkpointing for own, base in self._checkpointed):
            self.net.enable_gradient_checkpointing()
            for own, base in self._checkpointed:
                own.gradient_checkpointing = base.gradient_checkpointing


def _control_type(value: Any) -> int | None:
    """Return the number of a control type.

    Raises:
        UserError: it is unknown.
    """
    if value is None or type(value) is int and value >= 0:
        return value
    if isinstance(value, str) and value in CONTROL_TYPES:
        return CONTROL_TYPES[value]
    if isinstance(value, list | tuple):
        raise UserError(f'control_type={value!r}: one adapter reads one image of one type. Give an adapter for each '
                        "type, with the same weights; they add up, as in diffusers' MultiControlNetUnionModel.")
    raise UserError(f'control_type={value!r} is unknown; choose one of {", ".join(CONTROL_TYPES)}, or a number from 0.'
                    f'{did_you_mean(str(value), list(CONTROL_TYPES))}')


def _state(unet: Any) -> Tensors:
    """Return a UNet's weights without the LoRAs in it, which have its own under `base_layer`."""
    return {name.replace('.base_layer', ''): value for name, value in unet.state_dict().items()}


@torch.no_grad()
def _copy_encoder(unet: Any, net: Any) -> None:
    """Copy what a UNet and a ControlNet share by name.

    diffusers' `from_unet` fails on the LoRAs in a UNet, since a layer that peft has wrapped has its weights in
    `base_layer`.
    """
    unet_state = _state(unet)
    net.load_state_dict({name: value if name.startswith('controlnet_') else unet_state[name]
                         for name, value in net.state_dict().items()})


def _settings(net: Any) -> dict[str, Any]:
    """Return a network's config without its origin; lists as tuples."""
    return {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in net.config.items() if not k.startswith('_')}
