"""T2I-Adapters in single files: TencentARC's original layout, built again here, and diffusers' names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import T2IAdapter as Network
from parity import images, picture_batch, sampler, t2i, with_t2i
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffengine_sdxl.models.sdxl import SDXL

CHANNELS = (16, 32, 64, 64)


class Block(nn.Module):
    """A residual block of TencentARC's Adapter_XL with ksize=1, sk=True, use_conv=False."""

    def __init__(self, inputs: int, outputs: int, down: bool) -> None:
        super().__init__()
        self.down = nn.AvgPool2d(2, 2) if down else None
        if inputs != outputs:
            self.in_conv = nn.Conv2d(inputs, outputs, 1)
        self.block1, self.block2 = nn.Conv2d(outputs, outputs, 3, 1, 1), nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.down is None else self.down(x)
        x = self.in_conv(x) if hasattr(self, 'in_conv') else x
        return self.block2(self.block1(x).relu()) + x


class Original(nn.Module):
    """TencentARC/T2I-Adapter, Adapter/models/adapters.py: one list of blocks, counted through the levels."""

    def __init__(self, in_channels: int, num_blocks: int, channels: tuple[int, ...] = CHANNELS) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.conv_in = nn.Conv2d(in_channels * 256, channels[0], 3, 1, 1)
        before = (channels[0], *channels)
        self.body = nn.ModuleList([Block(before[i] if j == 0 else channels[i], channels[i], i == 2 and j == 0)
                                   for i in range(4) for j in range(num_blocks)])

    def forward(self, x: Tensor) -> list[Tensor]:
        x, features = self.conv_in(nn.functional.pixel_unshuffle(x, 16)), []
        for i, block in enumerate(self.body):
            x = block(x)
            features += [x] if (i + 1) % self.num_blocks == 0 else []
        return features


@pytest.mark.parametrize(('suffix', 'prefix'), [('.pth', ''), ('.safetensors', ''), ('.safetensors', 'module.')])
@pytest.mark.parametrize(('in_channels', 'num_blocks'), [(3, 2), (1, 2), (3, 3)])
def test_original_files(tiny_base: Path, tmp_path: Path, suffix: str, prefix: str, in_channels: int,
                        num_blocks: int) -> None:
    """The same features, bitwise, from a pickle and from safetensors; channels and blocks are read off the file."""
    net = Original(in_channels, num_blocks).requires_grad_(False)
    state = {prefix + k: v for k, v in net.state_dict().items()}
    path = tmp_path / f'adapter-xl-sketch{suffix}'
    torch.save(state, path) if suffix == '.pth' else save_file(state, path)
    model = with_t2i(tiny_base, weights=str(path))
    adapter = model.adapters['adapter']
    image = images(2, (64, 96), in_channels)
    with torch.no_grad():
        for got, expected in zip(adapter.project({'image': image}).values(), net(image), strict=True):
            assert torch.equal(got, expected) and got.any()
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert len(list(adapter.parameters())) == len(state) == len(model.trainables()['adapter'])
    other = with_t2i(tiny_base, in_channels=in_channels, num_res_blocks=num_blocks).adapters['adapter']
    other.load(path)
    assert all(torch.equal(v, adapter.net.state_dict()[k]) for k, v in other.net.state_dict().items())


def test_all_ways_give_the_same_pictures(tiny_base: Path, tmp_path: Path) -> None:
    """A diffusers folder, its one file, the file under other names, in half precision, and an fp64 model."""
    model = with_t2i(tiny_base)
    adapter = model.adapters['adapter']
    adapter.save(tmp_path / 'folder')
    file, = (tmp_path / 'folder').glob('*.safetensors')
    state = load_file(file)
    batch = picture_batch(['a'], [1], conditions={'conditioning_image': images(1)})
    expected = sampler(steps=2)(model, batch)
    save_file({k.removeprefix('adapter.'): v for k, v in state.items()}, tmp_path / 'bare.safetensors')
    for source in (tmp_path / 'folder', file, tmp_path / 'bare.safetensors'):
        assert torch.equal(sampler(steps=2)(with_t2i(tiny_base, weights=str(source)), batch), expected)
    save_file({k: v.half() for k, v in state.items()}, tmp_path / 'half.safetensors')
    half = with_t2i(tiny_base, weights=str(tmp_path / 'half.safetensors')).adapters['adapter'].net.state_dict()
    assert all(torch.equal(v, state[k].half().float()) for k, v in half.items())
    double = SDXL(pretrained=str(tiny_base), dtype='float64', adapters=dict(a=t2i(weights=str(file))))
    assert {p.dtype for p in double.adapters['a'].parameters()} == {torch.float64}


