"""ControlNets by the path of their weights, in one file of either layout, Control-LoRAs, and damaged configs."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.adapters.controlnet import ControlNet
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing import write_tiny_sdxl
from diffengine_sdxl.testing.adapters import (
    original_controlnet,
    write_original_controlnet,
    write_tiny_adapter,
    write_tiny_union,
)

FILE = 'diffusion_pytorch_model.safetensors'


@pytest.fixture(scope='module')
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet and a union, in diffusers' folders."""
    folder = tmp_path_factory.mktemp('files')
    write_tiny_adapter(folder / 'plain', tiny_base, dict(type='ControlNet'))
    write_tiny_union(folder / 'union', tiny_base)
    write_tiny_union(folder / 'promax', tiny_base, num_control_type=8)
    return folder


def read(model: SDXL, weights: Path, **settings: Any) -> Any:
    """The network that an adapter reads."""
    adapter = ControlNet(weights=str(weights), trainable=False, **settings)
    adapter.name = 'a'
    adapter.attach(model)
    return adapter.net


def assert_equal(net: Any, expected: Any) -> None:
    """The same weights and settings."""
    state, other = net.state_dict(), expected.state_dict()
    assert state.keys() == other.keys() and type(net) is type(expected)
    assert all(torch.equal(value, other[key]) for key, value in state.items())
    settings = [{k: tuple(v) if isinstance(v, list) else v for k, v in one.config.items() if not k.startswith('_')}
                for one in (net, expected)]
    assert settings[0] == settings[1]
    assert not net.training and not any(t.is_meta for t in net.buffers())


def lone(source: Path, path: Path, **more: Tensor) -> Path:
    """The weights of a folder as a file of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**load_file(source / FILE), **more}, path)
    return path


def test_every_way_to_the_same_weights(model: SDXL, folder: Path, tmp_path: Path) -> None:
    """By folder, path, folder of one file without config, lone file, in the original layout below several prefixes."""
    plain, expected = folder / 'plain', ControlNetModel.from_pretrained(folder / 'plain')
    nested = tmp_path / 'nested.pth'
    torch.save({'state_dict': torch.load(write_original_controlnet(tmp_path / 'b.pth', plain, ''),
                                         weights_only=True)['state_dict']}, nested)
    for weights in (plain, plain / FILE, lone(plain, tmp_path / 'only/any name.safetensors'), tmp_path / 'only', nested,
                    write_original_controlnet(tmp_path / 'a.safetensors', plain),
                    write_original_controlnet(tmp_path / 'c.safetensors', plain, '')):
        assert_equal(read(model, weights), expected)
    expected.save_pretrained(tmp_path / 'shards', max_shard_size='1MB')
    shards = sorted(p.name for p in (tmp_path / 'shards').iterdir())
    assert len(shards) > 3
    for name in (shards[0], shards[1], shards[-1]):
        assert_equal(read(model, tmp_path / 'shards' / name), expected)
    expected.half().save_pretrained(tmp_path / 'half', variant='fp16')
    for weights, variant in ((tmp_path / 'half', 'fp16'), (tmp_path / 'half' / FILE.replace('.s', '.fp16.s'), None)):
        half = read(model, weights, variant=variant)
        assert half.dtype == torch.float32
        assert all(torch.equal(value, expected.state_dict()[key].float()) for key, value in half.state_dict().items())


def test_the_config_beside_says_what_tensors_do_not(model: SDXL, folder: Path, tmp_path: Path) -> None:
    """Not where it is another model's; and tensors come before a config of another size, as in xinsir's repository."""
    net = ControlNetModel.from_pretrained(folder / 'plain')
    net.register_to_config(global_pool_conditions=True, norm_eps=1e-3)
    net.save_pretrained(tmp_path / 'pooled')
    assert_equal(read(model, tmp_path / 'pooled' / FILE), net)
    (tmp_path / 'pooled/config.json').write_text('{"_class_name": "T2IAdapter"}')
    assert_equal(read(model, tmp_path / 'pooled' / FILE), ControlNetModel.from_pretrained(folder / 'plain'))
    both = lone(folder / 'promax', tmp_path / 'union/diffusion_pytorch_model_promax.safetensors').parent
    for name in ('config.json', FILE):
        (both / name).write_bytes((folder / 'union' / name).read_bytes())
    for weights, kind in ((both / 'diffusion_pytorch_model_promax.safetensors', 'promax'), (both, 'union')):
        assert_equal(read(model, weights, control_type=1), ControlNetUnionModel.from_pretrained(folder / kind))
    # Early unions have another name of the class.
    rewrite(both, _class_name='ControlNetModel_Union')
    assert isinstance(read(model, both, control_type=1), ControlNetUnionModel)
    assert_equal(read(model, lone(folder / 'union', tmp_path / 'lone.safetensors'), control_type=1),
                 ControlNetUnionModel.from_pretrained(folder / 'union'))


def test_small_ones_and_other_bases(tmp_path: Path) -> None:
    """Fewer transformers or none, linear or convolutional projections, one channel, another VAE: tensors show all."""
    from diffusers import UNet2DConditionModel
    base = write_tiny_sdxl(tmp_path / 'base', vae_blocks=3)
    model = SDXL(pretrained=str(base))
    source = ControlNetModel.from_unet(
        UNet2DConditionModel.from_pretrained(base, subfolder='unet'), load_weights_from_unet=False,
        conditioning_channels=1, conditioning_embedding_out_channels=(8, 16, 32))
    changes: tuple[dict[str, Any], ...] = (
        {}, dict(transformer_layers_per_block=(1, 1, 1), use_linear_projection=False),
        dict(down_block_types=('DownBlock2D',) * 3, mid_block_type='UNetMidBlock2D'))
    for number, change in enumerate(changes):
        net = ControlNetModel(**{k: v for k, v in source.config.items() if not k.startswith('_')} | change)
        path = tmp_path / f'{number}.safetensors'
        save_file(net.state_dict(), path)
        assert_equal(read(model, path), net.eval())
        if number < 2:
            save_file({k: v.contiguous() for k, v in original_controlnet(net).items()}, path)
            assert_equal(read(model, path), net)


def control_lora(model: SDXL, net: Any, rank: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A Control-LoRA's tensors, and the ControlNet's weights that it stands for, merged by hand."""
    tensors, merged = {'lora_controlnet': torch.zeros(())}, dict(net.state_dict())
    names = {value.data_ptr(): key for key, value in net.state_dict().items()}
    unet = model.unet.state_dict()
    for key, value in original_controlnet(net).items():
        name = names[value.data_ptr()]
        if name in unet and value.dim() > 1 and '.downsamplers.' not in name:  # as in ComfyUI, some may be whole
            made = rng.generator('control-lora', name)
            up, down = (torch.randn(shape, generator=made) * 0.1 for shape in (
                (len(value), rank, *[1] * (value.dim() - 2)), (rank, *value.shape[1:])))
            module = key.removesuffix('.weight')
            tensors |= {f'{module}.up': up.half(), f'{module}.down': down.half()}
            merged[name] = unet[name] + torch.einsum('or,ri->oi', up.half().float().flatten(1),
                                                     down.half().float().flatten(1)).view(value.shape)
        elif name not in unet or value.dim() == 1 and 'norm' not in name or '.downsamplers.' in name:
            tensors[key] = value.contiguous()
        else:
            merged[name] = unet[name]  # what the file leaves out is the base's
    return tensors, merged


