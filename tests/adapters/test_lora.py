"""LoRA and its relatives in the base: formulas, gradients, blocks, active ranges, dropout, precision, bad arguments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import PROMPTS, assert_same, grads, make_batch, picture_batch, sampler
from torch import Tensor, nn

from diffengine_sdxl import rng
from diffengine_sdxl.adapters import lora_layers
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL

KINDS = ('lora', 'dora', 'loha', 'lokr', 'oft')
ALL = ('unet', 'text_encoder', 'text_encoder_2')
#: Linear layers of three and of two dimensions, convolutions of 1 and 3, with and without bias; none at a part's end.
UNET = ['to_q', 'to_out.0', 'ff.net.0.proj', 'time_emb_proj', 'conv_shortcut']
LAYERS = [*UNET, 'q_proj', 'fc1']
CONVS = ['conv1', 'downsamplers.0.conv', 'conv_in']


def lora(**settings: Any) -> dict[str, Any]:
    """Config of a small one."""
    return dict(type='LoRA', **{'rank': 4, **settings})


def build(base: Path, config: dict[str, Any] | None = None, shake: bool = True, name: str = 'a',
          **settings: Any) -> SDXL:
    """A model with one that looks trained."""
    model = SDXL(pretrained=str(base), adapters={name: config} if config else {}, objective=dict(type='Denoise'),
                 **settings)
    return shaken(model) if shake else model


def shaken(model: SDXL) -> SDXL:
    """Add noise to the adapters, enough for a missing factor to show."""
    with torch.no_grad():
        for adapter in model.adapters.values():
            for i, parameter in enumerate(adapter.all_parameters()):
                noise = torch.randn(parameter.shape, generator=rng.generator('shaken', adapter.name, i))
                parameter.add_(0.2 * noise.to(parameter.dtype))
    return model


@torch.no_grad()
def output(model: SDXL, progress: float = 0.5, **changes: Any) -> Tensor:
    """The denoiser's output for two samples, prompts encoded by the model's own encoders."""
    batch = make_batch(2, **changes)
    x = torch.randn((2, 4, 8, 8), generator=rng.generator('x'))
    encoded = model.encode(batch, by_row=False)  # as text encoders that are adapted are called
    return model.predict(x, torch.tensor([5, 900]), encoded, torch.full((2, 2), progress))


def sample(model: SDXL) -> Tensor:
    """Latents of two images."""
    return sampler(steps=3)(model, picture_batch(PROMPTS[:2], [4, 2]))


def changed_weight(kind: str, layer: nn.Module, own: dict[str, Tensor], scaling: float) -> Tensor:
    """The exact weight of a changed layer, from the papers' formulas (see adapters/lora.py)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    flat = weight.flatten(1)
    if kind in ('lora', 'dora'):
        flat = flat + scaling * own['lora_B.weight'].flatten(1) @ own['lora_A.weight'].flatten(1)
        if kind == 'dora':
            flat = own['lora_magnitude_vector'].flatten()[:, None] * flat / flat.norm(dim=1, keepdim=True)
    elif kind == 'loha':
        flat = flat + scaling * (own['hada_w1_a'] @ own['hada_w1_b']) * (own['hada_w2_a'] @ own['hada_w2_b'])
    elif kind == 'lokr':
        first, second = own['lokr_w1'], own.get('lokr_w2')
        if second is None:
            second = own['lokr_w2_a'] @ own['lokr_w2_b']
        second = second.reshape(second.shape[0], weight.shape[1] // first.shape[1], -1)
        kron = torch.einsum('ab,cdk->acbdk', first, second)
        flat = flat + scaling * kron.reshape(flat.shape)
    else:
        blocks, size = own['oft_R.weight'].shape[0], flat.shape[1] // own['oft_R.weight'].shape[0]
        turned = []
        for i in range(blocks):
            q, eye = torch.zeros(size, size, dtype=weight.dtype), torch.eye(size, dtype=weight.dtype)
            q[tuple(torch.triu_indices(size, size, 1))] = own['oft_R.weight'][i]
            q = q - q.T
            turned.append((eye - q) @ torch.linalg.inv(eye + q))
        rotation = torch.block_diag(*turned)
        assert torch.allclose(rotation @ rotation.T, torch.eye(flat.shape[1], dtype=weight.dtype))
        flat = flat @ rotation.T  # the input's blocks are turned, x R, before the layer
    return flat.reshape(weight.shape)


@pytest.mark.parametrize(('kind', 'rslora'), [*((kind, False) for kind in KINDS), ('lora', True), ('dora', True)])
def test_it_is_the_exact_change_of_the_weights(tiny_base: Path, kind: str, rslora: bool) -> None:
    """Equal to a base whose weights were changed by formula, through both text encoders and the UNet (fp64)."""
    more: dict[str, Any] = {} if kind == 'oft' else dict(
        alpha=8, scale=0.5, blocks={'unet.mid_block': dict(rank=2, scale=2.0), 'unet.up_blocks.0': dict(alpha=2)})
    config = lora(kind=kind, parts=ALL, targets=LAYERS + (CONVS if kind != 'oft' else []), rslora=rslora, **more)
    model, base = build(tiny_base, config, dtype='float64'), build(tiny_base, dtype='float64')
    before = output(base)
    count = 0
    for part in ALL:
        plain = lora_layers.plain(getattr(base, part))
        for name, wrapper in lora_layers.layers(getattr(model, part), 'a').items():
            own = {k: p.detach() for k, p in lora_layers.weights(wrapper, 'a').items()}
            mid, up = f'{part}.{name}'.startswith('unet.mid_block.'), f'{part}.{name}'.startswith('unet.up_blocks.0.')
            rank, alpha, scale = 2 if mid else 4, 2 if up else 8, 0.5 * (2.0 if mid else 1.0)
            scaling = scale * alpha / (rank ** 0.5 if rslora else rank)
            plain[name].weight.data = changed_weight(kind, plain[name], own, scaling).detach()
            count += 1
    assert count > 50
    got, expected = output(model), output(base)
    assert (expected - before).norm() > 0.1 * before.norm()
    assert (got - expected).norm() <= 1e-10 * expected.norm()


def test_a_training_step_has_the_gradients_of_the_formula(tiny_base: Path) -> None:
    """Loss and gradients of A and B, UNet and text encoders, by autograd through W + s B A (fp64, 1e-10)."""
    config = lora(parts=ALL, alpha=8, targets=[t for t in LAYERS if t != 'conv_shortcut'])
    model, base = build(tiny_base, config, dtype='float64'), build(tiny_base, dtype='float64')
    leaves: dict[str, Tensor] = {}
    for part in ALL:
        plain = lora_layers.plain(getattr(base, part))
        for name, wrapper in lora_layers.layers(getattr(model, part), 'a').items():
            a, b = (lora_layers.weights(wrapper, 'a')[k].detach().clone().requires_grad_()
                    for k in ('lora_A.weight', 'lora_B.weight'))
            weight = plain[name].weight
            del plain[name].weight
            plain[name].weight = weight + 8 / 4 * b @ a
            leaves |= {f'{part}.{name}.lora_A.a.weight': a, f'{part}.{name}.lora_B.a.weight': b}
    base.text_trains = True
    loss, gradients = grads(model, make_batch(2))
    expected = base(make_batch(2), mode='loss')['loss']
    expected.backward()
    assert gradients.keys() == leaves.keys() and any(n.startswith('text_encoder.') for n in gradients)
    assert_same({'loss': loss, **gradients}, {'loss': expected.detach(), **{
        n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}}, 1e-10)


@pytest.mark.parametrize('kind', KINDS)
def test_an_active_range_gates_each_row_in_training(tiny_base: Path, kind: str) -> None:
    """A row inside is that of the adapter without a range, a row outside is the base's and has no gradient."""
    always, half = (build(tiny_base, lora(kind=kind, active_range=w)) for w in ((0.0, 1.0), (0.0, 0.5)))
    base, batch, x = build(tiny_base), make_batch(2), torch.randn((2, 4, 8, 8), generator=rng.generator('x'))
    t, progress = torch.tensor([900, 5]), torch.tensor([[0.1, 0.1], [0.9, 0.9]])
    outputs = [m.predict(x, t, m.encode(batch), progress) for m in (always, half, base)]
    assert torch.equal(outputs[1][0], outputs[0][0]) and torch.equal(outputs[1][1], outputs[2][1])
    assert not torch.equal(outputs[0][1], outputs[2][1])
    outputs[1][1].sum().backward(retain_graph=True)
    # A zero for all: the graph is the same every time, which several processes rely on.
    assert all(p.grad is not None and not p.grad.any() for p in half.adapters['a'].trainables())
    outputs[1][0].sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in half.adapters['a'].trainables())


