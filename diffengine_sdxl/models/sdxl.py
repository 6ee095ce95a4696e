"""The one model: SDXL with any set of adapters. Training, evaluation and sampling reach the UNet through it alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from diffengine_sdxl import rng
from diffengine_sdxl.models import loading
from diffengine_sdxl.models.attention import set_backend, tapped
from diffengine_sdxl.models.data_preprocessor import BatchPreprocessor
from diffengine_sdxl.models.describe import table
from diffengine_sdxl.models.latents import Latents
from diffengine_sdxl.models.pipeline import to_diffusers
from diffengine_sdxl.models.predictions import VARIANTS, frozen, predictions, without_adapters
from diffengine_sdxl.models.prompts import Prompts
from diffengine_sdxl.models.text import ENCODERS
from diffengine_sdxl.registry import ADAPTERS, MODELS, OBJECTIVES, SAMPLERS
from diffengine_sdxl.schedule import NoiseSchedule
from diffengine_sdxl.structures import Batch, Conditioning, Taps, UNetCall, where

PRECISIONS = {'no': None, 'fp16': torch.float16, 'bf16': torch.bfloat16}


@MODELS.register_module()
class SDXL(Latents, Prompts, BaseModel):
    """SDXL: UNet, VAE, two text encoders, and a dict of adapters by name.

    Args:
        pretrained: diffusers folder, hub id, or a single .safetensors or .ckpt file (path or hub link); None for
            random weights keyed by `seed`.
        vae, unet: another VAE or UNet, likewise, also in a file or folder of its own; None for the base's.
        revision, variant, cache_dir: of the hub, as in diffusers.
        tokenizer: folder or hub id with folders 'tokenizer' and 'tokenizer_2'; None for the base's.
        config: folder of component configs for random weights or a single file; None for SDXL base 1.0's.
        adapters: name -> config of an adapter; a value of None takes one out.
        objective, sampler: configs of the training objective and of the sampler.
        trainable: parts of the base that train, of unet, vae, text_encoder, text_encoder_2; all else is frozen.
        mixed_precision: 'no', 'fp16' or 'bf16': what the frozen parts are stored in and trained parts compute in.
        dtype: dtype of the weights, one for all or by part ('float32', 'bfloat16', 'float16', 'float64'); None
            stores what trains in fp32 and the rest as `mixed_precision` says.
        attention: 'sdpa' or 'xformers'.
        gradient_checkpointing: recompute activations in the backward pass.
        prediction_type: 'epsilon' or 'v_prediction'; None for the base's own.
        zero_terminal_snr: rescale the noise schedule so that its last step is pure noise (Lin et al. 2023).
        null_text: what stands for no text: 'zeros' (stock's missing negative prompt) or 'empty' (the caption ''); None
            for what the base's own pipeline says, else zeros.
        shared: parts that are not loaded but taken from another model, such as a refiner's text_encoder_2 and vae.
        base: that other SDXL; whoever builds a refiner gives it.
        seed: of fresh weights; the runner fills in its own.

    Raises:
        ValueError: a part cannot be loaded, a name is unknown or not allowed, parts don't fit.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any
    adapters: Any
    #: Set by `without_adapters`.
    alone = False
    #: Set where parts come to this device only while they work.
    execution_device: torch.device | None = None

    def __init__(self, pretrained: str | None = None, vae: str | None = None, unet: str | None = None,
                 revision: str | None = None, variant: str | None = None, cache_dir: str | None = None,
                 config: str | None = None, tokenizer: str | None = None,
                 adapters: Mapping[str, Any] | None = None, objective: Any = None, sampler: Any = None,
                 trainable: Sequence[str] = (), mixed_precision: str = 'no',
                 dtype: str | Mapping[str, str] | None = None, attention: str = 'sdpa',
                 gradient_checkpointing: bool = False, prediction_type: str | None = None,
                 zero_terminal_snr: bool = False, null_text: str | None = None, shared: Sequence[str] = (),
                 base: Any = None, seed: int | None = None) -> None:
        super().__init__(data_preprocessor=BatchPreprocessor())
        _choose('mixed_precision', mixed_precision, PRECISIONS)
        if null_text is not None:
            _choose('null_text', null_text, ('zeros', 'empty'))
        for part in trainable:
            _choose('trainable', part, loading.MODULES)
        self.pretrained, self.other_unet, self.seed = pretrained, unet, int(seed or 0)
        self.trainable_parts = tuple(trainable)
        self.compute_dtype = PRECISIONS[mixed_precision]
        self.shared_parts = tuple(shared)
        parts = loading.load_components(pretrained, vae, config, tokenizer, self._dtypes(dtype), self.seed,
                                        _taken(base, shared, trainable), unet=unet, revision=revision,
                                        variant=variant, cache_dir=cache_dir)
        self.null_text = null_text or parts.get('null_text', 'zeros')
        self.unet, self.vae = parts['unet'], parts['vae']
        self.text_encoder, self.text_encoder_2 = parts.get('text_encoder'), parts['text_encoder_2']
        self.tokenizer, self.tokenizer_2 = parts.get('tokenizer'), parts['tokenizer_2']
        self.scheduler_config = parts['scheduler']
        self.schedule = NoiseSchedule.from_config(self.scheduler_config, prediction_type, zero_terminal_snr)
        self.vae_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.attention = attention
        set_backend(self.unet, attention)
        self.objective = OBJECTIVES.build(objective) if objective else None
        self._attach(adapters or {})
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            for part in ('text_encoder', 'text_encoder_2'):
                if part in self.trainable_parts:
                    getattr(self, part).gradient_checkpointing_enable()
        self.sampler = SAMPLERS.build(sampler) if sampler else None

    def _dtypes(self, dtype: str | Mapping[str, str] | None) -> dict[str, torch.dtype]:
        dtypes: dict[str, torch.dtype] = {}
        for part in loading.MODULES:
            name = dtype if isinstance(dtype, str) else (dtype or {}).get(part)
            if name is not None:
                _choose('dtype', name, ('float32', 'bfloat16', 'float16', 'float64'))
                dtypes[part] = getattr(torch, name)
            elif part in self.trainable_parts or self.compute_dtype is None or part == 'vae':
                # SDXL's own VAE overflows in fp16; a fixed one can be given dtype=dict(vae='float16').
                dtypes[part] = torch.float32
            else:
                dtypes[part] = self.compute_dtype
        if isinstance(dtype, Mapping):
            for part in dtype:
                _choose('dtype', part, loading.MODULES)
        return dtypes

    def _attach(self, configs: Mapping[str, Any]) -> None:
        """Freeze all, attach all, make all ready, and only then say what trains."""
        self.adapters = nn.ModuleDict()
        self.eval()
        adapters = {}
        for name, config in configs.items():
            if config is not None:
                _check_name(name)
                adapters[name] = ADAPTERS.build(dict(config))
                adapters[name].name = name
        # By name, so that a config's order changes nothing; last those that change the base's own modules, so that the
        # others find these as they were.
        for name, adapter in sorted(adapters.items(), key=lambda item: (item[1].in_base, item[0])):
            with rng.fork(self.seed, 'adapter', name):
                adapter.attach(self)
            # What trains stays in fp32 beside a half-precision base, but an fp64 model is fp64 throughout.
            self.adapters[name] = adapter.double() if self.unet_weight.dtype == torch.float64 else adapter
        for adapter in self.adapters.values():
            adapter.ready(self)
        self.requires_grad_(False)
        # Kept: asking the model for its parameters walks all of its modules (9 ms).
        self._trained = [parameter for owned in self.trainables().values() for _, parameter in owned]
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._unet_mixed = self._mixed('unet')
        self.text_mixed = any(self._mixed(part) for part in ENCODERS if getattr(self, part) is not None)
        self.text_trains = any(p.requires_grad for part in ENCODERS if getattr(self, part) is not None
                               for p in getattr(self, part).parameters()) or any(
            adapter.words() and adapter.trainables() for adapter in self.adapters.values())
        own = {id(p) for a in self.adapters.values() for p in a.owned()}
        self.text_changed = any(id(p) in own for part in ENCODERS if getattr(self, part) is not None
                                for p in getattr(self, part).parameters()) or any(
            adapter.words() for adapter in self.adapters.values())
        self.register_state_dict_post_hook(_keep_trained)

    def _mixed(self, part: str) -> bool:
        """Whether `part` computes with weights of several dtypes: those that train are fp32 beside half precision."""
        weights = [*getattr(self, part).parameters(), *(p for a in self.adapters.values() for p in a.inside(part))]
        return part in self.trainable_parts or any(p.dtype != weights[0].dtype for p in weights)

    def trainables(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """What trains: part or adapter name -> its parameters with their full names, in a fixed order."""
        names = {id(p): n for n, p in self.named_parameters()}
        owners: dict[str, list[tuple[str, nn.Parameter]]] = {}
        # An adapter's weights may live in a part of the base (LoRA); they are the adapter's all the same.
        theirs = {id(p) for adapter in self.adapters.values() for p in (*adapter.owned(), *adapter.trainables())}
        for part in self.trainable_parts:
            module = getattr(self, part)
            # The penultimate layer is read, so the first encoder's last layer and norm never get a gradient.
            owners[part] = [(names[id(p)], p) for n, p in module.named_parameters()
                            if not self._unread(part, n) and id(p) not in theirs]
        for name, adapter in self.adapters.items():
            parameters = [(names[id(p)], p) for p in adapter.trainables()]
            if parameters:
                owners[name] = parameters
        return owners

    def _unread(self, part: str, name: str) -> bool:
        if part == 'vae':  # an objective that reads latents tells the decoder nothing
            return not name.startswith(getattr(self.objective, 'vae_parts', ('encoder.', 'quant_conv.')))
        if part != 'text_encoder':
            return False
        last = self.text_encoder.config.num_hidden_layers - 1
        return f'layers.{last}.' in name or 'final_layer_norm' in name

    @property
    def unet_weight(self) -> Tensor:
        """A weight of the UNet, for its dtype and device: diffusers' own properties walk all its modules (4 ms)."""
        return next(self.unet.parameters())

    @property
    def device(self) -> torch.device:
        """Where it computes; its parts may wait in the CPU's memory (engine.inference.placing)."""
        return self.execution_device or self.unet_weight.device

    @property
    def num_time_ids(self) -> int:
        """How many numbers of size and crop the UNet is told: 6; a refiner takes 5, the last an aesthetic score."""
        config = self.unet.config
        rest = config.projection_class_embeddings_input_dim - self.text_encoder_2.config.projection_dim
        return int(rest // config.addition_time_embed_dim)

    @property
    def scheduler_settings(self) -> dict[str, Any]:
        """The config of a diffusers scheduler that samples what this model was trained on."""
        own: dict[str, Any] = {'prediction_type': self.schedule.prediction_type}
        if self.schedule.zero_terminal_snr:
            own['rescale_betas_zero_snr'] = True
        return {**self.scheduler_config, **own}

    @property
    def size_divisor(self) -> int:
        """Sides of images must be divisible by this, in pixels."""
        return math.lcm(self.vae_factor, *(a.size_divisor for a in self.adapters.values()))

    @property
    def variants(self) -> tuple[str, ...]:
        """Whose pictures can be made: 'base', and 'adapted' if there are adapters. A fine-tuned base is 'base'."""
        return VARIANTS if self.adapters else VARIANTS[:1]

    def __repr__(self) -> str:
        """What the model is made of: its base, and a table of its adapters."""
        return table(self)

    def to_diffusers(self, task: str | None = None) -> Any:
        """A stock diffusers pipeline over the same weights; see `models.pipeline.to_diffusers`.

        Args:
            task: 'text-to-image', 'image-to-image' or 'inpainting'; None for what the base was made for.

        Raises:
            ValueError: no stock pipeline does this with these adapters.
        """
        return to_diffusers(self, task)

    def without_adapters(self) -> AbstractContextManager[None]:
        """Inside, the outputs are bitwise those of a model built without adapters. For pictures, not for training."""
        return without_adapters(self)

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, no weight requires gradients, and the outputs are bitwise those of a model that does not train."""
        return frozen(self._trained)

    def train(self, mode: bool = True) -> SDXL:
        """Training mode for what trains; frozen parts stay in evaluation mode."""
        self.training = mode
        for part in loading.MODULES:
            if getattr(self, part) is not None:
                getattr(self, part).train(mode and part in self.trainable_parts)
        for adapter in self.adapters.values():
            adapter.train(mode and bool(adapter.trainables()))
        return self

    def encode(self, batch: Batch, branches: Sequence[str] = ('cond',), project: bool = False) -> Conditioning:
        """All that a guidance branch tells the denoiser; several branches are stacked along the batch, in order.

        Each text encoder is called once a branch, each adapter once for all of them.

        Args:
            batch: B samples.
            branches: of 'uncond', 'cond' and 'perturbed', which is told what 'cond' is.
            project: also run the adapters' trained part, for a sampling loop; training leaves it to `predict`.
        """
        assert project or len(branches) == 1, 'several branches are for sampling'
        read = {branch: self._encode_text(batch, branch) for branch in branches if branch != 'perturbed'}
        rows = [read['cond' if branch == 'perturbed' else branch] for branch in branches]
        text, pooled, time_ids = (torch.cat([row[i] for row in rows]) for i in range(3))
        adapters = {}
        if unknown := batch.drop.keys() - {'text', *self.adapters}:
            raise ValueError(f"The samples drop the input of {', '.join(map(repr, sorted(unknown)))}, and the model "
                             f'has no such adapter; it has {", ".join(self.adapters) or "none"}.')
        for name, adapter in () if self.alone else self.adapters.items():
            tensors = adapter.encode(batch)
            if name in batch.drop:
                null = adapter.null(tensors)
                tensors = {k: where(batch.drop[name], null[k], tensors[k]) for k in tensors}
            if project:
                with self._autocast(True):
                    tensors = adapter.expand(tensors, branches)
            adapters[name] = tensors
        return Conditioning(text, pooled, time_ids, adapters, projected=project)

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning, progress: Tensor,
                taps: Taps | None = None) -> Tensor:
        """The UNet's raw output, of its `prediction_type`, with every adapter's part: the only way to the UNet.

        Args:
            x: [B, 4, h, w], any dtype; t: [] or [B]; conditioning: B rows.
            progress: [B, 2] on the CPU, see UNetCall.
            taps: what guidances ask of self-attentions; for sampling.

        Returns:
            [B, 4, h, w] in the UNet's dtype (the autocast dtype where it trains).

        Raises:
            ValueError: what an adapter adds does not fit, or the UNet wants other channels.
        """
        dtype = self.unet_weight.dtype
        call = UNetCall(sample=x.to(dtype), timestep=t, progress=progress, text=conditioning.text.to(dtype),
                        pooled=conditioning.pooled.to(dtype), time_ids=conditioning.time_ids,
                        training=torch.is_grad_enabled(), timestep_cond=conditioning.timestep_cond)
        for name, tensors in conditioning.adapters.items():
            adapter = self.adapters[name]
            with self._autocast(True):
                adapter.contribute(call, tensors if conditioning.projected else adapter.project(tensors))
        if conditioning.channels is not None:
            call.add_channels(conditioning.channels)
        call.check_inputs(self.unet.config)
        # The base alone computes as it does without an adapter's fp32 weights in it.
        mixed = 'unet' in self.trainable_parts if self.alone else self._unet_mixed
        with tapped(self.unet, taps), self._autocast(mixed):
            out = self.unet(**call.kwargs(), return_dict=False)[0]
        call.check_consumed()
        return out

    def forward(self, inputs: Batch, data_samples: Any = None, mode: str = 'loss',
                variants: Sequence[str] | None = None) -> Any:
        """'loss': dict of losses; 'predict': see `models.predictions.predictions`; mmengine's entry."""
        if mode == 'loss':
            assert self.objective is not None, 'the runner checks that a model that trains has an objective'
            return self.objective(self, inputs)
        if mode == 'predict':
            return predictions(self, inputs, variants)
        raise ValueError(f"mode='{mode}' is not known; choose 'loss' or 'predict'.")

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """mmengine's sum of losses; keeps the parts, so that a step that fails can name them."""
        total, parts = super().parse_losses(losses)
        # Detached: mmengine's hold the graph, and the next step's memory would come on top of it.
        self.last_losses = {name: part.detach() for name, part in parts.items()}
        return total, self.last_losses

    def _autocast(self, wanted: bool) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.compute_dtype or torch.bfloat16,
                              enabled=wanted and self.compute_dtype is not None)


def _keep_trained(model: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Prune a state dict, in place (it carries `_metadata`), to what trains."""
    kept = {prefix + name for parameters in model.trainables().values() for name, _ in parameters}
    for name in [n for n in state if n.startswith(prefix) and n not in kept]:
        del state[name]


def _choose(key: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(f'{key}={value!r} is not known; choose of {", ".join(map(repr, known))}.')


def _taken(base: Any, shared: Sequence[str], trainable: Sequence[str]) -> dict[str, Any]:
    """The parts of `base` that another model shares."""
    for part in shared:
        _choose('shared', part, loading.MODULES)
        if base is None:
            raise ValueError(f"shared={list(shared)!r}: there is no other model to take '{part}' from; it is for a "
                             'refiner beside its base.')
        if getattr(base, part) is None:
            raise ValueError(f"shared={list(shared)!r}: the other model has no '{part}'.")
        if part in trainable:
            raise ValueError(f"'{part}' cannot be shared and train.")
    return {part: getattr(base, part) for part in shared}


def _check_name(name: str) -> None:
    """Refuse adapter names that nn.ModuleDict or our folders cannot take."""
    taken = {*loading.MODULES, 'text', 'pipeline'}
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name) or name in taken:
        raise ValueError(f"'{name}' cannot name an adapter: take letters, digits and _, and none of torch's own names "
                         f"(type, train, to, ...) or of {', '.join(sorted(taken))}.")