def test_a_control_lora_is_merged(model: SDXL, folder: Path, tmp_path: Path) -> None:
    """Into a copy of the base's encoder, as merging by hand; the base stays as it was."""
    before = {key: value.clone() for key, value in model.unet.state_dict().items()}
    tensors, expected = control_lora(model, ControlNetModel.from_pretrained(folder / 'plain'))
    save_file(tensors, tmp_path / 'x.safetensors')
    net = read(model, tmp_path / 'x.safetensors')
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)
        assert not torch.equal(value, torch.zeros_like(value)) or not expected[key].any()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in model.unet.state_dict().items())
    for change, message in (
            ({'input_blocks.0.0.up': torch.zeros(8, 2, 1, 1)}, r'changes conv_in by \(8, 2, 1, 1\) @ .*base'),
            ({'input_blocks.0.0.up': None}, r'1 missing \(conv_in.up\)'),
            ({'zero_convs.0.0.bias': None}, r'1 missing \(controlnet_down_blocks.0.bias\)'),
            ({'out.2.up': torch.zeros(2, 2), 'out.2.down': torch.zeros(2, 2)}, r'1 unknown \(out.2\)')):
        save_file({k: v for k, v in {**tensors, **change}.items() if v is not None}, tmp_path / 'y.safetensors')
        with pytest.raises(UserError, match=message):
            read(model, tmp_path / 'y.safetensors')