@pytest.mark.parametrize('kind', ['lora', 'dora', 'loha', 'lokr'])
def test_dropout_acts_in_training_only(tiny_base: Path, kind: str) -> None:
    """Though the base stays in evaluation mode; not when frozen; the same seed gives the same output."""
    plain, dropping = (build(tiny_base, lora(kind=kind, dropout=d)) for d in (0.0, 0.5))
    assert torch.equal(output(plain), output(dropping))
    dropping.train()
    assert not any(m.training for m in dropping.unet.modules() if isinstance(m, nn.Linear))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(output(dropping))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], output(plain))
    dropping.eval()
    assert torch.equal(output(plain), output(dropping))
    frozen = build(tiny_base, lora(kind=kind, dropout=0.5, trainable=False))
    frozen.train()
    assert torch.equal(output(frozen), output(plain)) and not frozen.trainables()


def test_targets_and_blocks_choose_layers_and_ranks(tiny_base: Path) -> None:
    """Full names, patterns and ends of names; blocks by the longest beginning; the summary shows it."""
    full = 'unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v'
    model = build(tiny_base, lora(targets=[full, 'unet.*.attn2.to_k', 'conv_shortcut'], alpha=6, blocks={
        'unet.up_blocks.0': dict(rank=2), 'unet.up_blocks.0.attentions.1': dict(rank=3, alpha=1),
        'unet.down_blocks.1.attentions': dict(scale=0.0), 'unet.mid_block': None}))
    found = lora_layers.layers(model.unet, 'a')
    names = [n for n, m in model.unet.named_modules() if not n.endswith('base_layer')]
    assert list(found) == [n for n in names if not n.startswith('mid_block') and 'lora' not in n and (
        n == full[5:] or n.endswith('attn2.to_k') or n.endswith('conv_shortcut'))]
    shapes = {n: (w.r['a'], w.lora_alpha['a'], w.scaling['a'], w.active_adapters) for n, w in found.items()}
    for name, (rank, alpha, scaling, active) in shapes.items():
        expected = (3, 1) if name.startswith('up_blocks.0.attentions.1') else (
            2, 6) if name.startswith('up_blocks.0') else (4, 6)
        off = name.startswith('down_blocks.1.attentions')
        assert (rank, alpha) == expected and scaling == (0 if off else alpha / rank)
        assert active == ([] if off else ['a'])
    assert {r for r, *_ in shapes.values()} == {2, 3, 4}
    row = next(line for line in repr(model).splitlines() if line.startswith('  a '))
    assert 'LoRA r2-4' in row and f'{len(found)} layers of unet' in row
    acting = [w for n, w in found.items() if not n.startswith('down_blocks.1.attentions')]  # the others don't train
    assert f'{sum(p.numel() for w in acting for p in lora_layers.weights(w, "a").values()):,}' in row


