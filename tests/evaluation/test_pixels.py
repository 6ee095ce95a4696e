"""SSIM, MS-SSIM, PSNR and LPIPS against torchmetrics called by hand, on images of 8 bits."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation import libraries, networks, torchvision_networks
from diffengine_sdxl.evaluation.torchvision_networks import InceptionFeatures
from diffengine_sdxl.registry import METRICS


def pictures(size: int, num: int = 3) -> tuple[Tensor, Tensor]:
    """References [num, 3, size, size] of 8 bits, and noisier ones; the last pair is equal."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(num, 3, 5, 5, generator=generator), size=size, mode='bilinear')
    noisy = smooth + 0.1 * torch.randn(smooth.shape, generator=generator)
    real, made = (x.clamp(0, 1).mul(255).round().div(255) for x in (smooth, noisy))
    made[-1] = real[-1]
    return real, made


def scores(metric: Any, real: Tensor, made: Tensor, entry: str = 'img') -> list[float]:
    data = {'key': list(map(str, range(len(real)))), entry: real * 2 - 1 if entry == 'img' else real}
    metric.process(data, [dict(key=str(i), seed=0, images={'base': image}) for i, image in enumerate(made)])
    return [row.values['base'] for row in metric.results]


@pytest.mark.parametrize(('kind', 'size'), [('SSIM', 32), ('MSSSIM', 176)])
def test_similarity(kind: str, size: int) -> None:
    from torchmetrics.functional.image import ssim
    library: Any = {'SSIM': ssim.structural_similarity_index_measure,
                    'MSSSIM': ssim.multiscale_structural_similarity_index_measure}[kind]
    real, made = pictures(size)
    found = scores(METRICS.build(dict(type=kind)), real, made)
    expected = [float(library(made[i:i + 1], real[i:i + 1], data_range=1.0)) for i in range(3)]
    assert found == pytest.approx(expected, abs=1e-6)
    assert found[-1] == pytest.approx(1, abs=1e-6) and max(found[:2]) < 0.99


def test_psnr_of_equal_images_is_bounded() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio
    real, made = pictures(32)
    metric = METRICS.build(dict(type='PSNR', reference='target'))
    assert metric.needs == ('target',)
    found = scores(metric, real, made, 'target')
    assert found[:2] == pytest.approx([float(peak_signal_noise_ratio(made[i], real[i], data_range=1.0))
                                       for i in range(2)], 1e-6)
    one_off = real[-1:].clone()
    one_off[0, 0, 0, 0] += 1 / 255 if one_off[0, 0, 0, 0] < 0.5 else -1 / 255
    assert found[-1] == pytest.approx(20 * math.log10(255) + 10 * math.log10(3 * 32**2), 1e-9)
    assert scores(METRICS.build(dict(type='PSNR')), real[-1:], one_off)[0] == pytest.approx(found[-1], abs=1e-3)


def test_sizes() -> None:
    real, made = pictures(32)
    with pytest.raises(UserError, match=r"PSNR .* 32 x 32 pixels .*, 'img' of sample '0' is 16 x 32"):
        scores(METRICS.build(dict(type='PSNR')), real[:, :, :16], made)
    with pytest.raises(UserError, match='MSSSIM needs images of more than 160 pixels a side; these are 32 x 32'):
        scores(METRICS.build(dict(type='MSSSIM')), real, made)


def alexnet(name: str = 'alexnet', pretrained: bool = False) -> nn.Sequential:
    """The layers that torchvision's AlexNet has before its classifier."""
    def conv(*args: int) -> list[nn.Module]:
        return [nn.Conv2d(*args), nn.ReLU(inplace=True)]
    return nn.Sequential(*conv(3, 64, 11, 4, 2), nn.MaxPool2d(3, 2), *conv(64, 192, 5, 1, 2), nn.MaxPool2d(3, 2),
                         *conv(192, 384, 3, 1, 1), *conv(384, 256, 3, 1, 1), *conv(256, 256, 3, 1, 1),
                         nn.MaxPool2d(3, 2))


