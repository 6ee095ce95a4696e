"""The networks of metrics: features as transformers gives them by hand, shared, in any order; what is missing."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from evaluation.tiny_networks import write_clip, write_vision
from PIL import Image

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation import networks
from diffengine_sdxl.evaluation.networks import ImageFeatures, NetworkSource, TextFeatures, metric_name, unit
from diffengine_sdxl.loading.strict import shipped

CPU = torch.device('cpu')
ENCODER = 'diffengine_sdxl::shapes/base/image_encoder'


def pictures(num: int = 3, height: int = 40, width: int = 56) -> torch.Tensor:
    """Images of 8 bits, of another size and aspect ratio than the networks take."""
    noise = torch.randint(0, 256, (num, 3, height, width), generator=torch.Generator().manual_seed(num))
    return noise.float() / 255


def pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]


def by_hand(cls: Any, folder: Path, images: torch.Tensor, **options: Any) -> Any:
    """Call transformers itself."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend='pil')
    net = cls.from_pretrained(folder, **options).eval().requires_grad_(False)  # other kernels with gradients
    with torch.no_grad():
        return net, processor(images=pil(images), return_tensors='pt')


@pytest.fixture(scope='module')
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp('networks') / 'clip-tiny')


@pytest.mark.parametrize(('kind', 'width'), [('dinov2', 16), ('dino', 16), ('vit', 16), ('siglip', 16),
                                             ('convnext', 24)])
def test_features_of_a_vision_model_are_transformers_own(kind: str, width: int, tmp_path: Path) -> None:
    folder, images = write_vision(tmp_path / kind, kind), pictures()
    features = ImageFeatures(str(folder))
    features.check()
    assert (features.label, features.num_features) == (kind, width)
    options = {'add_pooling_layer': False} if kind == 'dino' else {}
    net, inputs = by_hand(transformers.AutoModel, folder, images, **options)
    with torch.no_grad():
        output = net(**inputs)
    expected = output.last_hidden_state[:, 0] if kind == 'dino' else output.pooler_output.flatten(1)
    if kind == 'dinov2':
        assert torch.equal(expected, output.last_hidden_state[:, 0])
    found = features(images, CPU)
    assert found.dtype == np.float32 and np.array_equal(found, expected.numpy())


def test_features_of_a_clip_are_projected(clip: Path) -> None:
    images, texts = pictures(), ['a red circle', 'x']
    net, inputs = by_hand(transformers.CLIPModel, clip, images)
    tokens = transformers.AutoTokenizer.from_pretrained(clip)(texts, padding=True, return_tensors='pt')
    with torch.no_grad():
        expected = net.get_image_features(**inputs).pooler_output, net.get_text_features(**tokens).pooler_output
    features = ImageFeatures(str(clip))
    assert features.num_features == 12
    assert np.array_equal(features(images, CPU), expected[0].numpy())
    assert np.array_equal(TextFeatures(str(clip))(texts, CPU), expected[1].numpy())
    assert features.network is TextFeatures(str(clip)).network  # loaded once for both


def test_the_shipped_image_encoder_has_its_settings_beside_it() -> None:
    folder, images = Path(str(shipped(ENCODER))), pictures()
    processor = transformers.AutoImageProcessor.from_pretrained(folder.parent / 'feature_extractor', backend='pil')
    net = transformers.CLIPVisionModelWithProjection.from_pretrained(folder).eval().requires_grad_(False)
    with torch.no_grad():
        expected = net(**processor(images=pil(images), return_tensors='pt')).image_embeds
    assert np.array_equal(ImageFeatures(ENCODER)(images, CPU), expected.numpy())
    inside = ImageFeatures('diffengine_sdxl::shapes/base', 'image_encoder')
    assert inside.label == 'base_image_encoder' and np.array_equal(inside(images, CPU), expected.numpy())


def test_order_and_size_of_a_batch_do_not_matter(clip: Path) -> None:
    features, images = ImageFeatures(str(clip)), pictures(6)
    whole, order = features(images, CPU), [4, 0, 5, 2, 1, 3]
    assert np.abs(features(images[order], CPU) - whole[order]).max() < 1e-6
    assert np.abs(np.concatenate([features(images[i:i + 1], CPU) for i in range(6)]) - whole).max() < 1e-6


