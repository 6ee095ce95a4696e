"""An SDXL as a stock diffusers pipeline: in memory, over the same weights, or on the disk."""

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
from diffengine_sdxl.models import loading
from diffengine_sdxl.models.attention import cross_attention_names
from diffengine_sdxl.registry import nearest

#: Task, and the networks that adapters bring along -> the stock pipeline. diffusers has no others for SDXL.
PIPELINES = {
    ('text-to-image', ()): 'StableDiffusionXLPipeline',
    ('text-to-image', ('adapter',)): 'StableDiffusionXLAdapterPipeline',
    ('text-to-image', ('controlnet',)): 'StableDiffusionXLControlNetPipeline',
    ('image-to-image', ()): 'StableDiffusionXLImg2ImgPipeline',
    ('image-to-image', ('controlnet',)): 'StableDiffusionXLControlNetImg2ImgPipeline',
    ('inpainting', ()): 'StableDiffusionXLInpaintPipeline',
    ('inpainting', ('controlnet',)): 'StableDiffusionXLControlNetInpaintPipeline',
}
TASKS = tuple(dict.fromkeys(task for task, _ in PIPELINES))
#: The networks of PIPELINES: how they are called, and what holds several of them.
_WORDS = {'adapter': 'T2I-Adapters', 'controlnet': 'ControlNets'}
_SEVERAL = {'adapter': 'MultiAdapter', 'controlnet': 'MultiControlNetModel'}


def to_diffusers(model: Any, task: str | None = None) -> Any:
    """A stock diffusers pipeline that makes bitwise `model.sampler`'s latents, with all adapters in it.

    Its modules are copies around the model's own weights: they take no memory, and nothing that one does with the
    pipeline (load and fuse LoRAs, set scales and attention processors, `to`, offload) shows in `model`. What trains the
    model's weights trains the pipeline's, which are frozen.

    What diffusers takes with every call is not in the pipeline: inputs, steps, classifier-free guidance (it has no
    other here), and, as `pipeline.call_arguments`, the scales and windows of T2I-Adapters and ControlNets:

        pipeline(prompt, image=edges, num_inference_steps=30, **pipeline.call_arguments)

    Several pictures of one kind are a list, in the order of the adapters' names. The mask of an IP-Adapter is given as
    `cross_attention_kwargs={'ip_adapter_masks': [mask]}`, each [1, n, H, W], None for an adapter without.
    LoRAs are known to `set_adapters`, `fuse_lora` and `delete_adapters` by their adapters' names.

    A network that is fp32 beside a half-precision base is cast to the base's dtype, as stock has no autocast; there
    pictures agree to that precision only. A refiner that shares a text encoder takes the LoRAs in it along; make its
    pipeline inside `base.without_adapters()`.

    Args:
        model: an SDXL, whose adapters' weights and scales are taken as they are.
        task: of TASKS; None for what the base was made for: a refiner 'image-to-image', a UNet that takes a mask
            'inpainting', all others 'text-to-image'.

    Raises:
        ValueError: no stock pipeline does this task with this base or these adapters; or see `Adapter.to_stock`.
    """
    task = _checked_task(model, task)
    with rng.fork('to_diffusers'):  # peft and transformers draw what is overwritten at once
        stock = Stock(model)
        for adapter in () if model.alone else model.adapters.values():
            adapter.to_stock(stock)
        return stock.build(model, task)