def test_the_default_targets_are_the_attentions(tiny_base: Path) -> None:
    """to_q, to_k, to_v, to_out.0 of every attention; q, k, v, out of the encoders, less what is never read."""
    model = build(tiny_base, lora(parts=ALL))
    attentions = sum(n.endswith(('attn1', 'attn2')) for n, _ in model.unet.named_modules())
    assert len(lora_layers.layers(model.unet, 'a')) == 4 * attentions > 0
    assert [len(lora_layers.layers(getattr(model, part), 'a')) for part in ALL[1:]] == [4, 8]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(model.state_dict())


@pytest.mark.parametrize('kind', KINDS)
def test_fresh_weights_are_keyed_and_change_nothing(tiny_base: Path, kind: str) -> None:
    """Bitwise the base; drawn from (seed, name), whatever the other adapters and the base's precision."""
    config = lora(kind=kind, parts=ALL[:2], rank=2)
    model = build(tiny_base, config, shake=False, seed=3)
    assert torch.equal(output(model), output(build(tiny_base)))
    own = {n: p.detach() for n, p in zip(model.state_dict(), model.adapters['a'].trainables(), strict=True)}
    half = build(tiny_base, {**config, 'parts': ALL[1::-1]}, shake=False, seed=3, mixed_precision='bf16')
    both = SDXL(pretrained=str(tiny_base), seed=3, adapters=dict(b=lora(rank=8, kind='loha'), a=config))
    for other in (half, both):
        found = other.adapters['a'].trainables()
        # DoRA's magnitudes are norms of the base's weights, which bf16 rounds.
        assert all(torch.equal(p, q) for (n, p), q in zip(own.items(), found, strict=True)
                   if 'magnitude' not in n or other is both)
        assert {p.dtype for p in found} == {torch.float32}
    if kind != 'oft':  # which turns by nothing at first
        another = build(tiny_base, config, shake=False, seed=4).adapters['a'].trainables()
        assert not all(torch.equal(p, q) for p, q in zip(own.values(), another, strict=True))