def test_lpips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchvision cannot be imported, its AlexNet is made here."""
    from torchmetrics.functional.image import lpips
    trained, url = alexnet(), 'https://download.pytorch.org/models/alexnet-owt-7be5be79.pth'
    weights = {f'features.{key}': value for key, value in trained.state_dict().items()}
    torch.save({**weights, 'classifier.1.weight': torch.zeros(2, 2)}, tmp_path / 'alex.pth')
    models = SimpleNamespace(AlexNet_Weights=SimpleNamespace(DEFAULT=SimpleNamespace(url=url)))
    monkeypatch.setattr(torchvision_networks, 'torchvision', lambda owner: SimpleNamespace(models=models))
    real, made = pictures(40)
    monkeypatch.setattr(lpips, '_get_tv_model_features', lambda name, pretrained=False: trained)
    expected = lpips.learned_perceptual_image_patch_similarity(made, real, 'alex', reduction='none', normalize=True)
    monkeypatch.setattr(lpips, '_get_tv_model_features', alexnet)
    state = torch.get_rng_state()
    metric = METRICS.build(dict(type='LPIPS', weights=str(tmp_path / 'alex.pth')))
    assert scores(metric, real, made) == pytest.approx(expected.tolist(), abs=1e-7)
    assert metric.name == 'lpips' and expected[-1] == 0 < expected[:-1].min()
    assert torch.equal(torch.get_rng_state(), state)
    torch.save({key: value for key, value in weights.items() if '.8.' not in key}, tmp_path / 'other.pth')
    with pytest.raises(UserError, match=r'of its 10 weights 2 are missing .*features.8'):
        METRICS.build(dict(type='LPIPS', weights=str(tmp_path / 'other.pth'))).check(3, 1)

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError('no network')
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', offline)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(UserError, match=r'cannot be downloaded .*\(no network\)\. Put it at .*/alexnet-owt'):
        METRICS.build(dict(type='LPIPS')).check(3, 1)
    with pytest.raises(UserError, match=r"LPIPS: net='alx' is unknown.*'alex'"):
        METRICS.build(dict(type='LPIPS', net='alx'))


def test_networks_leave_the_device_after_an_evaluation() -> None:
    """Those of torchvision too."""
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places: list[str] = []

        def to(self, device: Any) -> 'Moved':  # type: ignore[override]
            self.places.append(str(device))
            return self

        def forward(self, *_: Any, **__: Any) -> torch.Tensor:
            return torch.zeros(2, 1)
    metric, features, meta = METRICS.build(dict(type='LPIPS')), InceptionFeatures('none.pth'), torch.device('meta')
    metric._network, features._net, metric.device = Moved(), Moved(), meta
    for _ in range(2):
        metric.compare(torch.zeros(2, 3, 40, 40), torch.zeros(2, 3, 40, 40))
        features(torch.zeros(2, 3, 40, 40), meta)
    networks.release()
    assert metric._network.places == features._net.places == ['meta', 'cpu']


def test_a_pooling_branch_is_pooled_otherwise() -> None:
    """As the Inception of published FIDs needs it; with torchvision it was compared with torch-fidelity's."""
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch_pool = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.branch_pool(nn.functional.avg_pool2d(x, 3, 1, 1))], 1)
    block, x = Block(), torch.rand(1, 1, 3, 3)
    torchvision_networks._pool_by(block, torchvision_networks._mean_pool)
    for _ in range(2):
        assert torch.allclose(block(x)[0, 1, 0, 0], x[0, 0, :2, :2].mean())


def test_libraries_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: dict[str, object] = {'torch_fidelity': True}
    monkeypatch.setattr(libraries, 'find_spec', installed.get)
    imported: list[str] = []
    monkeypatch.setattr(libraries, 'import_module', imported.append)
    with pytest.raises(UserError, match='torch-fidelity is installed without torchvision.*pip uninstall'):
        scores(METRICS.build(dict(type='SSIM')), *pictures(16))
    with pytest.raises(UserError, match=r"LPIPS needs torchvision.*pip install 'diffengine_sdxl\[metrics\]'"):
        METRICS.build(dict(type='LPIPS')).check(3, 1)
    assert not imported

    def broken(name: str) -> None:
        raise RuntimeError('operator torchvision::nms does not exist')
    installed['torchvision'] = True
    monkeypatch.setattr(libraries, 'import_module', broken)
    with pytest.raises(UserError, match=r'cannot be imported beside torch .*\(operator torchvision::nms'):
        METRICS.build(dict(type='FID', inception='a.pth')).check(3, 1)
