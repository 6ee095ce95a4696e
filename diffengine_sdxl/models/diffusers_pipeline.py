"""Convert an SDXL to a diffusers pipeline: in memory, with shared weights, or on disk."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffengine_sdxl import rng
from diffengine_sdxl.adapters.lora_layers import unwrapped
from diffengine_sdxl.attention import cross_attention_names
from diffengine_sdxl.errors import UserError, one_of
from diffengine_sdxl.loading import base as loading
from diffengine_sdxl.loading.deferred import loaded
from diffengine_sdxl.protocols import Components, Model

#: Task, and the kinds of networks that adapters add -> the pipeline. diffusers has no others for SDXL.
PIPELINES = {
    ('text-to-image', ()): 'StableDiffusionXLPipeline',
    ('text-to-image', ('adapter',)): 'StableDiffusionXLAdapterPipeline',
    ('text-to-image', ('controlnet',)): 'StableDiffusionXLControlNetPipeline',
    ('image-to-image', ()): 'StableDiffusionXLImg2ImgPipeline',
    ('image-to-image', ('controlnet',)): 'StableDiffusionXLControlNetImg2ImgPipeline',
    ('inpainting', ()): 'StableDiffusionXLInpaintPipeline',
    ('inpainting', ('controlnet',)): 'StableDiffusionXLControlNetInpaintPipeline',
    ('text-to-image', ('controlnet_union',)): 'StableDiffusionXLControlNetUnionPipeline',
    ('image-to-image', ('controlnet_union',)): 'StableDiffusionXLControlNetUnionImg2ImgPipeline',
    ('inpainting', ('controlnet_union',)): 'StableDiffusionXLControlNetUnionInpaintPipeline',
}
TASKS = tuple(dict.fromkeys(task for task, _ in PIPELINES))
#: The networks of PIPELINES: their names for the user, and diffusers' containers of several; the unions' pipelines take
#: a list.
_NAMES = {'adapter': 'T2I-Adapters', 'controlnet': 'ControlNets', 'controlnet_union': 'union ControlNets'}
_CONTAINERS = {'adapter': 'MultiAdapter', 'controlnet': 'MultiControlNetModel'}


def to_diffusers(model: Model, task: str | None = None) -> Any:
    """Return a diffusers pipeline, with all adapters, whose latents are bitwise those of `model.sampler`.

    Its modules are copies that share the model's weights: they take no memory, and nothing done to the pipeline
    (loading and fusing LoRAs, setting scales and attention processors, `to`, offloading) changes `model`. Training the
    model changes the pipeline's weights, which are frozen.

    Arguments of the call are not part of the pipeline: inputs, steps, classifier-free guidance (the only guidance
    there), and, as `pipeline.call_arguments`, the scales and active ranges of T2I-Adapters and ControlNets:

        pipeline(prompt, image=edges, num_inference_steps=30, **pipeline.call_arguments)

    Prompts of several chunks of 77 tokens go in as `SDXLInferencer.prompt_embeds` returns them. Pass several images of
    one kind as a list, in the order of the adapters' names; the masks of IP-Adapters as
    `cross_attention_kwargs={'ip_adapter_masks': [mask]}`, each [1, n, H, W], None for an adapter without. The
    pipeline's `set_adapters`, `fuse_lora` and `delete_adapters` know LoRAs by their adapters' names.

    An fp32 network beside a half-precision base is cast to the base's dtype, as diffusers has no autocast; there images
    agree to that precision only. A refiner with a shared text encoder includes the LoRAs in it; convert it inside
    `base.disable_adapters()`.

    Args:
        model: an SDXL; the adapters' current weights and scales are used.
        task: of TASKS; None for that of the base: 'image-to-image' for a refiner, 'inpainting' for a UNet that takes a
            mask, else 'text-to-image'.

    Raises:
        UserError: no pipeline does this task with this base or these adapters; or see `Adapter.add_to_pipeline`.
    """
    task = _resolve_task(model, task)
    with rng.fork('to_diffusers'):  # peft and transformers draw weights that are replaced at once
        builder = PipelineBuilder(model)
        for adapter in () if model.adapters_disabled else model.adapters.values():
            adapter.add_to_pipeline(builder)
        return builder.build(model, task)


class PipelineBuilder:
    """A pipeline in construction, to which each adapter adds its part (`Adapter.add_to_pipeline`).

    Attributes:
        parts: unet, vae, text_encoder, text_encoder_2: copies that share the model's weights; None where it has none.
    """

    def __init__(self, model: Model) -> None:
        self._memo: dict[int, Any] = {}
        # Of the adapters too: an IP-Adapter's keys and values are in the UNet's processors.
        self._share(model)
        self.parts = {name: None if getattr(model, name) is None else self._copy(getattr(model, name))
                      for name in loading.MODULES}
        self._dtype = model.unet_weight.dtype
        self._networks: dict[str, list[nn.Module]] = {}
        self._arguments: dict[str, list[float]] = {}
        self._common: dict[str, tuple[float, str]] = {}
        self._encoder: tuple[Any, str] | None = None
        self._encoder_parts: dict[str, Any] = {}
        self._image_prompts: list[dict[str, Any]] = []
        self._tokens: list[tuple[str, Mapping[str, Tensor | None]]] = []

    def add_network(self, component: str, name: str, net: nn.Module, common: Mapping[str, float] | None = None,
                    **arguments: float) -> None:
        """Add a network beside the UNet.

        Args:
            component: of the pipeline, 'adapter' or 'controlnet'.
            name: the adapter's.
            common: arguments of the call with one value for all networks of this kind.
            arguments: of the call, with one value for each.

        Raises:
            UserError: networks differ in a common argument.
        """
        for key, value in (common or {}).items():
            first, other = self._common.setdefault(key, (value, name))
            if first != value:
                raise UserError(f"diffusers takes one {key} for all {_NAMES[component]}; '{other}' has {first:g} and "
                                f"'{name}' {value:g}. Set the same for all of them.")
        self._networks.setdefault(component, []).append(self._copy(net, self._dtype))
        for key, value in arguments.items():
            self._arguments.setdefault(key, []).append(value)

    def add_image_prompt(self, name: str, encoder: nn.Module, feature_extractor: Any, projector: nn.Module,
                         to_k: Mapping[str, nn.Module], to_v: Mapping[str, nn.Module], scale: Mapping[str, float]
                         ) -> None:
        """Add an IP-Adapter.

        Args:
            name: the adapter's.
            encoder, feature_extractor: the image encoder and its preprocessing.
            projector: a network of diffusers from image embeddings to tokens.
            to_k, to_v, scale: name of a cross-attention -> the keys' and values' projections, and the scale, 0 if
                missing.

        Raises:
            UserError: another IP-Adapter has another image encoder.
        """
        if self._encoder is None:
            self._encoder = encoder, name
            self._encoder_parts = {'image_encoder': self._copy(encoder), 'feature_extractor': feature_extractor}
        elif self._encoder[0] is not encoder:
            raise UserError("A diffusers pipeline has one image encoder for all IP-Adapters; "
                            f"'{self._encoder[1]}' and '{name}' have different ones.")
        to_k, to_v = ({at: self._copy(layer, self._dtype) for at, layer in layers.items()} for layers in (to_k, to_v))
        self._image_prompts.append({'projector': self._copy(projector, self._dtype), 'to_k': to_k, 'to_v': to_v,
                                    'scale': scale})

    def add_lora(self, name: str, part: str, config: Any) -> None:
        """Name a LoRA whose layers are in the copy of `part` already, with its `config` of peft."""
        module: Any = self.parts[part]
        module.peft_config = {**getattr(module, 'peft_config', {}), name: config}
        module._hf_peft_config_loaded = True

    def add_token(self, token: str, vectors: Mapping[str, Tensor | None]) -> None:
        """Add a textual inversion: text encoder -> vectors [n, D] of `token`, None where it has none."""
        self._tokens.append((token, vectors))

    def build(self, model: Model, task: str) -> Any:
        """Return the pipeline of `task`.

        Raises:
            UserError: diffusers has none with these networks.
        """
        import diffusers
        kinds = tuple(sorted(self._networks))
        if (task, kinds) not in PIPELINES:
            raise UserError(f'diffusers has no SDXL pipeline for {task} with {" and ".join(_NAMES[k] for k in kinds)}. '
                            'Remove adapters, choose another task, or sample with this package.')
        cls = getattr(diffusers, PIPELINES[task, kinds])
        if self._image_prompts:
            self._attach_image_prompts()
        options = {'add_watermarker': False, 'force_zeros_for_empty_prompt': model.null_prompt == 'zeros',
                   'requires_aesthetics_score': model.is_refiner}
        networks: dict[str, Any] = {
            name.removesuffix('_union'): nets[0] if len(nets) == 1 else
            getattr(diffusers, _CONTAINERS[name])(nets).eval() if name in _CONTAINERS else nets
            for name, nets in self._networks.items()}
        pipeline = cls(
            **self.parts, **networks, **self._encoder_parts, scheduler=_scheduler(model),
            **{name: copy.deepcopy(getattr(model, name)) for name in loading.TOKENIZERS},
            **{key: value for key, value in options.items() if key in inspect.signature(cls).parameters})
        for token, vectors in self._tokens:
            _load_token(pipeline, token, vectors)
        pipeline.call_arguments = {key: values[0] if len(values) == 1 else values
                                   for key, values in self._arguments.items()}
        pipeline.call_arguments |= {key: value for key, (value, _) in self._common.items()}
        encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
        for owner, parts in ((pipeline, [e for e in encoders if e is not None]), (pipeline.unet, [pipeline.unet])):
            owner.fuse_lora = functools.partial(_fuse_lora, owner, parts)
        return pipeline

    def _copy(self, module: nn.Module, dtype: torch.dtype | None = None) -> Any:
        """Copy a module, not its weights, in evaluation mode; weights of another dtype are cast to `dtype`."""
        self._share(module)
        new = copy.deepcopy(module, self._memo).eval()
        for inner in new.modules():
            inner.register_load_state_dict_pre_hook(_unshare_loaded)
        for parameter in new.parameters():
            if dtype is not None and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        return new

    def _share(self, module: Any) -> None:
        """Let copies of a module's weights share their memory."""
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in self._memo:
                # A new Parameter of the same data: `to` and `requires_grad_` change the Parameter itself. Frozen, as
                # sampling is (`SDXL.frozen`).
                data = tensor.detach()
                self._memo[id(tensor)] = nn.Parameter(data, requires_grad=False) if isinstance(
                    tensor, nn.Parameter) else data

    def _attach_image_prompts(self) -> None:
        """Add the IP-Adapters to the copied UNet; `load_ip_adapter` would copy weights and knows fewer projectors."""
        from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
        from diffusers.models.embeddings import MultiIPAdapterImageProjection
        unet: Any = self.parts['unet']
        for name in cross_attention_names(unet):
            keys, values = ([prompt[key][name] for prompt in self._image_prompts] for key in ('to_k', 'to_v'))
            scales = [prompt['scale'].get(name, 0.0) for prompt in self._image_prompts]
            with torch.device('meta'):  # draw no weights: they are replaced at once
                processor = IPAdapterAttnProcessor2_0(keys[0].out_features, keys[0].in_features,
                                                      num_tokens=[4] * len(keys), scale=scales)  # tokens: not read
            processor.to_k_ip, processor.to_v_ip = nn.ModuleList(keys), nn.ModuleList(values)
            unet.get_submodule(name).set_processor(processor.eval())
        projectors = [prompt['projector'] for prompt in self._image_prompts]
        unet.encoder_hid_proj = MultiIPAdapterImageProjection(projectors).eval()
        unet.config.encoder_hid_dim_type = 'ip_image_proj'


