"""SDXL with any set of adapters; training, evaluation and sampling call the UNet only through it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from diffengine_sdxl import rng
from diffengine_sdxl.adapters.precision import autocast, is_mixed, under_autocast
from diffengine_sdxl.attention import probed, set_backend
from diffengine_sdxl.errors import UserError, error_prefix, one_of, whole_number
from diffengine_sdxl.loading import base as loading
from diffengine_sdxl.loading.deferred import Deferred
from diffengine_sdxl.models.adapter_sets import AdapterSetsMixin
from diffengine_sdxl.models.cache_plan import CacheMixin
from diffengine_sdxl.models.components import PRECISIONS, check_adapter_name, component_dtypes
from diffengine_sdxl.models.components import shared_components as shared
from diffengine_sdxl.models.data_preprocessor import BatchPreprocessor
from diffengine_sdxl.models.diffusers_pipeline import to_diffusers
from diffengine_sdxl.models.generate import generate
from diffengine_sdxl.models.partners import check_partners
from diffengine_sdxl.models.prompt_branches import ENCODERS, PromptMixin, encode_text
from diffengine_sdxl.models.summary import summary
from diffengine_sdxl.models.text_encoders import check_chunks
from diffengine_sdxl.models.vae import VAEMixin
from diffengine_sdxl.noise_schedule import NoiseSchedule
from diffengine_sdxl.registry import ADAPTERS, MODELS, OBJECTIVES, SAMPLERS
from diffengine_sdxl.structures import AttentionProbes, Batch, Conditioning, UNetCall, where


@MODELS.register_module()
class SDXL(AdapterSetsMixin, CacheMixin, VAEMixin, PromptMixin, BaseModel):
    """SDXL: UNet, VAE, two text encoders (a refiner: one), and a dict of adapters by name.

    Args:
        pretrained: diffusers folder, hub id, or a single .safetensors or .ckpt file (path or hub link); None for
            random weights keyed by `seed`.
        vae, unet: another VAE or UNet, likewise, also in a file or folder of its own; None for the base's.
        revision, variant, cache_dir: of the hub, as in diffusers.
        tokenizer: folder or hub id with folders 'tokenizer' and 'tokenizer_2'; None for the base's.
        config: folder of component configs for random weights or a single file; None for SDXL base 1.0's.
        adapters: name -> config of an adapter; None as a config removes the adapter.
        partners: name of an adapter -> dict(prob=0.5, scale=(0.5, 1.0), start=0.0, end=1.0): in training it acts on a
            part of the samples only, see `models.partners`. Frozen or training.
        objective, sampler: configs of the training objective and of the sampler.
        trainable: components that train, of unet, vae, text_encoder, text_encoder_2; the others are frozen.
        mixed_precision: 'no', 'fp16' or 'bf16': dtype of frozen weights, and of autocast around components that train
            and the adapters' own networks, see `autocast`.
        dtype: dtype of the weights, one for all or by component ('float32', 'bfloat16', 'float16', 'float64'); None
            stores what trains in fp32, and the rest as `mixed_precision` says; but a VAE that overflows in fp16
            (`force_upcast` in its config, as SDXL's own) in fp32.
        attention: 'sdpa' or 'xformers'.
        gradient_checkpointing: recompute activations in the backward pass.
        prediction_type: 'epsilon' or 'v_prediction'; None for the base's.
        zero_terminal_snr: rescale the noise schedule so that its last step is pure noise (Lin et al. 2023).
        null_prompt: embeddings of a missing or dropped prompt: 'zeros' (as diffusers' missing negative prompt) or
            'empty' (the caption ''); None for the setting of the base's pipeline, else zeros.
        caption_chunks: chunks of 75 tokens that captions are read in while training, tests and samples included; every
            caption is padded to as many, and what is longer is cut. Above 1, prompts are read with
            prompt_syntax='long' unless a request sets another.
        shared_components: components to take from `base_model`, such as a refiner's text_encoder_2 and vae.
        base_model: the SDXL to share them with; the inferencer sets it for a refiner.
        seed: of random weights; the runner sets it.
        lazy_encoders: load VAE, text encoders and image encoders that neither train nor are adapted at their first use,
            see `loading.deferred`; a run with a `cache` sets it.

    Raises:
        UserError: a component cannot be loaded, a setting is unknown, or components don't fit together.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any
    adapters: Any
    #: Frozen image encoders, which adapters share.
    shared_encoders: nn.ModuleDict
    #: Set by inference.offload, which keeps idle components in the CPU's memory.
    execution_device: torch.device | None = None
    #: Set by `speed.compile='graph'`: calls the UNet through CUDA graphs, see models.cuda_graph.
    unet_graphs: Any = None

    def __init__(self, pretrained: str | None = None, vae: str | None = None, unet: str | None = None,
                 revision: str | None = None, variant: str | None = None, cache_dir: str | None = None,
                 config: str | None = None, tokenizer: str | None = None,
                 adapters: Mapping[str, Any] | None = None, partners: Mapping[str, Any] | None = None,
                 objective: Any = None, sampler: Any = None,
                 trainable: Sequence[str] = (), mixed_precision: str = 'no',
                 dtype: str | Mapping[str, str] | None = None, attention: str = 'sdpa',
                 gradient_checkpointing: bool = False, prediction_type: str | None = None,
                 zero_terminal_snr: bool = False, null_prompt: str | None = None, caption_chunks: int = 1,
                 shared_components: Sequence[str] = (), base_model: SDXL | None = None, seed: int | None = None,
                 lazy_encoders: bool = False) -> None:
        super().__init__(data_preprocessor=BatchPreprocessor())
        one_of('mixed_precision', mixed_precision, PRECISIONS)
        one_of('null_prompt', null_prompt, (None, 'zeros', 'empty'))
        for part in trainable:
            one_of('trainable', part, loading.MODULES)
        self.pretrained, self.other_unet = pretrained, unet
        self.seed = 0 if seed is None else whole_number('seed', seed)
        self.trainable_parts = tuple(trainable)
        self.compute_dtype = PRECISIONS[mixed_precision]
        self.shared_components = tuple(shared_components)
        self.lazy_encoders = lazy_encoders
        parts = loading.load_components(
            pretrained, vae, config, tokenizer, component_dtypes(dtype, self.trainable_parts, self.compute_dtype),
            self.seed, shared(self.shared_components, base_model, self.trainable_parts), unet=unet, revision=revision,
            variant=variant, cache_dir=cache_dir, half=self.compute_dtype,
            lazy={'vae', *ENCODERS} - {*self.trainable_parts} if lazy_encoders else ())
        self.null_prompt: str = null_prompt or parts.get('null_prompt', 'zeros')
        self.caption_chunks = check_chunks(caption_chunks)
        self.deferred = {name: parts[name] for name in loading.MODULES if isinstance(parts.get(name), Deferred)}
        for name in loading.MODULES:
            if name in self.deferred:
                self.deferred[name].place(self, name, lambda: self.device)
            else:
                setattr(self, name, parts.get(name))
        self.tokenizer, self.tokenizer_2 = parts.get('tokenizer'), parts['tokenizer_2']
        self.scheduler_config = parts['scheduler']
        self.schedule = NoiseSchedule.from_config(self.scheduler_config, prediction_type, zero_terminal_snr)
        self.vae_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.attention = attention
        set_backend(self.unet, attention)
        self.objective = OBJECTIVES.build(objective) if objective else None
        self._attach(adapters or {})
        self.partners = check_partners(partners, {**(adapters or {}), **dict(self.adapters.items())})
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            for part in ENCODERS:
                if part in self.trainable_parts:
                    getattr(self, part).gradient_checkpointing_enable()
        if remember := getattr(self.objective, 'remember', None):
            remember(self)
        self.sampler: Any = SAMPLERS.build(sampler) if sampler else None

    def _attach(self, configs: Mapping[str, Any]) -> None:
        """Freeze the base, attach all adapters, and let what trains require gradients."""
        self.adapters, self.shared_encoders = nn.ModuleDict(), nn.ModuleDict()
        self.eval()
        adapters = {}
        for name, config in configs.items():
            if config is not None:
                check_adapter_name(name)
                adapters[name] = ADAPTERS.build(dict(config))
                adapters[name].name = name
        # By name, so that a config's order changes nothing; those that change the base's modules last, so that the
        # others see the original modules.
        for name, adapter in sorted(adapters.items(), key=lambda item: (item[1].modifies_base, item[0])):
            with rng.fork(self.seed, 'adapter', name), error_prefix(f"Adapter '{name}': ", unless=f"'{name}'"):
                adapter.attach(self)
            # What trains stays in fp32 beside a half-precision base, but an fp64 model is fp64 throughout.
            self.adapters[name] = adapter.double() if self.unet_weight.dtype == torch.float64 else adapter
        self.new_tokens()  # refuses a token that two adapters add or a tokenizer has
        self.requires_grad_(False)
        # Stored, as collecting the parameters walks all modules (9 ms).
        self._trained = [parameter for parameters in self.trainables().values() for _, parameter in parameters]
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._note_adapted()
        self.register_state_dict_post_hook(_keep_trained)

    def _note_adapted(self) -> None:
        """Note which components the adapters change, and how."""
        parts = [part for part in ENCODERS if self.is_loaded(part)]
        weights = [p for part in parts for p in getattr(self, part).parameters()]
        of_adapters = {id(p) for adapter in self.adapters.values() for p in adapter.all_parameters()}
        tokens = [adapter for adapter in self.adapters.values() if adapter.new_tokens()]
        self.mixed_parts = {p for p in ('unet', *parts) if is_mixed(getattr(self, p), self.adapters.values())}
        self.text_trains = any(p.requires_grad for p in weights) or any(adapter.trainables() for adapter in tokens)
        self.text_adapted = any(id(p) in of_adapters for p in weights) or bool(tokens)

    def trainables(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Return what trains: component or adapter -> its parameters with their full names, in a fixed order."""
        names = {id(p): n for n, p in self.named_parameters()}
        trainables: dict[str, list[tuple[str, nn.Parameter]]] = {}
        # An adapter's weights may live in a component of the base (LoRA); they count as the adapter's.
        of_adapters = {id(p) for a in self.adapters.values() for p in (*a.all_parameters(), *a.trainables())}
        for part in self.trainable_parts:
            trainables[part] = [(names[id(p)], p) for n, p in getattr(self, part).named_parameters()
                                if not self.never_read(part, n) and id(p) not in of_adapters]
        for name, adapter in self.adapters.items():
            if parameters := [(names[id(p)], p) for p in adapter.trainables()]:
                trainables[name] = parameters
        return trainables

    def is_loaded(self, part: str) -> bool:
        """Return whether there is a component `part`, and its weights are in memory."""
        component = getattr(self, part)
        return component is not None and not isinstance(component, Deferred)

    def never_read(self, part: str, name: str) -> bool:
        """Return whether no loss depends on parameter `name` of `part`, so that it never gets a gradient."""
        if part == 'vae':  # an objective on latents does not read the decoder
            return not name.startswith(getattr(self.objective, 'vae_parts', ('encoder.', 'quant_conv.')))
        if part != 'text_encoder':
            return False
        # The penultimate layer is read, so the first encoder's last layer and norm are not.
        last = self.text_encoder.config.num_hidden_layers - 1
        return f'layers.{last}.' in name or 'final_layer_norm' in name

    @property
    def unet_weight(self) -> Tensor:
        """Return a weight of the UNet, for its dtype and device: diffusers' properties walk all modules (4 ms)."""
        weight: Tensor = next(self.unet.parameters())
        return weight

    @property
    def device(self) -> torch.device:
        """Return the device it computes on; components may wait in the CPU's memory (inference.offload)."""
        return self.execution_device or self.unet_weight.device

    @property
    def is_refiner(self) -> bool:
        """Return whether the UNet has 5 time ids, the last an aesthetic score, and not 6."""
        config = self.unet.config
        width = config.projection_class_embeddings_input_dim - self.text_encoder_2.config.projection_dim
        return bool(width // config.addition_time_embed_dim == 5)

    @property
    def scheduler_settings(self) -> dict[str, Any]:
        """Return the config of a diffusers scheduler with this model's noise schedule."""
        rescale = {'rescale_betas_zero_snr': True} if self.schedule.zero_terminal_snr else {}
        return {**self.scheduler_config, 'prediction_type': self.schedule.prediction_type, **rescale}

    @property
    def size_divisor(self) -> int:
        """Return what sides of images must be divisible by, in pixels."""
        return math.lcm(self.vae_factor, *(a.size_divisor for a in self.adapters.values()))

    def __repr__(self) -> str:
        """Describe the base, and the adapters in a table."""
        return summary(self)

    def to_diffusers(self, task: str | None = None) -> Any:
        """Return a diffusers pipeline with the same weights; see `models.diffusers_pipeline.to_diffusers`.

        Args:
            task: 'text-to-image', 'image-to-image' or 'inpainting'; None for that of the base.

        Raises:
            UserError: no pipeline does this with these adapters.
        """
        for part in self.deferred.values():
            part.load()
        return to_diffusers(self, task)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let no weight require gradients inside, so that the outputs are bitwise those of an export.

        torch.matmul folds a batch of matrices into one where the weight requires gradients, also under `no_grad`
        (`should_fold` in ATen/native/LinearAlgebra.cpp): another kernel, and on some processors other last bits. Only
        the flags change: Parameters, gradients and the hooks of DDP and optimizers stay.
        """
        trained = [parameter for parameter in self._trained if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> SDXL:
        """Set training mode for what trains; frozen components stay in evaluation mode."""
        self.training = mode
        for part in loading.MODULES:
            if self.is_loaded(part):
                getattr(self, part).train(mode and part in self.trainable_parts)
        for adapter in self.adapters.values():
            adapter.train(mode and bool(adapter.trainables()))
        return self

    def encode(self, batch: Batch, branches: Sequence[str] = ('cond',), project: bool = False,
               by_row: bool | None = None) -> Conditioning:
        """Encode prompts and conditions for guidance branches, stacked along the batch in order.

        Each text encoder is called once a branch, each adapter once for all of them.

        Args:
            batch: B samples.
            branches: of 'uncond', 'cond' and 'perturbed', which is conditioned as 'cond'.
            project: also run the adapters' trained part, for a sampling loop; training leaves it to `predict`.
            by_row: frozen encoders read row by row, and not what `batch.lookups` holds; None: as in training, where not
                `project`. Sampling reads a batch as diffusers does.

        Raises:
            UserError: `batch.drop` names an unknown adapter; see `encode_text` and `Adapter.encode`.
        """
        assert project or len(branches) == 1, 'several branches are for sampling'
        by_row = not project if by_row is None else by_row
        strengths = self._draw_partners(batch)
        encoded = {branch: encode_text(self, batch, branch, by_row) for branch in branches if branch != 'perturbed'}
        rows = [encoded['cond' if branch == 'perturbed' else branch] for branch in branches]
        text, pooled, time_ids = (torch.cat([row[i] for row in rows]) for i in range(3))
        if unknown := batch.drop.keys() - {'text', *self.adapters}:
            raise UserError(f"The samples drop the input of {', '.join(map(repr, sorted(unknown)))}, which is not an "
                            f'adapter of the model; it has {", ".join(self.adapters) or "none"}.')
        adapters = {}
        for name, adapter in () if self.adapters_disabled else self.adapters.items():
            tensors = adapter.encode_rows(batch) if by_row else adapter.encode(batch)
            if name in batch.drop:
                null = adapter.null(tensors)
                tensors = {k: where(batch.drop[name], null[k], tensors[k]) for k in tensors}
            if project:
                with self.autocast(True):
                    tensors = adapter.expand(tensors, branches)
            adapters[name] = tensors
        return Conditioning(text, pooled, time_ids, adapters, projected=project, strengths=strengths)

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning, progress: Tensor,
                probes: AttentionProbes | None = None) -> Tensor:
        """Return the UNet's raw output, of its `prediction_type`, with every adapter's contribution.

        Args:
            x: [B, 4, h, w], any dtype.
            t: [] or [B].
            conditioning: B rows.
            progress: [B, 2] on the CPU, see UNetCall.
            probes: what guidances change and record in self-attentions; for sampling.

        Returns:
            [B, 4, h, w] in the UNet's dtype (the autocast dtype where it trains).

        Raises:
            UserError: an adapter's contribution does not fit, or the UNet takes other channels.
        """
        dtype = self.unet_weight.dtype
        call = UNetCall(sample=x.to(dtype), timestep=t, progress=progress, text=conditioning.text.to(dtype),
                        pooled=conditioning.pooled.to(dtype), time_ids=conditioning.time_ids,
                        training=torch.is_grad_enabled(), timestep_cond=conditioning.timestep_cond,
                        strengths=conditioning.strengths)
        for name, tensors in conditioning.adapters.items():
            adapter = self.adapters[name]
            with self.autocast(True):
                adapter.contribute(call, tensors if conditioning.projected else adapter.project(tensors))
        if conditioning.channels is not None:
            call.add_channels(conditioning.channels)
        call.check_inputs(self.unet.config)
        unet = self.unet if self.unet_graphs is None or probes is not None else self.unet_graphs
        with probed(self.unet, probes), self.autocast(under_autocast(self, 'unet')):
            out: Tensor = unet(**call.kwargs(), return_dict=False)[0]
        call.check_consumed()
        return out

    def forward(self, inputs: Batch, data_samples: Any = None, mode: str = 'loss',
                image_sets: Sequence[str] | None = None) -> Any:
        """Return a dict of losses (mode 'loss') or images (mode 'predict', see `models.generate`); for mmengine."""
        one_of('mode', mode, ('loss', 'predict'))
        if mode == 'predict':
            return generate(self, inputs, image_sets)
        assert self.objective is not None, 'the runner checks that a model that trains has an objective'
        return self.objective(self, inputs)

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return mmengine's sum of losses; store the parts, so that a step that fails can name them."""
        total, parts = super().parse_losses(losses)
        # Detached: mmengine's hold the graph, which would stay in memory during the next step.
        self.last_losses = {name: part.detach() for name, part in parts.items()}
        return total, self.last_losses

    def autocast(self, enabled: bool) -> AbstractContextManager[Any]:
        """Autocast to the model's `mixed_precision` inside, if `enabled` and it is not 'no'.

        Around an adapter's own network, and a component that trains or mixes dtypes, see `precision.under_autocast`;
        not around wrappers that bring their own precision, as on CUDA autocast computes every norm in fp32.
        """
        return autocast(self.device.type, self.compute_dtype or torch.bfloat16,
                        enabled and self.compute_dtype is not None)


def _keep_trained(model: SDXL, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Reduce a state dict to what trains, in place: it carries `_metadata`."""
    trained = {prefix + name for parameters in model.trainables().values() for name, _ in parameters}
    for name in [n for n in state if n.startswith(prefix) and n not in trained]:
        del state[name]