@pytest.mark.parametrize('kind', KINDS)
def test_precision(tiny_base: Path, kind: str) -> None:
    """What trains is fp32 beside half precision; what is frozen has the base's dtype (OFT: fp32); fp64 is fp64."""
    for settings, trainable, expected in (
            (dict(mixed_precision='bf16'), True, torch.float32), (dict(mixed_precision='bf16'), False, torch.bfloat16),
            (dict(dtype='float64'), True, torch.float64), (dict(dtype='float64'), False, torch.float64)):
        model = build(tiny_base, lora(kind=kind, trainable=trainable), **settings)
        if kind == 'oft' and expected == torch.bfloat16:
            expected = torch.float32
        assert {p.dtype for p in model.adapters['a'].all_parameters()} == {expected}
        assert output(model).isfinite().all()
        base = build(tiny_base, **settings)
        with model.disable_adapters():
            assert torch.equal(sample(model), sample(base))
        if trainable and expected == torch.float32:
            loss, gradients = grads(model, make_batch(2))
            assert loss.isfinite() and all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())


def test_scale_switches_and_scales_at_once(tiny_base: Path) -> None:
    """Also in the text encoders; disable_adapters gives the base and restores the scale; OFT has 0 and 1 only."""
    model, base = build(tiny_base, lora(parts=ALL[1:])), build(tiny_base)
    expected, outputs = sample(base), {}
    for scale in (1.0, 0.0, 2.0, -1.0, 1.0):
        model.adapters['a'].scale = scale
        outputs.setdefault(scale, sample(model))
        with model.disable_adapters():
            assert torch.equal(sample(model), expected)
        assert torch.equal(sample(model), outputs[scale])
    assert torch.equal(outputs[0.0], expected) and len({float(o.sum()) for o in outputs.values()}) == 4
    turned = build(tiny_base, lora(kind='oft'))
    with pytest.raises(UserError, match=r'must be 0 or 1, not \[0\.5\]'):
        turned.adapters['a'].scale = 0.5
    assert turned.adapters['a'].scale == 1