def test_a_batch_is_computed_once(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks.release()
    features, images, calls = ImageFeatures(str(clip)), pictures(4), []
    preprocess = features.network.preprocess
    monkeypatch.setitem(features.network.__dict__, 'preprocess',
                        lambda **inputs: calls.append(len(inputs['images'])) or preprocess(**inputs))
    first = features(images, CPU)
    expected = first.copy()
    first[:] = 0  # the caller's own
    assert np.array_equal(ImageFeatures(str(clip))(images, CPU), expected) and calls == [4]
    # A part of a batch is another one: its last bits may differ, and must not depend on what came before.
    features(images[:2], CPU)
    features(images.reshape(4, 3, 56, 40), CPU)
    assert calls == [4, 2, 4]
    monkeypatch.setattr(networks, 'CACHE_SIZE', 1)
    features(images[:1], CPU)
    assert len(features.network._features) == 1
    networks.release()
    assert not features.network._features


def test_loading_leaves_the_random_state(clip: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(clip, tmp_path / 'copy')
    state = torch.get_rng_state()
    ImageFeatures(str(copied))(pictures(1), CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_long_prompts_are_cut_and_said_once(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(networks, 'print_log', lambda text, **_: said.append(text))
    texts = TextFeatures(str(clip))
    assert texts.network.max_tokens == 20
    fits = 'abcdefghijklmnopqr'  # 18 letters, begin and end
    found = texts([fits, fits + 'stu', 'x'], CPU)
    assert len(said) == 1 and '20 tokens' in said[0] and '1 prompt ' in said[0]
    # The last token is the end again, so the part that fits is measured as such.
    assert np.abs(found[0] - texts([fits], CPU)[0]).max() < 1e-6
    texts([fits + 'again'], CPU)
    assert len(said) == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    with torch.no_grad():
        expected = transformers.CLIPModel.from_pretrained(clip).eval().get_text_features(
            **tokenizer([fits, fits + 'stu', 'x'], truncation=True, max_length=20, padding=True, return_tensors='pt')
        ).pooler_output
    assert np.array_equal(found, expected.numpy())


@pytest.mark.parametrize(('missing', 'said'), [
    ('config.json', "has no config.json, so it is not a model of transformers; it has model.safetensors"),
    ('model.safetensors', 'has no model.safetensors'), ('preprocessor_config.json', None),
    ('tokenizer.json', 'has no tokenizer.json')])
def test_missing_files_are_named(missing: str, said: str | None, clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip, tmp_path / 'part')
    for path in folder.glob('vocab.json' if missing == 'tokenizer.json' else missing):
        path.unlink()
    (folder / missing).unlink(missing_ok=True)
    if said is None:  # a CLIP's are known
        assert np.array_equal(ImageFeatures(str(folder))(pictures(), CPU), ImageFeatures(str(clip))(pictures(), CPU))
        return
    with pytest.raises(UserError, match=said):
        (TextFeatures if missing == 'tokenizer.json' else ImageFeatures)(str(folder)).check()


def test_what_is_no_network_is_refused(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    dino = write_vision(tmp_path / 'dino', 'dino')
    (dino / 'preprocessor_config.json').unlink()
    (tmp_path / 'empty').mkdir()
    for model, said in ((tmp_path / 'empty', 'it is empty'), (tmp_path / 'clap', "There is no file or folder '.*clap'"),
                        (dino, "dino' has no preprocessor_config.json, which says how"),
                        (shipped('diffengine_sdxl::shapes/base'), 'has no config.json')):
        with pytest.raises(UserError, match=said):
            ImageFeatures(str(model)).check()
    with pytest.raises(UserError, match=r"\(ViTModel\) reads no text|reads no text"):
        TextFeatures(ENCODER).check()
    with pytest.raises(UserError, match='must be the folder or hub id'):
        ImageFeatures('')
    with pytest.raises(UserError, match=r"model of type 'clip', which transformers has no AutoModelForCausalLM for"):
        networks.shared(NetworkSource(str(clip), head='AutoModelForCausalLM')).check()


def test_a_network_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network: an image encoder in a folder of a repository, with a pipeline's image processor beside it."""
    commit = '0' * 40
    repo = tmp_path / 'models--some--adapter'
    shutil.copytree(Path(str(shipped(ENCODER))), repo / 'snapshots' / commit / 'models' / 'image_encoder')
    settings = repo / 'snapshots' / commit / 'models' / 'feature_extractor'
    transformers.CLIPImageProcessorPil(size={'shortest_edge': 64}, crop_size=64, image_mean=[0.1, 0.2, 0.3]
                                       ).save_pretrained(settings)
    (repo / 'refs').mkdir()
    (repo / 'refs' / 'main').write_text(commit)

    def offline(*args: object, **kwargs: object) -> None:
        raise huggingface_hub.errors.OfflineModeIsEnabled('offline')
    monkeypatch.setattr(huggingface_hub.HfApi, 'model_info', offline)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    features = ImageFeatures('some/adapter', 'models/image_encoder')
    features.check()
    assert features.label == 'adapter_models_image_encoder'
    processor = transformers.AutoImageProcessor.from_pretrained(settings, backend='pil')
    with torch.no_grad():
        expected = ImageFeatures(ENCODER).network.net(**processor(images=pil(pictures()), return_tensors='pt'))
    assert np.array_equal(features(pictures(), CPU), expected.image_embeds.numpy())
    with pytest.raises(UserError, match="some/adapter' in the cache.* has no file 'image_encoder/config.json'"):
        ImageFeatures('some/adapter', 'image_encoder').check()
    with pytest.raises(UserError, match="'some/other' is not a local file or folder"):
        ImageFeatures('some/other').check()


def test_names_of_metrics() -> None:
    default = 'openai/clip-vit-large-patch14'
    assert metric_name('clip_i', NetworkSource(default), default) == 'clip_i'
    assert metric_name('clip_i', NetworkSource('/models/clip-vit-large-patch14/'), default) == 'clip_i'
    assert metric_name('clip_i', NetworkSource('a/b c', 'd/e'), default) == 'clip_i_b_c_d_e'
    assert np.array_equal(unit(np.float32([[3, 4], [0, 0]])), [[0.6, 0.8], [0, 0]])