class Stock:
    """A stock pipeline in the making, to which each adapter adds its part (`Adapter.to_stock`).

    Attributes:
        parts: unet, vae, text_encoder, text_encoder_2: copies around the model's weights; None where it has none.
    """

    def __init__(self, model: Any) -> None:
        self._memo: dict[int, Any] = {}
        self.parts = {name: None if getattr(model, name) is None else self._copy(getattr(model, name))
                      for name in loading.MODULES}
        self._dtype = model.unet_weight.dtype
        self._networks: dict[str, list[nn.Module]] = {}
        self._arguments: dict[str, list[float]] = {}
        self._for_all: dict[str, tuple[float, str]] = {}
        self._encoder: tuple[Any, str] | None = None
        self._seeing: dict[str, Any] = {}
        self._prompts: list[dict[str, Any]] = []
        self._words: list[tuple[str, Mapping[str, Tensor | None]]] = []

    def add_network(self, component: str, name: str, net: nn.Module, for_all: Mapping[str, float] | None = None,
                    **arguments: float) -> None:
        """A network of its own beside the UNet.

        Args:
            component: of the pipeline, 'adapter' or 'controlnet'. name: the adapter's.
            for_all: arguments of the call that are one number for all networks of this kind.
            arguments: of the call, one for each.

        Raises:
            ValueError: another network has another value of what is one for all.
        """
        for key, value in (for_all or {}).items():
            held, other = self._for_all.setdefault(key, (value, name))
            if held != value:
                raise ValueError(f"Stock diffusers takes one {key} for all {_WORDS[component]}; '{other}' has {held:g} "
                                 f"and '{name}' {value:g}. Give them the same window.")
        self._networks.setdefault(component, []).append(self._copy(net, self._dtype))
        for key, value in arguments.items():
            self._arguments.setdefault(key, []).append(value)

    def add_image_prompt(self, name: str, encoder: nn.Module, feature_extractor: Any, projector: nn.Module,
                         to_k: Mapping[str, nn.Module], to_v: Mapping[str, nn.Module], scale: Mapping[str, float]
                         ) -> None:
        """An IP-Adapter.

        Args:
            name: the adapter's. encoder, feature_extractor: see and prepare its pictures.
            projector: embeddings to tokens, a network of diffusers.
            to_k, to_v: name of a cross-attention -> keys or values of the tokens; scale: likewise, 0 where missing.

        Raises:
            ValueError: another one sees with another encoder.
        """
        if self._encoder is None:
            self._encoder = encoder, name
            self._seeing = {'image_encoder': self._copy(encoder), 'feature_extractor': feature_extractor}
        elif self._encoder[0] is not encoder:
            raise ValueError("A stock pipeline has one image encoder for all IP-Adapters; "
                             f"'{self._encoder[1]}' and '{name}' see with different ones.")
        to_k, to_v = ({at: self._copy(layer, self._dtype) for at, layer in own.items()} for own in (to_k, to_v))
        self._prompts.append({'projector': self._copy(projector, self._dtype), 'to_k': to_k, 'to_v': to_v,
                              'scale': scale})

    def add_lora(self, name: str, part: str, config: Any) -> None:
        """A LoRA or relative whose layers are in the copies already; stock's commands know it by `name` from now on.

        Args:
            part: whose layers. config: peft's.
        """
        module: Any = self.parts[part]
        module.peft_config = {**getattr(module, 'peft_config', {}), name: config}
        module._hf_peft_config_loaded = True

    def add_word(self, word: str, vectors: Mapping[str, Tensor | None]) -> None:
        """A textual inversion: text encoder -> vectors [n, D] of `word`, None where it has none."""
        self._words.append((word, vectors))

    def build(self, model: Any, task: str) -> Any:
        """The pipeline of `task`, with what was added.

        Raises:
            ValueError: there is no such pipeline.
        """
        import diffusers
        brought = tuple(sorted(self._networks))
        if (task, brought) not in PIPELINES:
            raise ValueError(f'diffusers has no pipeline for {task} with {" and ".join(_WORDS[b] for b in brought)} on '
                             f'SDXL. Take some adapters out, another task, or sample here.')
        cls = getattr(diffusers, PIPELINES[task, brought])
        if self._prompts:
            self._let_see()
        options = {'add_watermarker': False, 'force_zeros_for_empty_prompt': model.null_text == 'zeros',
                   'requires_aesthetics_score': model.num_time_ids == 5}
        networks = {name: nets[0] if len(nets) == 1 else getattr(diffusers, _SEVERAL[name])(nets).eval()
                    for name, nets in self._networks.items()}
        pipeline = cls(
            **self.parts, **networks, **self._seeing, scheduler=_scheduler(model),
            **{name: copy.deepcopy(getattr(model, name)) for name in loading.TOKENIZERS},
            **{key: value for key, value in options.items() if key in inspect.signature(cls).parameters})
        for word, vectors in self._words:
            _teach(pipeline, word, vectors)
        pipeline.call_arguments = {key: values[0] if len(values) == 1 else values
                                   for key, values in self._arguments.items()}
        pipeline.call_arguments |= {key: value for key, (value, _) in self._for_all.items()}
        encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
        for holder, parts in ((pipeline, [e for e in encoders if e is not None]), (pipeline.unet, [pipeline.unet])):
            holder.fuse_lora = functools.partial(_fuse_lora, holder, parts)
        return pipeline

    def _copy(self, module: nn.Module, dtype: torch.dtype | None = None) -> Any:
        """Another module around the same weights, in evaluation mode; in `dtype` they are copies if they differ."""
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in self._memo:
                # Another Parameter of the same data: `to` and `requires_grad_` change the Parameter itself. Frozen, as
                # the sampler's weights are (`predictions.frozen`).
                same = tensor.detach()
                self._memo[id(tensor)] = nn.Parameter(same, requires_grad=False) if isinstance(
                    tensor, nn.Parameter) else same
        new = copy.deepcopy(module, self._memo).eval()
        for inner in new.modules():
            inner.register_load_state_dict_pre_hook(_own_what_is_loaded)
        for parameter in new.parameters():
            if dtype is not None and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        return new

    def _let_see(self) -> None:
        """Put the IP-Adapters into the copied UNet, as `load_ip_adapter` does, which copies weights and knows fewer."""
        from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
        from diffusers.models.embeddings import MultiIPAdapterImageProjection
        unet: Any = self.parts['unet']
        for name in cross_attention_names(unet):
            keys, values = ([prompt[which][name] for prompt in self._prompts] for which in ('to_k', 'to_v'))
            scales = [prompt['scale'].get(name, 0.0) for prompt in self._prompts]
            with torch.device('meta'):  # nothing is drawn for what is replaced at once
                processor = IPAdapterAttnProcessor2_0(keys[0].out_features, keys[0].in_features,
                                                      num_tokens=[4] * len(keys), scale=scales)  # tokens: not read
            processor.to_k_ip, processor.to_v_ip = nn.ModuleList(keys), nn.ModuleList(values)
            unet.get_submodule(name).set_processor(processor.eval())
        unet.encoder_hid_proj = MultiIPAdapterImageProjection([prompt['projector'] for prompt in self._prompts]).eval()
        unet.config.encoder_hid_dim_type = 'ip_image_proj'