def test_kinds_nest_and_leave_in_any_order(tiny_base: Path) -> None:
    """Five kinds on the same layers; each acts; the base's names and outputs are bitwise the same at the end.

    In between, the model is bitwise one that never had the removed ones: OFT and DoRA don't commute.
    """
    def of(*kinds: str) -> SDXL:
        return shaken(SDXL(pretrained=str(tiny_base), adapters={
            kind: lora(kind=kind, targets=['to_q', 'ff.net.2', 'conv_shortcut']) for kind in kinds}))
    base, model = build(tiny_base), of(*KINDS)
    outputs = [output(model)]
    for kind in ('loha', 'lora', 'oft', 'lokr', 'dora'):
        with lora_layers.unwrapped(model.unet):
            assert list(model.unet.state_dict()) == list(base.unet.state_dict())
            # Fewer modules, the same numbers: what a fine-tuned UNet is saved as.
            assert_same(dict(model.unet.named_parameters()), dict(base.unet.named_parameters()))
        assert torch.equal(output(model), outputs[-1])
        model.adapters.pop(kind).detach(model)
        outputs.append(output(model))
        if len(model.adapters) == 4:
            assert torch.equal(outputs[-1], output(of('dora', 'lokr', 'lora', 'oft')))
    assert len({float(o.double().sum()) for o in outputs}) == len(outputs)
    assert torch.equal(outputs[-1], output(base)) and str(model.unet) == str(base.unet)
    assert not hasattr(model.unet, 'peft_config')


BAD: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    'kind': (lambda: lora(kind='ia3'), "kind='ia3' is unknown; choose one of 'lora', 'dora'"),
    'part': (lambda: lora(parts=['vae']), "parts='vae' is unknown"),
    'rank': (lambda: lora(rank=0), 'rank=0 of a LoRA must be a whole number above 0'),
    'dropout': (lambda: lora(dropout=1.0), r'dropout=1.0 of a LoRA must be a number in \[0, 1\)'),
    'init that changes the base': (lambda: lora(init='pissa'), "init='pissa' is unknown"),
    'no such layer': (lambda: lora(targets=['to_queue']), "'to_queue' of adapter 'a' matches no .* Did you mean"),
    'no target': (lambda: lora(targets=['conv_in'], blocks={'unet.conv_in': None}), 'leave no layer of unet'),
    'no layer that can be changed': (lambda: lora(targets=['norm1']), "'norm1' of adapter 'a' matches no linear"),
    'only what is never read': (lambda: lora(parts=['text_encoder'], targets=['layers.1.mlp.fc1']),
                                'leave no layer of text_encoder that would train'),
    'block': (lambda: lora(blocks={'unet.mid_blok': dict(rank=2)}), "of a layer's name. Did you mean 'unet.mid"),
    'block setting': (lambda: lora(blocks={'unet.mid_block': dict(lr=1)}), 'None or to a dict with rank, alpha, scale'),
    'rank of a block': (lambda: lora(blocks={'unet.mid_block': dict(rank=None)}), 'rank=None of a LoRA must be a w'),
    'active range of prompts': (lambda: lora(parts=ALL, active_range=(0, 0.5)),
                                'for the UNet alone.*text_encoder, text_encoder_2'),
    'scale of OFT': (lambda: lora(kind='oft', scale=0.5), 'must be 0 or 1'),
    'alpha of OFT': (lambda: lora(kind='oft', alpha=4), 'has no alpha'),
    'OFT of a convolution': (lambda: lora(kind='oft', targets=['conv1']), 'kernels larger than 1'),
}


@pytest.mark.parametrize('fault', BAD)
def test_bad_arguments(tiny_base: Path, fault: str) -> None:
    config, message = BAD[fault]
    with pytest.raises(UserError, match=message):
        build(tiny_base, config())


def test_another_adapters_layers_are_out_of_reach(tiny_base: Path) -> None:
    """A target that matches them is refused and changes nothing; ends of names work."""
    both = dict(a=lora(targets=['to_q']), b=lora(targets=['to_q', 'unet.*.attn1.to_k'], kind='dora'))
    model = SDXL(pretrained=str(tiny_base), adapters=both)
    assert len(lora_layers.layers(model.unet, 'a')) < len(lora_layers.layers(model.unet, 'b'))
    for target in ('unet.*to_q*', 'lora_A.a', 'to_q.base_layer'):
        before = str(model.unet)
        with pytest.raises(UserError, match=r"also matches 'unet\..*to_q\.\S+', a layer"):
            adapter = type(model.adapters['a'])(targets=[target])
            adapter.name = 'c'
            adapter.attach(model)
        assert str(model.unet) == before