def _resolve_task(model: Model, task: str | None) -> str:
    """Return `task`, or that of the base; check that a pipeline does it with this base."""
    channels, out = model.unet.config.in_channels, model.unet.config.out_channels
    if task is None:
        task = 'inpainting' if channels != out else 'image-to-image' if model.is_refiner else 'text-to-image'
    one_of('task', task, TASKS)
    if channels != out and (task != 'inpainting' or channels != 2 * out + 1):
        raise UserError(f'diffusers has no pipeline for {task} with a UNet of {channels} input channels'
                        + ("; use task='inpainting'." if channels == 2 * out + 1 else '.'))
    if model.is_refiner and task == 'text-to-image':
        raise UserError('diffusers has no text-to-image pipeline for a refiner, which continues from an image or '
                        "latents; use task='image-to-image' or 'inpainting'.")
    return task


def _scheduler(model: Model) -> Any:
    """Return the sampler's scheduler, or Euler's if there is no sampler."""
    from diffusers import EulerDiscreteScheduler
    if model.sampler is not None:
        return model.sampler.build_scheduler(model)
    return EulerDiscreteScheduler.from_config(model.scheduler_settings)


def _load_token(pipeline: Any, token: str, vectors: Mapping[str, Tensor | None]) -> None:
    """Call `load_textual_inversion` for each text encoder; diffusers has no call for both."""
    for part, value in vectors.items():
        if value is not None:
            encoder = getattr(pipeline, part)
            _unshare(encoder.get_input_embeddings())  # with spare rows it is written to in place
            pipeline.load_textual_inversion(value.detach(), token=token, text_encoder=encoder,
                                            tokenizer=getattr(pipeline, part.replace('text_encoder', 'tokenizer')))


