"""Forms of a change of a layer's weight: the tensors that a file holds, and the change by the formula, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.testing.layouts.base import Layer, Tensors

RANK, ALPHA = 4, 2.0


@dataclass(frozen=True)
class Form:
    """Shapes of a layer's tensors, and the change that they make before it is scaled by alpha / `rank`."""

    shapes: dict[str, tuple[int, ...]]
    change: Callable[[Tensors], Tensor]
    rank: int = RANK
    scaled: bool = True


@dataclass(frozen=True)
class Piece:
    """A layer's tensors as a file holds them, and its new weight and bias in fp64 (None: as they were)."""

    layer: Layer
    tensors: Tensors
    weight: Tensor | None
    bias: Tensor | None = None

    def renamed(self, names: dict[str, str]) -> Piece:
        """Return it with other names of its tensors."""
        return replace(self, tensors={names.get(key, key): value for key, value in self.tensors.items()})


def changed(pieces: Sequence[Piece]) -> Tensors:
    """Return '<part>.<parameter>' -> its new value."""
    return {f'{piece.layer.part}.{piece.layer.name}.{kind}': value for piece in pieces
            for kind, value in (('weight', piece.weight), ('bias', piece.bias)) if value is not None}


def lora(layer: Layer, tucker: bool = False, rank: int = RANK) -> Form:
    """W + B A; with a core, the convolution is down [r, in, 1, 1], mid [r, r, k, k], up [out, r, 1, 1]."""
    out, wide, *kernel = layer.shape
    ones = [1] * len(kernel)
    shapes: dict[str, tuple[int, ...]] = {'lora_up.weight': (out, rank, *ones)}
    if tucker and math.prod(kernel) > 1:
        shapes |= {'lora_down.weight': (rank, wide, *ones), 'lora_mid.weight': (rank, rank, *kernel)}
        return Form(shapes, lambda t: torch.einsum(
            'or,rskl,si->oikl', t['lora_up.weight'].flatten(1), t['lora_mid.weight'],
            t['lora_down.weight'].flatten(1)), rank)
    shapes |= {'lora_down.weight': (rank, wide, *kernel)}
    return Form(shapes, lambda t: torch.einsum('or,r...->o...', t['lora_up.weight'].flatten(1),
                                               t['lora_down.weight']), rank)


def tucker_lora(layer: Layer) -> Form:
    """LoCon with a Tucker core where there is a kernel."""
    return lora(layer, tucker=True)


def loha(layer: Layer, tucker: bool = False) -> Form:
    """W + (w1_a w1_b) * (w2_a w2_b); with cores t [r, r, k, k], each half is t times w_a [r, out], w_b [r, in]."""
    out, wide, *kernel = layer.shape
    if tucker and math.prod(kernel) > 1:
        shapes: dict[str, tuple[int, ...]] = {
            name: shape for i in (1, 2) for name, shape in (
                (f'hada_w{i}_a', (RANK, out)), (f'hada_w{i}_b', (RANK, wide)),
                (f'hada_t{i}', (RANK, RANK, *kernel)))}

        def half(t: Tensors, i: int) -> Tensor:
            return torch.einsum('rskl,ro,si->oikl', t[f'hada_t{i}'], t[f'hada_w{i}_a'], t[f'hada_w{i}_b'])
        return Form(shapes, lambda t: half(t, 1) * half(t, 2))
    flat = wide * math.prod(kernel)
    return Form({'hada_w1_a': (out, RANK), 'hada_w1_b': (RANK, flat), 'hada_w2_a': (out, RANK),
                 'hada_w2_b': (RANK, flat)},
                lambda t: ((t['hada_w1_a'] @ t['hada_w1_b']) * (t['hada_w2_a'] @ t['hada_w2_b'])).view(layer.shape))


def tucker_loha(layer: Layer) -> Form:
    """LoHa with Tucker cores where there is a kernel."""
    return loha(layer, tucker=True)


