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
from diffengine_sdxl.adapters.formats.kohya_names import Modules
from diffengine_sdxl.adapters.formats.lora import read_lora, write_lora
from diffengine_sdxl.adapters.formats.weights import KINDS, PARTS, LoRAWeights, PartWeights
from diffengine_sdxl.adapters.lora_checks import check_lists, check_numbers
from diffengine_sdxl.registry import ADAPTERS, nearest
from diffengine_sdxl.structures import Batch, UNetCall

#: What diffusers' scripts train: the attentions.
DEFAULT_TARGETS = {'unet': [f'unet.*.attn[12].{name}' for name in ('to_q', 'to_k', 'to_v', 'to_out.0')],
                   **{part: [f'{part}.*.self_attn.{name}_proj' for name in ('q', 'k', 'v', 'out')]
                      for part in PARTS if part != 'unet'}}
_WORDS = {'lora': 'LoRA', 'dora': 'DoRA', 'loha': 'LoHa', 'lokr': 'LoKr', 'oft': 'OFT'}
_INITS = ('gaussian', True)


@ADAPTERS.register_module()
class LoRA(Adapter):
    """A LoRA, DoRA, LoHa, LoKr or OFT of the UNet and the text encoders.

    A fresh one changes nothing until it is trained. Its weights live in the base, beside the layers that they change.

    Args:
        weights, trainable, window: see Adapter. A window is for the UNet alone: prompts are encoded once.
        scale: how strongly it acts, any number; OFT takes 0 and 1 only.
        subfolder, weight_name, revision: of `weights`, see formats.files.find.
        kind: 'lora', 'dora', 'loha', 'lokr' or 'oft'; None: that of `weights`, else 'lora'.
        rank: None: that of `weights`, else 16. For OFT the size of a block; where it doesn't divide a layer's inputs,
            the nearest number that does.
        alpha: None: that of `weights`, else the rank.
        rslora: scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732); None: as `weights`, else no.
        dropout: of a LoRA's or DoRA's inputs, of LoHa's and LoKr's rows; acts in training alone.
        init: 'gaussian' (A of deviation 1 / rank, as diffusers' scripts) or True (peft's own), for LoRA and DoRA.
        parts: of unet, text_encoder, text_encoder_2; None: those of `weights`, else the UNet.
        targets: layers, by full name ('unet.mid_block.attentions.0.proj_in'), pattern ('unet.*.attn2.to_k') or end of
            name ('to_q', 'conv1', 'ff.net.0.proj'); None: those of `weights`, else the attentions' projections.
        blocks: {beginning of full names: dict with rank, alpha, scale, or None to leave it out}; the longest wins.

    Raises:
        ValueError: an argument is none of these; in `attach`, targets mean nothing or another adapter's layers, or
            `weights` don't fit the base or the arguments.
    """

    in_base = True
    place = 'inside the base'

    def __init__(self, weights: str | None = None, trainable: bool = True, scale: float = 1.0,
                 window: Sequence[float] = (0.0, 1.0), subfolder: str | None = None, weight_name: str | None = None,
                 revision: str | None = None, kind: str | None = None, rank: int | None = None,
                 alpha: float | None = None, rslora: bool | None = None, dropout: float = 0.0,
                 init: bool | str = 'gaussian', parts: Sequence[str] | None = None,
                 targets: Sequence[str] | None = None, blocks: Mapping[str, Any] | None = None) -> None:
        check_lists(parts=parts, targets=targets)
        check_numbers(alpha, blocks)
        self.asked: dict[str, Any] = {'kind': kind, 'rank': rank, 'alpha': alpha, 'rslora': rslora,
                      'parts': None if parts is None else tuple(p for p in PARTS if p in parts)}
        self.method, self.blocks = kind or 'lora', dict(blocks or {})
        #: Whether it is disabled; whether the window is open, for all rows (a bool) or for each.
        self._off, self._gate = False, True  # type: bool, bool | Tensor
        self._parts: dict[str, Any] = {}
        self._layers: dict[str, dict[str, Any]] = {}
        super().__init__(None, weights, trainable, scale, window)
        self.source = {'subfolder': subfolder, 'weight_name': weight_name, 'revision': revision}
        self.targets = None if targets is None else list(targets)
        self.dropout, self.init = float(dropout) if trainable else 0.0, init
        self._check(tuple(parts or ()), rank, alpha)

    def _check(self, parts: Sequence[str], rank: int | None, alpha: float | None) -> None:
        for name, value, known in (('kind', self.method, KINDS), ('init', self.init, _INITS),
                                   *(('parts', part, PARTS) for part in parts)):
            if value not in known:
                raise ValueError(f'{name}={value!r} is not known to LoRA; choose of {", ".join(map(repr, known))}.')
        settings = [v for v in self.blocks.values() if v is not None]
        for value in settings:
            if not isinstance(value, Mapping) or value.keys() - {'rank', 'alpha', 'scale'}:
                raise ValueError(f'blocks={self.blocks} must give each a dict with some of rank, alpha and scale, or '
                                 'None.')
        ranks = [r for r in (rank, *(v.get('rank') for v in settings)) if r is not None]
        if any(not isinstance(r, int) or r < 1 for r in ranks) or not 0 <= self.dropout < 1:
            raise ValueError(f'A rank must be a whole number above 0 and dropout lie in [0, 1): {ranks}, '
                             f'dropout={self.dropout}.')
        if self.method == 'oft' and (alpha is not None or self.dropout or any({'rank', 'alpha'} & v.keys()
                                                                             for v in settings)):
            raise ValueError("kind='oft' has no alpha, no dropout (peft builds it and doesn't use it) and one rank for "
                             'all blocks; leave them out.')

    @property
    def scale(self) -> float:
        """How strongly it acts; a change takes effect at once."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._check_scale(float(scale))
        self._scale = float(scale)
        self._update()

    def _check_scale(self, scale: float) -> None:
        scales = [scale, *(v['scale'] for v in self.blocks.values() if isinstance(v, Mapping) and 'scale' in v)]
        if self.method == 'oft' and any(s not in (0, 1) for s in scales):
            raise ValueError(f'An OFT turns weights and has no strength: its scale is 0 or 1, not {scales}.')

    @property
    def kind(self) -> str:
        """What it is and its ranks, e.g. 'DoRA r16'."""
        if not self._parts:
            return _WORDS[self.method]
        ranks = sorted({rank for held in self._held.values() for rank in held.rank.values()})
        return _WORDS[self.method] + (f' r{"-".join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}' if ranks else '')

    def attach(self, model: Any) -> None:
        """Put it into the base: from `weights`, or fresh.

        Raises:
            ValueError: see the class; the base is then as it was.
        """
        if hasattr(nn.ParameterDict(), self.name):
            raise ValueError(f"'{self.name}' cannot name a LoRA: torch's ParameterDict has it for its own.")
        self._parts = {part: getattr(model, part) for part in PARTS if getattr(model, part) is not None}
        modules = self._plain()
        self._check_blocks(modules)
        if self.weights is None:
            given: LoRAWeights = self._fresh(model, modules)
        else:
            given = read_lora(self.weights, modules, **self.source)
            self._check_given(given, modules, model)
        self.method, self.rslora, self.options = given.kind, given.rslora, getattr(given, 'options', {})
        self._check_scale(self.scale)
        self._check_window(self.window, given.parts)
        self._parts = {part: module for part, module in self._parts.items() if part in given.parts}
        try:
            for part in self._parts:
                self._layers[part] = self._inject(part, given, modules[part])
        except BaseException:
            self.detach(model)
            raise
        self._held = given.parts if self.weights is None else {
            part: PartWeights({}, held.rank, held.alpha) for part, held in given.parts.items()}
        # The penultimate layer of the first text encoder is read: what comes after it never gets a gradient.
        self._unread = {(part, name) for part, found in self._layers.items() for name in found
                        if model._unread(part, f'{name}.')}
        self.place = f'{sum(map(len, self._layers.values()))} layers of {", ".join(self._layers)}'
        self._update()

    def _plain(self) -> dict[str, dict[str, nn.Module]]:
        """part -> name -> plain layer of the base, whatever is around it."""
        return {part: lora_layers.plain(module) for part, module in self._parts.items()}

    def _fresh(self, model: Any, modules: Modules) -> LoRAWeights:
        """Ranks and alphas of the layers that the arguments mean, without tensors."""
        parts = self.asked['parts'] or ('unet',)
        if absent := [part for part in parts if part not in modules]:
            raise ValueError(f"Adapter '{self.name}' is for {', '.join(absent)}, which this base doesn't have.")
        targets = self.targets if self.targets is not None else [t for part in parts for t in DEFAULT_TARGETS[part]]
        found = lora_layers.find(targets, {part: self._parts[part] for part in parts}, self.name)
        chosen: dict[str, PartWeights] = {}
        for part, name in ((part, name) for part, names in found.items() for name in names):
            block = self._block(part, name)
            if block is None or model._unread(part, f'{name}.'):
                continue
            held, layer = chosen.setdefault(part, PartWeights()), modules[part][name]
            held.rank[name] = block.get('rank', self.asked['rank'] or 16)
            alpha = block.get('alpha', self.asked['alpha'])
            held.alpha[name] = held.rank[name] if alpha is None else alpha
            if self.method == 'oft' and isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
                raise ValueError(f"An OFT of '{part}.{name}' is not possible: peft's is wrong for kernels larger than "
                                 '1 (it changes the output even when it turns nothing). Leave it out.')
        if lacking := [part for part in parts if part not in chosen]:
            raise ValueError(f"The targets {targets} and blocks of adapter '{self.name}' leave no layer of "
                             f'{", ".join(lacking)} that would train.')
        return LoRAWeights(self.method, chosen, bool(self.asked['rslora']))

    def _block(self, part: str, name: str) -> Mapping[str, Any] | None:
        """What `blocks` says of a layer; {} where it says nothing."""
        fits = [block for block in self.blocks if f'{part}.{name}.'.startswith(f'{block}.')]
        return self.blocks[max(fits, key=len)] if fits else {}

    def _check_blocks(self, modules: Modules) -> None:
        names = [f'{part}.{name}.' for part, layers in modules.items() for name in layers]
        for block in self.blocks:
            if not any(name.startswith(f'{block}.') for name in names):
                starts = {'.'.join(name.split('.')[:n]) for name in names for n in range(2, 7)}
                raise ValueError(f"blocks['{block}'] of adapter '{self.name}' is the beginning of no layer's name."
                                 f'{nearest(block, sorted(starts))}')

    def _check_given(self, given: LoRAWeights, modules: Modules, model: Any) -> None:
        """Refuse weights that are not what the arguments ask for."""
        def compare(what: str, asked: Any, there: Any) -> None:
            if asked is not None and asked != there:
                raise ValueError(f"Adapter '{self.name}' asks for {what}={asked!r}, but '{self.weights}' has {there!r};"
                                 ' leave it out to take it from there.')

        compare('kind', self.asked['kind'], given.kind)
        compare('rslora', self.asked['rslora'], given.rslora)
        compare('parts', self.asked['parts'], tuple(p for p in PARTS if p in given.parts))
        for part, held in given.parts.items():
            for name in peft_lora.layer_names(held):
                block = self._block(part, name)
                if block is None:
                    raise ValueError(f"The blocks of adapter '{self.name}' leave out '{part}.{name}', which "
                                     f"'{self.weights}' changes; a block of scale=0 switches it off.")
                for what, values in (('rank', held.rank), ('alpha', held.alpha)):
                    if given.kind != 'oft':
                        compare(f'{what} of {part}.{name}', block.get(what, self.asked[what]), values[name])
            if given.kind == 'oft' and (size := self.asked['rank']) is not None:
                config = peft_lora.config(given, part, modules[part], block_size=size)
                if not peft_lora.builds(config, held, modules[part]):
                    compare('rank', size, 'blocks of another size')
        if self.targets is not None:
            asked = lora_layers.find(self.targets, {part: self._parts[part] for part in given.parts}, self.name)
            names = {part: set(peft_lora.layer_names(held)) for part, held in given.parts.items()}
            for part, found in asked.items():
                # What a fresh one leaves out, as it would never train, a file may have or not.
                if odd := {name for name in set(found) ^ names[part] if not model._unread(part, f'{name}.')}:
                    raise ValueError(f"The targets of adapter '{self.name}' and '{self.weights}' differ in {len(odd)} "
                                     f"layers of {part}, as '{min(odd)}'. Leave them out to take them from there.")

    def _inject(self, part: str, given: LoRAWeights, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Put one part's wrappers in; with the weights given, or fresh ones."""
        held, base = given.parts[part], self._parts[part]
        config = peft_lora.config(given, part, modules, self.dropout, self.init,
                                  0 if held.tensors else next(iter(held.rank.values())))
        found = lora_layers.inject(base, config, self.name)
        names = peft_lora.layer_names(held) if held.tensors else list(held.rank)
        assert set(found) == set(names), set(found) ^ set(names)
        tensors: dict[str, dict[str, Tensor]] = {}
        for key, tensor in held.tensors.items():
            name, suffix = peft_lora.split(key)
            tensors.setdefault(name, {})[suffix] = tensor
        for name, wrapper in found.items():
            weight = modules[name].weight
            assert isinstance(weight, Tensor)
            if held.tensors:
                lora_layers.put(wrapper, self.name, tensors[name])
            else:
                lora_layers.renew(wrapper, self.name, self.init)
            # What trains stays in fp32; peft's OFT has no inverse in half precision.
            dtype = weight.dtype if not self.trainable and given.kind != 'oft' else torch.promote_types(
                weight.dtype, torch.float32)
            for parameter in lora_layers.weights(wrapper, self.name).values():
                parameter.data = parameter.data.to(dtype)
        return found

    def detach(self, model: Any) -> None:
        """Take its wrappers out of the base, in whatever order others lie around them."""
        for part in self._parts.values():
            lora_layers.remove(part, self.name)
        self._layers, self._parts = {}, {}

    def _wrappers(self) -> Iterator[tuple[str, str, Any]]:
        """part, name of the layer, wrapper."""
        return ((part, name, w) for part, found in self._layers.items() for name, w in found.items())

    def _update(self) -> None:
        """Set the scaling of every layer, and whether it acts there at all."""
        for part, name, wrapper in self._wrappers():
            held, gate = self._held[part], self._gate if part == 'unet' else True
            scale = self.scale * (self._block(part, name) or {}).get('scale', 1.0)
            lora_layers.switch(wrapper, self.name, scale != 0 and not self._off and gate is not False)
            wrapper.rows = gate if isinstance(gate, Tensor) else None
            if self.method != 'oft':
                # In peft's and so in diffusers' order of operations.
                rank = math.sqrt(held.rank[name]) if self.rslora else held.rank[name]
                wrapper.scaling[self.name] = scale * held.alpha[name] / rank

    def _check_window(self, window: tuple[float, float], parts: Any = None) -> None:
        others = {*(parts or vars(self).get('_layers', ()))} - {'unet'}
        if window != (0, 1) and others:
            raise ValueError(f"The window {window} of adapter '{self.name}' is for the UNet alone, as prompts are read "
                             f'once; it also changes {", ".join(sorted(others))}.')

    def encode(self, batch: Batch) -> Tensors:
        """Nothing: its layers do it.

        Raises:
            ValueError: it shall be learned and changes nothing.
        """
        if self.scale == 0 and self.trainable and self.training and torch.is_grad_enabled():
            raise ValueError(f"Adapter '{self.name}' has scale=0, so it changes nothing and cannot be learned; set "
                             'another scale, or trainable=False.')
        return {}

    def contribute(self, call: UNetCall, tensors: Tensors) -> None:
        """Switch it on or off in the UNet where the window begins or ends; in training, row by row.

        Nothing else changes it in between, so gradient checkpointing, which computes again, finds what it had.
        """
        rows = call.gate(self.window)
        if rows is None:
            gate: bool | Tensor = True
        elif not call.training and not bool(rows.any()):
            gate = False
        else:
            gate = rows.bool()
        if isinstance(gate, Tensor) or gate is not self._gate:
            self._gate = gate
            self._update()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the UNet and the text encoders are the base's."""
        self._off = True
        self._update()
        try:
            yield
        finally:
            self._off = False
            self._update()

    def train(self, mode: bool = True) -> LoRA:
        """Let its dropout act, though the base around it is in evaluation mode."""
        super().train(mode)
        if self.dropout:
            for _, _, wrapper in self._wrappers():
                lora_layers.train(wrapper, self.name, mode)
        return self

    def owned(self) -> list[nn.Parameter]:
        """Its weights in the base, in the base's order."""
        return [p for _, _, wrapper in self._wrappers() for p in lora_layers.weights(wrapper, self.name).values()]

    def trainables(self) -> list[nn.Parameter]:
        """As `owned`, without layers that get no gradient: some that a file may hold, and blocks of scale 0."""
        return [p for part, name, wrapper in self._wrappers()
                if self.trainable and (part, name) not in self._unread
                and (self._block(part, name) or {}).get('scale', 1.0) != 0
                for p in lora_layers.weights(wrapper, self.name).values()]

    def to_weights(self) -> LoRAWeights:
        """Copies of its weights, to write them in any format."""
        parts = {part: PartWeights({f'{name}.{key}': p.detach().cpu().clone() for name, wrapper in found.items()
                                    for key, p in lora_layers.weights(wrapper, self.name).items()},
                                   *(({}, {}) if self.method == 'oft' else (held.rank, held.alpha)))
                 for part, found in self._layers.items() for held in (self._held[part],)}
        return peft_lora.PeftWeights(self.method, parts, self.rslora, self.name, self.options)

    def to_stock(self, stock: Any) -> None:
        """Already in the copied layers; see `Adapter.to_stock`."""
        self._without_window()
        for part, modules in self._plain().items():
            stock.add_lora(self.name, part, peft_lora.config(self.to_weights(), part, modules))

    def save(self, folder: str | Path) -> None:
        """Write diffusers' file, or a peft folder for each part where stock diffusers cannot load the kind."""
        if not write_lora(Path(folder), self.to_weights(), self._plain()):
            print_log(f"Stock diffusers cannot load a {_WORDS[self.method]}"
                      f'{" of a text encoder" if self.method == "dora" else ""}: \'{folder}\' holds a peft folder for '
                      f'each part ({", ".join(self._parts)}).', logger='current')

    def load(self, source: str | Path) -> None:
        """Read any format of formats.lora, in place.

        Raises:
            ValueError: its kind, layers, ranks or alphas are not those attached, or it was made for another base.
        """
        given = read_lora(source, self._plain())
        if given.kind != self.method:
            raise ValueError(f"'{source}' holds a {_WORDS[given.kind]}; adapter '{self.name}' is a {self.kind}.")
        new = {f'{part}.{key}': t for part, held in given.parts.items() for key, t in held.tensors.items()}
        own = {f'{part}.{name}.{key}': p for part, name, wrapper in self._wrappers()
               for key, p in lora_layers.weights(wrapper, self.name).items()}
        refuse(source, unknown=sorted(new.keys() - own.keys()), missing=sorted(own.keys() - new.keys()),
               of_another_rank=[k for k in own if k in new and own[k].numel() != new[k].numel()])
        if self.method != 'oft':
            there, here = ({f'{part}.{name}': held.alpha[name] / (math.sqrt(rank) if rslora else rank)
                            for part, held in parts.items() for name, rank in held.rank.items()}
                           for parts, rslora in ((given.parts, given.rslora), (self._held, self.rslora)))
            if odd := [name for name in here if not math.isclose(here[name], there[name], rel_tol=1e-6)]:
                raise ValueError(f"'{source}' scales '{odd[0]}' ({len(odd)} such) by alpha / rank = {there[odd[0]]:g}; "
                                 f"adapter '{self.name}' by {here[odd[0]]:g}. Give it the alpha of the file.")
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(new[key].reshape(parameter.shape))