def _unshare(module: nn.Module, names: Any = None) -> None:
    """Copy the weights of `module` itself, all or those called `names`, so that they are no longer the model's."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and (names is None or name in names):
            tensor.data = tensor.data.clone()


def _unshare_loaded(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Copy what `load_state_dict` is about to overwrite."""
    _unshare(module, {key.removeprefix(prefix) for key in state if key.startswith(prefix)})


def _fuse_lora(owner: Any, parts: list[Any], *args: Any, **kwargs: Any) -> Any:
    """Replace `fuse_lora` of a pipeline or UNet: copy the weights that LoRAs are fused into first."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    for part in parts:
        for module in part.modules():
            if isinstance(module, BaseTunerLayer):
                _unshare(module.get_base_layer())
    return type(owner).fuse_lora(owner, *args, **kwargs)


@contextmanager
def without_wrappers(model: Components) -> Iterator[None]:
    """Give the base's layers their own names inside, whatever adapters have wrapped around them."""
    with ExitStack() as stack:
        for part in (model.unet, model.text_encoder, model.text_encoder_2):
            if part is not None:
                stack.enter_context(unwrapped(part))
        yield


def save_pipeline(model: Model, folder: Path) -> None:
    """Write the base, without adapters, in diffusers' layout."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    pipeline = StableDiffusionXLPipeline(
        **{name: loaded(getattr(model, name)) for name in (*loading.MODULES, *loading.TOKENIZERS)},
        add_watermarker=False,
        scheduler=EulerDiscreteScheduler.from_config(model.scheduler_settings),
        force_zeros_for_empty_prompt=model.null_prompt == 'zeros')
    with without_wrappers(model):
        pipeline.save_pretrained(str(folder), safe_serialization=True)
    for encoder in ('text_encoder', 'text_encoder_2'):
        _restore_prefix(folder / encoder / 'model.safetensors')


def _restore_prefix(path: Path) -> None:
    """Restore the prefix `text_model.` of CLIP's keys: transformers 5 removes it, other tools look for it."""
    if path.is_file():
        state = load_file(path)
        if not any(key.startswith('text_model.') for key in state):
            save_file({key if key.startswith('text_projection') else f'text_model.{key}': value
                       for key, value in state.items()}, path, metadata={'format': 'pt'})