def lokr(layer: Layer, sizes: tuple[int, int] = (2, 2), split: tuple[bool, bool] = (False, False),
         tucker: bool = False, rank: int = 2) -> Form:
    """W + kron(w1, w2), w1 [sizes]; each whole or a product; whole ones have no rank, so alpha does not count."""
    out, wide, *kernel = layer.shape
    first, second = sizes, (out // sizes[0], wide // sizes[1])
    shapes: dict[str, tuple[int, ...]] = {'lokr_w1': first}
    if split[0]:
        shapes = {'lokr_w1_a': (first[0], rank), 'lokr_w1_b': (rank, first[1])}
    if tucker and math.prod(kernel) > 1:
        shapes |= {'lokr_w2_a': (rank, second[0]), 'lokr_w2_b': (rank, second[1]), 'lokr_t2': (rank, rank, *kernel)}
    elif split[1] or tucker:
        shapes |= {'lokr_w2_a': (second[0], rank), 'lokr_w2_b': (rank, second[1] * math.prod(kernel))}
    else:
        shapes |= {'lokr_w2': (*second, *kernel)}

    def change(t: Tensors) -> Tensor:
        w1 = t['lokr_w1'] if 'lokr_w1' in t else t['lokr_w1_a'] @ t['lokr_w1_b']
        if 'lokr_t2' in t:
            w2 = torch.einsum('rskl,ro,si->oikl', t['lokr_t2'], t['lokr_w2_a'], t['lokr_w2_b'])
        else:
            w2 = t['lokr_w2'] if 'lokr_w2' in t else t['lokr_w2_a'] @ t['lokr_w2_b']
        # w1[a, b] w2[c, d, k] stands at [a, c], [b, d], k.
        return torch.einsum('ab,cdk->acbdk', w1, w2.reshape(*second, -1)).reshape(layer.shape)
    return Form(shapes, change, rank, scaled=split != (False, False) or tucker)


def piece(layer: Layer, make: Callable[[Layer], Form] = lora, alpha: float | None = ALPHA, *,
          scale: float | None = None, dtype: torch.dtype = torch.float32, dora: str | None = None, bias: bool = False,
          fold: bool = False, size: float = 0.3) -> Piece:
    """Return a layer's tensors and new weight.

    Args:
        make: the form.
        alpha: None for none in the file.
        scale: of the change; None for alpha / rank, or 1 where alpha does not count.
        dtype: of the file's tensors; the change is that of the rounded ones.
        dora: 'out' or 'in': W' = m (W + change) / ||W + change||, the norms of output or of input channels.
        bias: also a change of the bias, `diff_b`, unscaled.
        fold: multiply the first tensor by the scale, and write no alpha.
        size: norm of the change over that of the weight.
    """
    form = make(layer)
    random = rng.generator('layouts', f'{layer.part}.{layer.name}', str(form.shapes))
    tensors = {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in form.shapes.items()}
    if scale is None:
        scale = 1.0 if alpha is None or not form.scaled else alpha / form.rank
    first = next(iter(tensors))
    tensors[first] *= size * layer.weight.norm() / form.change(tensors).norm() / (abs(scale) or 1.0)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    new = layer.weight + scale * form.change({name: tensor.double() for name, tensor in tensors.items()})
    if dora:
        axis = 0 if dora == 'out' else 1
        norms = new.transpose(0, axis).flatten(1).norm(dim=1)
        norms = norms.view([-1 if i == axis else 1 for i in range(new.dim())])
        magnitudes = (norms * (0.8 + 0.4 * torch.rand(norms.shape, generator=random))).to(dtype)
        tensors['dora_scale'] = magnitudes
        new = magnitudes.double() * new / norms
    new_bias = None
    if bias and layer.bias is not None:
        tensors['diff_b'] = (0.1 * torch.randn(layer.bias.shape, generator=random)).to(dtype)
        new_bias = layer.bias + tensors['diff_b'].double()
    if fold:
        tensors[first] = tensors[first] * scale
    elif alpha is not None:
        tensors['alpha'] = torch.tensor(alpha, dtype=torch.float32 if dtype.itemsize == 1 else dtype)
    return Piece(layer, tensors, new, new_bias)


def full(layer: Layer, names: tuple[str, str] = ('diff', 'diff_b')) -> Piece:
    """Return a full difference of weight and bias; of a norm with `names` w_norm and b_norm."""
    random = rng.generator('layouts', f'{layer.part}.{layer.name}', 'full')
    noise = torch.randn(layer.shape, generator=random)
    tensors = {names[0]: noise * (0.3 * layer.weight.norm() / noise.norm()).float()}
    bias = None
    if layer.bias is not None:
        tensors[names[1]] = 0.1 * torch.randn(layer.bias.shape, generator=random)
        bias = layer.bias + tensors[names[1]].double()
    return Piece(layer, tensors, layer.weight + tensors[names[0]].double(), bias)


def rotation(layer: Layer, block: int = 4, neumann: bool = False) -> Piece:
    """Return peft's OFT: x R for the inputs, R block diagonal with (I - Q) (I + Q)^-1, Q antisymmetric.

    With `neumann` R is peft's truncated series, I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4.
    """
    wide = layer.shape[1]
    random = rng.generator('layouts', f'{layer.part}.{layer.name}', 'oft')
    upper = 0.15 * torch.randn(wide // block, block * (block - 1) // 2, generator=random)
    q = torch.zeros(wide // block, block, block, dtype=torch.float64)
    rows, columns = torch.triu_indices(block, block, 1)
    q[:, rows, columns] = upper.double()
    q = q - q.mT
    eye = torch.eye(block, dtype=torch.float64)
    series = eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    blocks = series if neumann else (eye - q) @ torch.linalg.inv(eye + q)
    matrix = torch.block_diag(*blocks)
    return Piece(layer, {'oft_R.weight': upper}, (layer.weight.flatten(1) @ matrix.T).view(layer.shape))