def _checked_task(model: Any, task: str | None) -> str:
    """`task`, or what the base was made for; refused where no stock pipeline does it with this base."""
    channels, out = model.unet.config.in_channels, model.unet.config.out_channels
    wide, aesthetic = channels != out, model.num_time_ids == 5
    if task is None:
        task = 'inpainting' if wide else 'image-to-image' if aesthetic else 'text-to-image'
    if task not in TASKS:
        raise ValueError(f"task='{task}' is not known; choose of {', '.join(map(repr, TASKS))}."
                         f'{nearest(task, list(TASKS))}')
    if wide and (task != 'inpainting' or channels != 2 * out + 1):
        raise ValueError(f"diffusers has no pipeline for {task} with a UNet of {channels} input channels"
                         + ("; it was made for task='inpainting'." if channels == 2 * out + 1 else '.'))
    if aesthetic and task == 'text-to-image':
        raise ValueError('A refiner goes on from a picture or from latents; diffusers has no pipeline in which it '
                         "begins with noise. Take task='image-to-image' or 'inpainting'.")
    return task


def _scheduler(model: Any) -> Any:
    """The sampler's; Euler's where there is no sampler."""
    from diffusers import EulerDiscreteScheduler
    if model.sampler is not None:
        return model.sampler.build_scheduler(model)
    return EulerDiscreteScheduler.from_config(model.scheduler_settings)


def _teach(pipeline: Any, word: str, vectors: Mapping[str, Tensor | None]) -> None:
    """`load_textual_inversion`, once for each text encoder: for both at once diffusers has no way."""
    for part, own in vectors.items():
        if own is not None:
            encoder = getattr(pipeline, part)
            _own(encoder.get_input_embeddings())  # with rows to spare it is not made anew but written to
            pipeline.load_textual_inversion(own.detach(), token=word, text_encoder=encoder,
                                            tokenizer=getattr(pipeline, part.replace('text_encoder', 'tokenizer')))


def _own(module: nn.Module, names: Any = None) -> None:
    """Give a copy's module weights of its own: the ones called `names`, or all; not those of modules in it."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and (names is None or name in names):
            tensor.data = tensor.data.clone()


def _own_what_is_loaded(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before `load_state_dict` writes into a copy."""
    _own(module, {key.removeprefix(prefix) for key in state if key.startswith(prefix)})


def _fuse_lora(holder: Any, parts: list[Any], *args: Any, **kwargs: Any) -> Any:
    """In place of `fuse_lora` of a pipeline or UNet: what LoRAs are fused into must not be the model's own weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    for part in parts:
        for module in part.modules():
            if isinstance(module, BaseTunerLayer):
                _own(module.get_base_layer())
    return type(holder).fuse_lora(holder, *args, **kwargs)


@contextmanager
def without_wrappers(model: Any) -> Iterator[None]:
    """Inside, the base's layers stand under their own names, whatever adapters have put around them."""
    with ExitStack() as stack:
        for part in (model.unet, model.text_encoder, model.text_encoder_2):
            if part is not None:
                stack.enter_context(unwrapped(part))
        yield


def save_pipeline(model: Any, folder: Path) -> None:
    """Write the base in diffusers' layout; adapters stay out of it.

    Args:
        model: an SDXL. folder: made if missing.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    pipeline = StableDiffusionXLPipeline(
        vae=model.vae, text_encoder=model.text_encoder, text_encoder_2=model.text_encoder_2,
        tokenizer=model.tokenizer, tokenizer_2=model.tokenizer_2, unet=model.unet, add_watermarker=False,
        scheduler=EulerDiscreteScheduler.from_config(model.scheduler_settings),
        force_zeros_for_empty_prompt=model.null_text == 'zeros')
    with without_wrappers(model):
        pipeline.save_pretrained(str(folder), safe_serialization=True)
    for encoder in ('text_encoder', 'text_encoder_2'):
        _restore_prefix(folder / encoder / 'model.safetensors')


def _restore_prefix(path: Path) -> None:
    """Give CLIP's keys the prefix `text_model.` back: transformers 5 leaves it out, other tools look for it."""
    if not path.is_file():
        return
    state = load_file(path)
    if any(k.startswith('text_model.') for k in state):
        return
    save_file({k if k.startswith('text_projection') else f'text_model.{k}': v for k, v in state.items()}, path,
              metadata={'format': 'pt'})