def test_files_that_do_not_fit(model: SDXL, folder: Path, tmp_path: Path) -> None:
    """Every key is matched; what is wrong is named. `load` reads files in place, all or nothing."""
    plain, path = folder / 'plain', tmp_path / 'x.safetensors'
    original = load_file(write_original_controlnet(tmp_path / 'original.safetensors', plain))
    whole = load_file(plain / FILE)
    adapter = ControlNet(weights=str(plain))
    adapter.attach(model)
    before = {key: value.clone() for key, value in adapter.net.state_dict().items()}
    for tensors, message in (
            ({**whole, 'difference': torch.zeros(1)}, r'1 unknown \(difference\)'),
            ({k: v for k, v in whole.items() if k != 'conv_in.bias'}, r'1 missing \(conv_in.bias\)'),
            ({k: v for k, v in whole.items() if k != 'conv_in.weight'}, r'1 missing \(conv_in.weight\)'),
            ({**whole, 'conv_in.weight': torch.zeros(16)}, r'1 of another shape \(conv_in.weight\)'),
            ({**whole, 'conv_in.bias': torch.zeros(3)}, r'1 of another shape \(conv_in.bias\)'),
            ({**original, 'control_model.x': torch.zeros(1)}, r'1 unknown \(x\)'),
            ({**original, 'model.x': torch.zeros(1)}, r'1 unknown \(model.x\)'),
            ({k: v for k, v in original.items() if 'zero_convs.1' not in k}, r'2 missing \(controlnet_down_blocks.1'),
            ({k: v for k, v in whole.items() if 'cond_embedding' not in k}, 'holds no ControlNet')):
        save_file(tensors, path)
        for load in (lambda: read(model, path), lambda: adapter.load(path)):
            with pytest.raises(UserError, match=message):
                load()
    assert all(torch.equal(value, before[key]) for key, value in adapter.net.state_dict().items())
    adapter.net.conv_in.weight.data.zero_()
    adapter.load(tmp_path / 'original.safetensors')
    assert all(torch.equal(value, before[key]) for key, value in adapter.net.state_dict().items())
    save_file({**whole, 'difference': torch.zeros(1)}, path)
    assert_equal(read(model, path, ignore_keys=['diff*']), ControlNetModel.from_pretrained(plain))
    wide = SDXL(pretrained=str(write_tiny_sdxl(tmp_path / 'wide', channels=(32, 32, 64))))
    with pytest.raises(UserError, match=r'block_out_channels=\(16, 32, 64\) instead of \(32, 32, 64\)'):
        read(wide, tmp_path / 'original.safetensors')


def rewrite(path: Path, **changes: Any) -> None:
    """Change a folder's config.json."""
    file = path / 'config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


DAMAGE: dict[str, tuple[dict[str, Any], ...]] = {
    'plain': (
        dict(layers_per_block=10**7), dict(transformer_layers_per_block=10**7), dict(block_out_channels=[10**9] * 3),
        dict(transformer_layers_per_block=[1, 1, 10**9]), dict(block_out_channels=[16] * 10**5),
        dict(block_out_channels={}), dict(conditioning_channels=10**12), dict(conditioning_channels=-1),
        dict(conditioning_embedding_out_channels=[16, 32, 96, 10**9]), dict(conditioning_embedding_out_channels=[]),
        dict(conditioning_embedding_out_channels=None), dict(norm_num_groups=0), dict(attention_head_dim=0),
        dict(attention_head_dim='x'), dict(down_block_types=5), dict(down_block_types=['x'] * 3),
        dict(norm_eps='x'), dict(in_channels=True), dict(cross_attention_dim=None), dict(class_embed_type='timestep'),
        dict(num_class_embeds=4), dict(encoder_hid_dim=8), dict(mid_block_type='x'), dict(downsample_padding=-1),
        dict(controlnet_conditioning_channel_order='xyz'), dict(act_fn='x'), dict(_class_name='T2IAdapter'),
        dict(_class_name=None)),
    'union': (
        dict(num_control_type=10**9), dict(num_trans_layer=10**7), dict(num_trans_channel=10**6),
        dict(controlnet_conditioning_channel_order='bgr'), dict(num_trans_head=0), dict(num_trans_head=5))}

#: What a sentence says in place of the setting's name.
SAID = {"{'down_block_types': ['x', 'x', 'x']}": 'x does not exist', "{'act_fn': 'x'}": 'activation function',
        "{'_class_name': 'T2IAdapter'}": 'of class T2IAdapter, not', "{'_class_name': None}": 'of class None, not',
        "{'num_trans_head': 5}": 'embed_dim must be divisible by num_heads'}


def test_damaged_configs_end_quickly(model: SDXL, folder: Path, tmp_path: Path) -> None:
    """Counts and widths of any size, wrong types, inputs that an SDXL does not give: a sentence, before building."""
    for kind, changes in DAMAGE.items():
        own = tmp_path / kind
        own.mkdir()
        for name in ('config.json', FILE):
            (own / name).write_bytes((folder / kind / name).read_bytes())
        text = (own / 'config.json').read_text()
        for change in changes:
            rewrite(own, **change)
            begin = time.process_time()
            with pytest.raises(UserError, match=SAID.get(str(change), next(iter(change)))):
                read(model, own, control_type=None if kind == 'plain' else 1)
            assert time.process_time() - begin < 2, change
            (own / 'config.json').write_text(text)
