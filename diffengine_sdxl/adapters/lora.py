"""LoRA and its relatives: small changes of the base's own linear and convolution layers, by peft.

With W a layer's weight, s = scale * alpha / rank (alpha / sqrt(rank) with rslora):

    LoRA   W + s B A                                          Hu et al. 2021, arXiv:2106.09685
    DoRA   m (W + s B A) / ||W + s B A||, rows apart          Liu et al. 2024, arXiv:2402.09353
    LoHa   W + s (A1 B1) * (A2 B2)                            Hyeon-Woo et al. 2022, FedPara, arXiv:2108.06098
    LoKr   W + s kron(C, A B)                                 Yeh et al. 2023, LyCORIS, arXiv:2309.14859
    OFT    W R, R block diagonal with blocks (I - Q) (I + Q)^-1, Q antisymmetric    Qiu et al. 2023, arXiv:2306.07280

Files may hold more than these, in layers of several kinds: see changed_layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from diffengine_sdxl import rng
from diffengine_sdxl.adapters import lora_checks, lora_layers
from diffengine_sdxl.adapters.base import LARGE_SCALE, Adapter, Range, Tensors
from diffengine_sdxl.adapters.changed_layer import ChangedLayer
from diffengine_sdxl.adapters.formats import peft_lora
from diffengine_sdxl.adapters.formats.files import refuse
from diffengine_sdxl.adapters.formats.layer_names import Modules
from diffengine_sdxl.adapters.formats.lora import read_lora, write_lora
from diffengine_sdxl.adapters.formats.lora_weights import MIXED, PARTS, TITLES, LoRAWeights, PartWeights
from diffengine_sdxl.adapters.lora_function import ComputeCopies
from diffengine_sdxl.adapters.lora_inject import inject_weights, stored_dtype
from diffengine_sdxl.adapters.lora_words import Words
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading import deferred
from diffengine_sdxl.protocols import AdapterHost
from diffengine_sdxl.registry import ADAPTERS
from diffengine_sdxl.structures import Batch, UNetCall

#: The attentions' projections, which diffusers' scripts train.
DEFAULT_TARGETS = {'unet': [f'unet.*.attn[12].{name}' for name in ('to_q', 'to_k', 'to_v', 'to_out.0')],
                   **{part: [f'{part}.*.self_attn.{name}_proj' for name in ('q', 'k', 'v', 'out')]
                      for part in PARTS if part != 'unet'}}


@ADAPTERS.register_module()
class LoRA(Adapter):
    """A LoRA, DoRA, LoHa, LoKr or OFT of the UNet and the text encoders.

    A fresh one changes nothing until it trains. Its weights live in the base, beside the layers that they change. One
    that is loaded may be of several kinds, with whole weights, biases and norms, which all train if it does, and may
    bring new words for prompts, which don't.

    Args:
        weights, trainable, active_range, ignore_keys: see Adapter. An active range is for the UNet alone: prompts are
            encoded once.
        scale: its strength, any number; for OFT 0 or 1.
        subfolder, weight_name, revision: of `weights`, see formats.files.find.
        kind: 'lora', 'dora', 'loha', 'lokr' or 'oft'; None: that of `weights`, else 'lora'.
        rank: None: that of `weights`, else 16. For OFT the size of a block; where it doesn't divide a layer's inputs,
            the nearest number that does.
        alpha: None: that of `weights`, else the rank.
        rslora: scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732); None: as `weights`, else False.
        dropout: of a LoRA's or DoRA's inputs, of LoHa's and LoKr's rows; in training only.
        init: 'gaussian' (A of deviation 1 / rank, as diffusers' scripts) or True (peft's own), for LoRA and DoRA.
        parts: of unet, text_encoder, text_encoder_2; None: those of `weights`, else the UNet.
        targets: layers, by full name ('unet.mid_block.attentions.0.proj_in'), pattern ('unet.*.attn2.to_k') or end of
            name ('to_q', 'conv1', 'ff.net.0.proj'); None: those of `weights`, else the attentions' projections.
        blocks: {beginning of full names: dict with rank, alpha, scale, or None to leave it out}; the longest wins.

    Raises:
        UserError: an argument is invalid; in `attach`, targets match no layer or another adapter's, or `weights` don't
            fit the base or the arguments.
    """

    modifies_base = brings_precision = True
    attach_point = 'inside the base'

    def __init__(self, weights: str | None = None, trainable: bool = True, scale: float = 1.0,
                 active_range: Sequence[float] = (0.0, 1.0), subfolder: str | None = None,
                 weight_name: str | None = None, revision: str | None = None, kind: str | None = None,
                 rank: int | None = None, alpha: float | None = None, rslora: bool | None = None, dropout: float = 0.0,
                 init: bool | str = 'gaussian', parts: Sequence[str] | None = None,
                 targets: Sequence[str] | None = None, blocks: Mapping[str, Any] | None = None,
                 ignore_keys: Sequence[str] = ()) -> None:
        dropout = dropout if trainable else 0.0
        lora_checks.check_arguments(kind or 'lora', init, rank, alpha, dropout, parts, targets, blocks)
        self.requested: dict[str, Any] = {'kind': kind, 'rank': rank, 'alpha': alpha, 'rslora': rslora, 'parts':
                                          None if parts is None else tuple(p for p in PARTS if p in parts)}
        self.method, self.blocks = kind or 'lora', dict(blocks or {})
        self._title, self._disabled = TITLES[self.method], False
        #: Whether the active range is open, for all rows (bool) or for each (bool [B]).
        self._gate: bool | Tensor = True
        self._parts: dict[str, nn.Module] = {}
        #: part -> name of the layer -> wrapper.
        self._wrappers: dict[str, dict[str, Any]] = {}
        self._copies = ComputeCopies([], '', False)
        #: Ranks and alphas of each part, without tensors.
        self._ranks: dict[str, PartWeights] = {}
        super().__init__(None, weights, trainable, scale, active_range, ignore_keys)
        self.words = Words({}, '', {})
        self.source = {'subfolder': subfolder, 'weight_name': weight_name, 'revision': revision}
        self.targets = None if targets is None else list(targets)
        self.dropout, self.init = float(dropout), init

    def _check_scale(self, scale: float) -> None:
        scales = [scale, *(block['scale'] for block in self.blocks.values() if block and 'scale' in block)]
        if self.method == 'oft' and any(s not in (0, 1) for s in scales):
            raise UserError(f'The scale of an OFT, a rotation, must be 0 or 1, not {scales}.')

    def check_partner(self, scales: Range, start: Range, end: Range) -> None:
        super().check_partner(scales, start, end)
        lora_checks.check_draws(self.name, self.method, scales, self.words.names)

    def _check_active_range(self, active_range: tuple[float, float]) -> None:
        words = [f"the word '{word}'" for word in self.words.names] if self._ranks else []
        if active_range != (0, 1) and (encoders := {*self._ranks, *words} - {'unet'}):
            raise UserError(f"active_range={active_range} of adapter '{self.name}' is for the UNet alone, as prompts "
                            f'are encoded once; it also changes {", ".join(sorted(encoders))}.')

    @property
    def kind(self) -> str:
        """Its kind and ranks, e.g. 'DoRA r16'."""
        ranks = [rank for part in self._ranks.values() for rank in part.rank.values()]
        limits = dict.fromkeys((min(ranks), max(ranks))) if ranks else ()
        return self._title + (f' r{"-".join(map(str, limits))}' if limits else '')

    def attach(self, model: AdapterHost) -> None:
        """Inject it into the base: from `weights`, or fresh.

        Raises:
            UserError: see the class; the base is then unchanged.
        """
        if hasattr(nn.ParameterDict(), self.name):
            raise UserError(f"'{self.name}' cannot name a LoRA: it is reserved by torch's ParameterDict.")
        bases = {part: getattr(model, part) for part in PARTS if getattr(model, part) is not None}
        self._parts = {part: deferred.skeleton(module) for part, module in bases.items()}
        modules = self._plain_layers(norms=True)
        lora_checks.check_blocks(self.blocks, modules, self.name)
        if self.weights is None:
            loaded = self._fresh(model, modules)
        else:
            loaded = read_lora(self.weights, modules, **self.source, ignore_keys=self.ignore_keys,
                               alpha=self.requested['alpha'], rslora=self.requested['rslora'])
            self._check_loaded(loaded, modules, model)
        self.method, self.rslora, self.options, self._title = loaded.kind, loaded.rslora, loaded.options, loaded.title()
        self.words = Words(loaded.words, loaded.source, bases)
        self._ranks = {part: PartWeights({}, own.rank, own.alpha) for part, own in loaded.parts.items()}
        self._check_scale(self.scale)
        self._check_active_range(self.active_range)
        self._parts = {part: deferred.loaded(base) for part, base in bases.items() if part in loaded.parts}
        modules = self._plain_layers(norms=True)
        try:
            for part in self._parts:
                self._wrappers[part] = inject_weights(self._parts[part], part, loaded, modules[part], self.name,
                                                      self.trainable, self.dropout, self.init)
        except BaseException:
            self.detach(model)
            raise
        # The penultimate layer of the first text encoder is read; later layers never get a gradient.
        self._never_read = {(part, name) for part, name, _ in self._all_wrappers()
                            if model.never_read(part, f'{name}.')}
        self.attach_point = lora_checks.describe(self._wrappers, self._ranks, self.rslora)
        self._copies = ComputeCopies([*self._wrappers.get('unet', {}).values()], self.name, self.trainable)
        self._apply_scale()

    def _plain_layers(self, norms: bool = False) -> dict[str, dict[str, nn.Module]]:
        """Return part -> name -> layer of the base, without wrappers; norms too if asked."""
        return {part: lora_layers.plain(module) | (lora_layers.norms(module) if norms else {})
                for part, module in self._parts.items()}

    def _fresh(self, model: AdapterHost, modules: Modules) -> LoRAWeights:
        """Return ranks and alphas of the layers that the arguments choose, without tensors."""
        parts = self.requested['parts'] or ('unet',)
        if absent := [part for part in parts if part not in modules]:
            raise UserError(f"Adapter '{self.name}' is for {', '.join(absent)}, which this base doesn't have.")
        targets = self.targets if self.targets is not None else [t for part in parts for t in DEFAULT_TARGETS[part]]
        layers = lora_layers.find_layers(targets, {part: self._parts[part] for part in parts}, self.name)
        chosen: dict[str, PartWeights] = {}
        for part, name in ((part, name) for part, names in layers.items() for name in names):
            block = self._block(part, name)
            if block is None or model.never_read(part, f'{name}.'):
                continue
            own, layer = chosen.setdefault(part, PartWeights()), modules[part][name]
            own.rank[name] = block.get('rank', self.requested['rank'] or 16)
            alpha = block.get('alpha', self.requested['alpha'])
            own.alpha[name] = own.rank[name] if alpha is None else alpha
            if self.method == 'oft' and isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
                raise UserError(f"An OFT of '{part}.{name}' is not possible: peft's is wrong for kernels larger than "
                                '1 (it changes the output even without a rotation). Leave it out.')
        if empty := [part for part in parts if part not in chosen]:
            raise UserError(f"The targets {targets} and blocks of adapter '{self.name}' leave no layer of "
                            f'{", ".join(empty)} that would train.')
        return LoRAWeights(self.method, chosen, bool(self.requested['rslora']))

    def _block(self, part: str, name: str) -> Mapping[str, Any] | None:
        """Return the entry of `blocks` for a layer; {} if there is none."""
        matches = [block for block in self.blocks if f'{part}.{name}.'.startswith(f'{block}.')]
        return self.blocks[max(matches, key=len)] if matches else {}

    def _block_scale(self, part: str, name: str) -> float:
        return float((self._block(part, name) or {}).get('scale', 1.0))

    def _check_loaded(self, loaded: LoRAWeights, modules: Modules, model: AdapterHost) -> None:
        """Refuse weights that contradict the arguments."""
        lora_checks.check_loaded(self.requested, loaded, modules, self.name, self._block)
        if self.dropout and loaded.kind == MIXED:
            raise UserError(f"Adapter '{self.name}' has dropout={self.dropout}, which is not possible for "
                            f"{loaded.title()} in one file, as in '{self.weights}'; leave it out.")
        if self.targets is not None:
            targets = lora_layers.find_layers(self.targets, {p: self._parts[p] for p in loaded.parts}, self.name)
            lora_checks.check_targets(targets, loaded, model.never_read,
                                      f"of adapter '{self.name}' and '{self.weights}'")

    def detach(self, model: AdapterHost) -> None:
        """Remove its wrappers from the base, whatever other adapters' are nested around them."""
        for part in self._parts.values():
            lora_layers.remove(part, self.name)
        self._wrappers, self._parts, self._ranks = {}, {}, {}

    def _all_wrappers(self) -> Iterator[tuple[str, str, Any]]:
        """Yield part, name of the layer, wrapper."""
        return ((part, name, w) for part, wrappers in self._wrappers.items() for name, w in wrappers.items())

    def _apply_scale(self) -> None:
        """Set every layer's scaling, and whether the adapter acts there at all."""
        for part, name, wrapper in self._all_wrappers():
            # A strength of 0 closes the gate in the UNet, and multiplies in text encoders: so the graph stays the same.
            gate, strength = (self._gate, self._strength or 1.0) if part == 'unet' else (True, self._strength)
            own, scale = self._ranks[part], self.scale * self._block_scale(part, name)
            lora_layers.set_active(wrapper, self.name, scale != 0 and not self._disabled and gate is not False and (
                strength != 0 or self.trainable))
            wrapper.rows = gate if isinstance(gate, Tensor) else None
            wrapper.copies, scale = None, scale * strength
            if not isinstance(wrapper, ChangedLayer):
                if self.method == 'oft':
                    continue
                # In peft's and so in diffusers' order of operations.
                scale = scale * own.alpha[name] / (math.sqrt(own.rank[name]) if self.rslora else own.rank[name])
            # Compiled code holds a number as it is, and would be compiled again for each that is drawn.
            wrapper.scaling[self.name] = scale if strength == 1 else torch.tensor(scale, dtype=torch.float64)
        self._copies.stale = True

    def encode(self, batch: Batch) -> Tensors:
        """Return nothing: the adapter acts within the base's layers.

        Raises:
            UserError: it would train at scale 0.
        """
        if self.scale == 0 and self.trainable and self.training and torch.is_grad_enabled():
            raise UserError(f"Adapter '{self.name}' has scale=0, so it changes nothing and cannot be learned; set "
                            'another scale, or trainable=False.')
        return {}

    def contribute(self, call: UNetCall, tensors: Tensors) -> None:
        """Switch it on or off in the UNet where the active range begins or ends; in training, row by row.

        Nothing else changes it within a step, so gradient checkpointing recomputes what it computed.
        """
        skips = call.skips(1.0, self.active_range)
        rows = None if skips else call.gate(self.active_range, self.name)
        gate: bool | Tensor = not skips if rows is None else rows.bool()
        if isinstance(gate, Tensor) or gate is not self._gate:
            self._gate = gate
            self._apply_scale()
        if gate is not False:
            self._copies.refresh()

    def to_compute_dtype(self, dtype: torch.dtype) -> None:
        """Store its weights in the dtypes of the layers that they change; an OFT's in fp32."""
        for _, _, wrapper in self._all_wrappers():
            stored = stored_dtype(wrapper.get_base_layer(), precise=hasattr(wrapper, 'oft_R'))
            for parameter in lora_layers.weights(wrapper, self.name).values():
                parameter.data = parameter.data.to(stored)
            lora_layers.set_precision(wrapper, self.name)
        self._copies.changing = False
        self._apply_scale()

    def constants(self) -> Any:
        """Return its scale, and where its active range is open."""
        return self.scale, self._disabled, self._gate

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Restore the base's UNet and text encoders inside."""
        self._disabled = True
        self._apply_scale()
        try:
            yield
        finally:
            self._disabled = False
            self._apply_scale()

    def train(self, mode: bool = True) -> LoRA:
        """Enable its dropout, though the base around it is in evaluation mode."""
        super().train(mode)
        if self.dropout:
            for _, _, wrapper in self._all_wrappers():
                lora_layers.set_training(wrapper, self.name, mode)
        return self

    def all_parameters(self) -> list[nn.Parameter]:
        """Return its weights in the base, in the base's order."""
        return [p for _, _, wrapper in self._all_wrappers() for p in lora_layers.weights(wrapper, self.name).values()]

    def trainables(self) -> list[nn.Parameter]:
        """As `all_parameters`, without layers that get no gradient: never read, or of scale or alpha 0."""
        return [p for part, name, wrapper in self._all_wrappers()
                if self.trainable and (part, name) not in self._never_read and self._block_scale(part, name) != 0
                and self._ranks[part].alpha.get(name) != 0
                for p in lora_layers.weights(wrapper, self.name).values()]

    @torch.no_grad()
    def idle_layers(self) -> list[str]:
        """Return the layers whose output for random inputs it does not change at a large scale, as in sampling.

        Left out: what is switched off (scale or alpha 0, active range) or untrained, an OFT, whose scale is 1, norms.
        """
        if self.method == 'oft' or self._gate is not True:
            return []
        scale, idle = self.scale, list[str]()
        self.scale = scale * LARGE_SCALE ** 2  # a LoHa's or LoKr's change is a product of two
        try:
            for part, name, wrapper in self._all_wrappers():
                layer, weights = wrapper.get_base_layer(), lora_layers.weights(wrapper, self.name)
                if (not isinstance(layer, lora_layers.LAYERS) or self._block_scale(part, name) == 0
                        or self._ranks[part].alpha.get(name) == 0 or not all(p.any() for p in weights.values())):
                    continue
                shape = ((1, layer.in_features) if isinstance(layer, nn.Linear) else
                         (1, layer.in_channels, *(2 * side + 1 for side in layer.kernel_size)))
                x = torch.randn(shape, generator=rng.generator('idle', name)).to(layer.weight)
                if torch.equal(wrapper(x), wrapper.base_layer(x)):
                    idle.append(f'{part}.{name}')
        finally:
            self.scale = scale
        return idle

    def to_weights(self) -> LoRAWeights:
        """Return copies of its weights, to write them in any format."""
        parts = {part: PartWeights({f'{name}.{key}': p.detach().cpu().clone() for name, wrapper in wrappers.items()
                                    for key, p in lora_layers.weights(wrapper, self.name).items()},
                                   *(({}, {}) if self.method == 'oft' else (own.rank, own.alpha)))
                 for part, wrappers in self._wrappers.items() for own in (self._ranks[part],)}
        words = {word: {part: v.cpu().clone() for part, v in vectors.items()}
                 for word, vectors in self.words.tensors().items()}
        return LoRAWeights(self.method, parts, self.rslora, self.name, self.options, words)

    def new_tokens(self) -> Mapping[str, tuple[Tensor | None, Tensor | None]]:
        """Return the words that its weights brought; none at scale 0."""
        return self.words.new_tokens() if self.scale != 0 else {}

    def add_to_pipeline(self, stock: Any) -> None:
        """Register it by name; its layers are in the pipeline's copies already, its words are added.

        Raises:
            UserError: diffusers has not all of its kinds.
        """
        self._refuse_active_range()
        if self.method == MIXED:
            self._unsupported_by_diffusers(f'it cannot scale or remove {self._title}. Sample here')
        for word, vectors in self.new_tokens().items():
            stock.add_token(word, dict(zip(PARTS[1:], vectors, strict=True)))
        for part, modules in self._plain_layers().items():
            stock.add_lora(self.name, part, peft_lora.config(self.to_weights(), part, modules))

    def save(self, folder: str | Path) -> None:
        """Write diffusers' file; what diffusers cannot load, as a peft folder for each part or else a kohya file."""
        weights = self.to_weights()
        form = {'kohya': 'a kohya file', 'peft': f'a peft folder for each part ({", ".join(self._parts)})'}.get(
            write_lora(Path(folder), weights, self._plain_layers(norms=True)))
        if form is None:
            return
        print_log(f"diffusers cannot load a {self._title}{' of a text encoder' if self.method == 'dora' else ''}"
                  f"{' with words' if self.words.names else ''}: '{folder}' holds {form}.", logger='current')

    def load(self, source: str | Path) -> None:
        """Read any format of formats.lora, in place.

        Raises:
            UserError: its kind, layers, ranks or alphas are not those attached, or it was made for another base.
        """
        loaded = read_lora(source, self._plain_layers(norms=True))
        if loaded.kind != self.method:
            raise UserError(f"'{source}' holds a {loaded.title()}; adapter '{self.name}' is a {self.kind}.")
        new = {f'{part}.{key}': t for part, own in loaded.parts.items() for key, t in own.tensors.items()}
        current = {f'{part}.{name}.{key}': p for part, name, wrapper in self._all_wrappers()
                   for key, p in lora_layers.weights(wrapper, self.name).items()}
        refuse(source, unknown=sorted(new.keys() - current.keys()), missing=sorted(current.keys() - new.keys()),
               of_another_rank=[k for k in current if k in new and current[k].numel() != new[k].numel()])
        if self.method != 'oft':
            lora_checks.check_factors(loaded, self._ranks, self.rslora, source, self.name)
        self.words.load(loaded.words, source)
        with torch.no_grad():
            for key, parameter in current.items():
                parameter.copy_(new[key].reshape(parameter.shape))
        self._apply_scale()  # drops compute copies