def test_loading_draws_nothing(tiny_base: Path, tmp_path: Path) -> None:
    """A network that is filled at once takes no random numbers from a run."""
    save_file(Original(3, 2).state_dict(), tmp_path / 'x.safetensors')
    adapter = with_t2i(tiny_base).adapters['adapter']
    before = torch.get_rng_state()
    adapter.load(tmp_path / 'x.safetensors')
    assert torch.equal(torch.get_rng_state(), before)


def without(state: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k not in keys}


def faulty() -> dict[str, tuple[dict[str, Any], str]]:
    """Files that are none of ours, and what is said of them."""
    state = Original(3, 2).state_dict()
    wide = Original(3, 2, (32, 32, 64, 64)).state_dict()
    return {
        'missing': (without(state, 'body.5.block2.bias'), r'1 missing \(body\.5\.block2\.bias\)'),
        'no first layer': (without(state, 'conv_in.weight', 'conv_in.bias'), r'2 missing \(conv_in\.bias, conv_in\.we'),
        'unknown': ({**state, 'body.0.skep.weight': torch.zeros(1)}, r'1 unknown \(body\.0\.skep\.weight\)'),
        'misnamed': ({**without(state, 'body.0.block1.bias'), 'body.0.block9.bias': state['body.0.block1.bias']},
                     r'1 unknown \(body\.0\.block9\.bias\); 1 missing \(body\.0\.block1\.bias\)'),
        'prefixed in part': ({**state, 'adapter.conv_in.weight': torch.zeros(1)}, '1 unknown .adapter.conv_in.weight'),
        'other things': ({f'lora.{i:02}': torch.zeros(1) for i in range(12)},
                         r'12 unknown \(lora\.00, .*lora\.09 \.\.\.\)'),
        'another base': (wide, r"'channels': \(32, 32, 64, 64\).*[Ii]t was made for another base"),
        'another factor': ({**state, 'conv_in.weight': torch.zeros(16, 12, 3, 3)},
                           'takes 12 channels after pixel unshuffle'),
        'larger kernels': ({**state, 'body.0.block2.weight': torch.zeros(16, 16, 3, 3)},
                           r'1 of another shape \(adapter.body.0.resnets.0.block2'),
    }


@pytest.mark.parametrize('fault', faulty())
def test_files_that_do_not_fit(tiny_base: Path, tmp_path: Path, fault: str) -> None:
    """Keys in the file's own names, first ten and the count; the adapter stays as it was."""
    state, sentence = faulty()[fault]
    path = tmp_path / 'x.safetensors'
    save_file(state, path)
    adapter = with_t2i(tiny_base).adapters['adapter']
    before = {k: v.clone() for k, v in adapter.net.state_dict().items()}
    with pytest.raises(ValueError, match=sentence):
        with_t2i(tiny_base, weights=str(path))
    with pytest.raises(ValueError, match="x.safetensors'"):
        adapter.load(path)
    assert all(torch.equal(v, before[k]) for k, v in adapter.net.state_dict().items())


def test_pickles_with_more_than_tensors(tiny_base: Path, tmp_path: Path) -> None:
    """Not opened; nor is a file that is not there."""
    torch.save({'conv_in.weight': Path('x')}, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match='holds more than tensors'):
        with_t2i(tiny_base, weights=str(tmp_path / 'x.pth'))
    with pytest.raises(ValueError, match='There is no file or folder'):
        with_t2i(tiny_base, weights='nowhere/adapter-xl-sketch.pth')


def test_the_layout_is_diffusers_own() -> None:
    """Seen from the other side: diffusers' network has a name for each of the original's tensors and no more."""
    for num_blocks in (1, 2, 4):
        nets = Network(3, list(CHANNELS), num_blocks, 16, 'full_adapter_xl'), Original(3, num_blocks)
        shapes = [sorted(tuple(p.shape) for p in net.parameters()) for net in nets]
        assert shapes[0] == shapes[1]
