"""LoRA and its relatives: small changes of the base's own linear and convolution layers, by peft.

With W a layer's weight, s = scale * alpha / rank (alpha / sqrt(rank) with rslora):

    LoRA   W + s B A                                          Hu et al. 2021, arXiv:2106.09685
    DoRA   m (W + s B A) / ||W + s B A||, rows apart          Liu et al. 2024, arXiv:2402.09353
    LoHa   W + s (A1 B1) * (A2 B2)                            Hyeon-Woo et al. 2022, FedPara, arXiv:2108.06098
    LoKr   W + s kron(C, A B)                                 Yeh et al. 2023, LyCORIS, arXiv:2309.14859
    OFT    W R, R block diagonal with blocks (I - Q) (I + Q)^-1, Q antisymmetric    Qiu et al. 2023, arXiv:2306.07280
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

from diffengine_sdxl.adapters import lora_layers
from diffengine_sdxl.adapters.base import Adapter, Tensors
from diffengine_sdxl.adapters.formats import peft_lora
from diffengine_sdxl.adapters.formats.files import refuse
from diffengine_sdxl.adapters.formats.layer_names import Modules
from diffengine_sdxl.adapters.formats.lora import read_lora, write_lora
from diffengine_sdxl.adapters.formats.lora_weights import PARTS, LoRAWeights, PartWeights
from diffengine_sdxl.adapters.lora_checks import check_arguments
from diffengine_sdxl.errors import UserError, did_you_mean
from diffengine_sdxl.protocols import AdapterHost
from diffengine_sdxl.registry import ADAPTERS
from diffengine_sdxl.structures import Batch, UNetCall

#: The attentions' projections, which diffusers' scripts train.
DEFAULT_TARGETS = {'unet': [f'unet.*.attn[12].{name}' for name in ('to_q', 'to_k', 'to_v', 'to_out.0')],
                   **{part: [f'{part}.*.self_attn.{name}_proj' for name in ('q', 'k', 'v', 'out')]
                      for part in PARTS if part != 'unet'}}
_TITLES = {'lora': 'LoRA', 'dora': 'DoRA', 'loha': 'LoHa', 'lokr': 'LoKr', 'oft': 'OFT'}


@ADAPTERS.register_module()
class LoRA(Adapter):
    """A LoRA, DoRA, LoHa, LoKr or OFT of the UNet and the text encoders.

    A fresh one changes nothing until it trains. Its weights live in the base, beside the layers that they change.

    Args:
        weights, trainable, active_range: see Adapter. An active range is for the UNet alone: prompts are encoded once.
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

    modifies_base = True
    attach_point = 'inside the base'

    def __init__(self, weights: str | None = None, trainable: bool = True, scale: float = 1.0,
                 active_range: Sequence[float] = (0.0, 1.0), subfolder: str | None = None,
                 weight_name: str | None = None, revision: str | None = None, kind: str | None = None,
                 rank: int | None = None, alpha: float | None = None, rslora: bool | None = None, dropout: float = 0.0,
                 init: bool | str = 'gaussian', parts: Sequence[str] | None = None,
                 targets: Sequence[str] | None = None, blocks: Mapping[str, Any] | None = None) -> None:
        check_arguments(kind or 'lora', init, rank, alpha, dropout if trainable else 0.0, parts, targets, blocks)
        self.requested: dict[str, Any] = {'kind': kind, 'rank': rank, 'alpha': alpha, 'rslora': rslora, 'parts':
                                          None if parts is None else tuple(p for p in PARTS if p in parts)}
        self.method, self.blocks = kind or 'lora', dict(blocks or {})
        self._disabled = False
        #: Whether the active range is open, for all rows (bool) or for each (bool [B]).
        self._gate: bool | Tensor = True
        self._parts: dict[str, nn.Module] = {}
        #: part -> name of the layer -> wrapper.
        self._wrappers: dict[str, dict[str, Any]] = {}
        #: Ranks and alphas of each part, without tensors.
        self._ranks: dict[str, PartWeights] = {}
        super().__init__(None, weights, trainable, scale, active_range)
        self.source = {'subfolder': subfolder, 'weight_name': weight_name, 'revision': revision}
        self.targets = None if targets is None else list(targets)
        self.dropout, self.init = float(dropout) if trainable else 0.0, init

    def _check_scale(self, scale: float) -> None:
        scales = [scale, *(block['scale'] for block in self.blocks.values() if block and 'scale' in block)]
        if self.method == 'oft' and any(s not in (0, 1) for s in scales):
            raise UserError(f'The scale of an OFT, a rotation, must be 0 or 1, not {scales}.')

    def _check_active_range(self, active_range: tuple[float, float]) -> None:
        if active_range != (0, 1) and (encoders := self._ranks.keys() - {'unet'}):
            raise UserError(f"active_range={active_range} of adapter '{self.name}' is for the UNet alone, as prompts "
                            f'are encoded once; it also changes {", ".join(sorted(encoders))}.')

    @property
    def kind(self) -> str:
        """Its kind and ranks, e.g. 'DoRA r16'."""
        ranks = [rank for part in self._ranks.values() for rank in part.rank.values()]
        limits = dict.fromkeys((min(ranks), max(ranks))) if ranks else ()
        return _TITLES[self.method] + (f' r{"-".join(map(str, limits))}' if limits else '')

    def attach(self, model: AdapterHost) -> None:
        """Inject it into the base: from `weights`, or fresh.

        Raises:
            UserError: see the class; the base is then unchanged.
        """
        if hasattr(nn.ParameterDict(), self.name):
            raise UserError(f"'{self.name}' cannot name a LoRA: it is reserved by torch's ParameterDict.")
        self._parts = {part: getattr(model, part) for part in PARTS if getattr(model, part) is not None}
        modules = self._plain_layers()
        self._check_blocks(modules)
        if self.weights is None:
            loaded = self._fresh(model, modules)
        else:
            loaded = read_lora(self.weights, modules, **self.source)
            self._check_loaded(loaded, modules, model)
        self.method, self.rslora, self.options = loaded.kind, loaded.rslora, loaded.options
        self._ranks = {part: PartWeights({}, own.rank, own.alpha) for part, own in loaded.parts.items()}
        self._check_scale(self.scale)
        self._check_active_range(self.active_range)
        self._parts = {part: module for part, module in self._parts.items() if part in loaded.parts}
        try:
            for part in self._parts:
                self._wrappers[part] = self._inject(part, loaded, modules[part])
        except BaseException:
            self.detach(model)
            raise
        # The penultimate layer of the first text encoder is read; later layers never get a gradient.
        self._never_read = {(part, name) for part, name, _ in self._all_wrappers()
                            if model.never_read(part, f'{name}.')}
        self.attach_point = f'{len(list(self._all_wrappers()))} layers of {", ".join(self._wrappers)}'
        self._apply_scale()

    def _plain_layers(self) -> dict[str, dict[str, nn.Module]]:
        """Return part -> name -> layer of the base, without wrappers."""
        return {part: lora_layers.plain(module) for part, module in self._parts.items()}

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

    def _check_blocks(self, modules: Modules) -> None:
        names = [f'{part}.{name}.' for part, layers in modules.items() for name in layers]
        for block in self.blocks:
            if not any(name.startswith(f'{block}.') for name in names):
                starts = {'.'.join(name.split('.')[:n]) for name in names for n in range(2, 7)}
                raise UserError(f"blocks['{block}'] of adapter '{self.name}' is not the beginning of a layer's name."
                                f'{did_you_mean(block, sorted(starts))}')

    def _check_loaded(self, loaded: LoRAWeights, modules: Modules, model: AdapterHost) -> None:
        """Refuse weights that contradict the arguments."""
        def compare(what: str, requested: Any, actual: Any) -> None:
            if requested is not None and requested != actual:
                raise UserError(f"Adapter '{self.name}' has {what}={requested!r}, but '{self.weights}' has {actual!r};"
                                ' leave it out to use that of the file.')

        compare('kind', self.requested['kind'], loaded.kind)
        compare('rslora', self.requested['rslora'], loaded.rslora)
        compare('parts', self.requested['parts'], tuple(p for p in PARTS if p in loaded.parts))
        for part, own in loaded.parts.items():
            for name in peft_lora.layer_names(own):
                block = self._block(part, name)
                if block is None:
                    raise UserError(f"The blocks of adapter '{self.name}' leave out '{part}.{name}', which "
                                    f"'{self.weights}' changes; use a block with scale=0 to disable it.")
                for key, values in (('rank', own.rank), ('alpha', own.alpha)):
                    if loaded.kind != 'oft':
                        compare(f'{key} of {part}.{name}', block.get(key, self.requested[key]), values[name])
            if loaded.kind == 'oft' and (size := self.requested['rank']) is not None:
                config = peft_lora.config(loaded, part, modules[part], block_size=size)
                if not peft_lora.builds(config, own, modules[part]):
                    compare('rank', size, 'blocks of another size')
        if self.targets is None:
            return
        targets = lora_layers.find_layers(self.targets, {part: self._parts[part] for part in loaded.parts}, self.name)
        for part, names in targets.items():
            differing = set(names) ^ set(peft_lora.layer_names(loaded.parts[part]))
            # A file may hold layers that never train or not; a fresh adapter leaves them out.
            if differing := {name for name in differing if not model.never_read(part, f'{name}.')}:
                raise UserError(f"The targets of adapter '{self.name}' and '{self.weights}' differ in {len(differing)} "
                                f"layers of {part}, as '{min(differing)}'. Leave them out to use those of the file.")

    def _inject(self, part: str, loaded: LoRAWeights, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Inject one part's wrappers, with the weights loaded, or fresh ones."""
        own = loaded.parts[part]
        config = peft_lora.config(loaded, part, modules, self.dropout, self.init,
                                  0 if own.tensors else next(iter(own.rank.values())))
        wrappers = lora_layers.inject(self._parts[part], config, self.name)
        names = peft_lora.layer_names(own) if own.tensors else list(own.rank)
        assert set(wrappers) == set(names), set(wrappers) ^ set(names)
        tensors: dict[str, dict[str, Tensor]] = {}
        for key, tensor in own.tensors.items():
            name, suffix = peft_lora.split(key)
            tensors.setdefault(name, {})[suffix] = tensor
        for name, wrapper in wrappers.items():
            weight = modules[name].weight
            assert isinstance(weight, Tensor)
            if own.tensors:
                lora_layers.set_weights(wrapper, self.name, tensors[name])
            else:
                lora_layers.reset_weights(wrapper, self.name, self.init)
            # What trains stays in fp32; peft's OFT has no inverse in half precision.
            dtype = weight.dtype if not self.trainable and loaded.kind != 'oft' else torch.promote_types(
                weight.dtype, torch.float32)
            for parameter in lora_layers.weights(wrapper, self.name).values():
                parameter.data = parameter.data.to(dtype)
        return wrappers

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
            own, gate = self._ranks[part], self._gate if part == 'unet' else True
            scale = self.scale * self._block_scale(part, name)
            lora_layers.set_active(wrapper, self.name, scale != 0 and not self._disabled and gate is not False)
            wrapper.rows = gate if isinstance(gate, Tensor) else None
            if self.method != 'oft':
                # In peft's and so in diffusers' order of operations.
                rank = math.sqrt(own.rank[name]) if self.rslora else own.rank[name]
                wrapper.scaling[self.name] = scale * own.alpha[name] / rank

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
        rows = call.gate(self.active_range)
        if rows is None:
            gate: bool | Tensor = True
        elif not call.training and not bool(rows.any()):
            gate = False
        else:
            gate = rows.bool()
        if isinstance(gate, Tensor) or gate is not self._gate:
            self._gate = gate
            self._apply_scale()

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
        """As `all_parameters`, without layers that get no gradient: never read, or in a block of scale 0."""
        return [p for part, name, wrapper in self._all_wrappers()
                if self.trainable and (part, name) not in self._never_read and self._block_scale(part, name) != 0
                for p in lora_layers.weights(wrapper, self.name).values()]

    def to_weights(self) -> LoRAWeights:
        """Return copies of its weights, to write them in any format."""
        parts = {part: PartWeights({f'{name}.{key}': p.detach().cpu().clone() for name, wrapper in wrappers.items()
                                    for key, p in lora_layers.weights(wrapper, self.name).items()},
                                   *(({}, {}) if self.method == 'oft' else (own.rank, own.alpha)))
                 for part, wrappers in self._wrappers.items() for own in (self._ranks[part],)}
        return LoRAWeights(self.method, parts, self.rslora, self.name, self.options)

    def add_to_pipeline(self, stock: Any) -> None:
        """Register it by name; its layers are in the pipeline's copies already."""
        self._refuse_active_range()
        for part, modules in self._plain_layers().items():
            stock.add_lora(self.name, part, peft_lora.config(self.to_weights(), part, modules))

    def save(self, folder: str | Path) -> None:
        """Write diffusers' file, or a peft folder for each part if diffusers cannot load the kind."""
        if not write_lora(Path(folder), self.to_weights(), self._plain_layers()):
            print_log(f"diffusers cannot load a {_TITLES[self.method]}"
                      f'{" of a text encoder" if self.method == "dora" else ""}: \'{folder}\' holds a peft folder for '
                      f'each part ({", ".join(self._parts)}).', logger='current')

    def load(self, source: str | Path) -> None:
        """Read any format of formats.lora, in place.

        Raises:
            UserError: its kind, layers, ranks or alphas are not those attached, or it was made for another base.
        """
        loaded = read_lora(source, self._plain_layers())
        if loaded.kind != self.method:
            raise UserError(f"'{source}' holds a {_TITLES[loaded.kind]}; adapter '{self.name}' is a {self.kind}.")
        new = {f'{part}.{key}': t for part, own in loaded.parts.items() for key, t in own.tensors.items()}
        current = {f'{part}.{name}.{key}': p for part, name, wrapper in self._all_wrappers()
                   for key, p in lora_layers.weights(wrapper, self.name).items()}
        refuse(source, unknown=sorted(new.keys() - current.keys()), missing=sorted(current.keys() - new.keys()),
               of_another_rank=[k for k in current if k in new and current[k].numel() != new[k].numel()])
        if self.method != 'oft':
            theirs, ours = ({f'{part}.{name}': own.alpha[name] / (math.sqrt(rank) if rslora else rank)
                             for part, own in parts.items() for name, rank in own.rank.items()}
                            for parts, rslora in ((loaded.parts, loaded.rslora), (self._ranks, self.rslora)))
            if differing := [name for name in ours if not math.isclose(ours[name], theirs[name], rel_tol=1e-6)]:
                name = differing[0]
                raise UserError(f"'{source}' scales '{name}' ({len(differing)} in all) by alpha / rank = "
                                f"{theirs[name]:g}; adapter '{self.name}' by {ours[name]:g}. Set the file's alpha.")
        with torch.no_grad():
            for key, parameter in current.items():
                parameter.copy_(new[key].reshape(parameter.shape))
