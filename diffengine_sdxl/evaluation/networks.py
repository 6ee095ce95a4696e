"""Vision and text networks of transformers that metrics compare images by, loaded once for all metrics."""

from __future__ import annotations

import inspect
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from diffengine_sdxl.errors import UserError, count_of, listed
from diffengine_sdxl.images import to_pil
from diffengine_sdxl.loading import hub
from diffengine_sdxl.loading.component_checks import check_files, read_headers
from diffengine_sdxl.loading.files import weight_files
from diffengine_sdxl.loading.strict import as_user_error, load_pretrained, shipped

#: File of an image processor's settings.
PREPROCESSOR = 'preprocessor_config.json'
#: Batches of features to keep for each network, so that several metrics compute them once.
CACHE_SIZE = 64


class NetworkSource(NamedTuple):
    """What a network is loaded from; see `ImageFeatures`.

    Attributes:
        head: class or Auto class of transformers to load it by; '' for the one that gives features.
    """

    model: str
    subfolder: str = ''
    revision: str | None = None
    processor: str = ''
    head: str = ''

    def __str__(self) -> str:
        return f'{self.model}/{self.subfolder}' if self.subfolder else self.model

    @property
    def label(self) -> str:
        """Short name for a metric's name, of letters, digits, '-', '.' and '_', such as 'dinov2-base'."""
        return re.sub(r'[^\w.-]+', '_', '_'.join((Path(self.model).name, *Path(self.subfolder).parts)))


class Network:
    """A network of transformers with its image processor and tokenizer; each part is loaded at its first use.

    Get it by `shared`, so that metrics of equal settings have the same one.
    """

    def __init__(self, source: NetworkSource) -> None:
        self.source = source
        self._features: OrderedDict[bytes, np.ndarray] = OrderedDict()

    @cached_property
    def root(self) -> Path:
        """The folder of the model's repository, downloaded if need be: config, weights, settings.

        Raises:
            UserError: it cannot be found, or has no config.json or no weights.
        """
        model, subfolder, revision = self.source[:3]
        model = str(shipped(model))
        path = hub.local_path(model)
        if path is None:
            repo = hub.Repo(model, revision)
            beside = f'{subfolder.rpartition("/")[0]}/feature_extractor/{PREPROCESSOR}'.lstrip('/')
            return repo.fetch(dict.fromkeys((*repo.model_files(subfolder), *repo.tokenizer_files(subfolder),
                                             *({beside} & {*repo.names}))))
        folder = path / subfolder
        names = os.listdir(folder) if folder.is_dir() else []
        if 'config.json' not in names or not weight_files(names):
            missing = 'config.json' if 'config.json' not in names else 'model.safetensors'
            raise UserError(f"'{self.source}' has no {missing}, so it is not a model of transformers"
                            + (f'; it has {listed(sorted(names))}.' if names else '; it is empty.' if folder.is_dir()
                               else f'.{hub.suggest_sibling(folder)}'))
        return path

    @property
    def folder(self) -> Path:
        """The folder of config and weights."""
        return self.root / self.source.subfolder

    @cached_property
    def config(self) -> Any:
        """Its config of transformers."""
        from transformers import AutoConfig
        check_files(self.folder)
        return as_user_error(str(self.source), AutoConfig.from_pretrained, str(self.folder), trust_remote_code=False)

    @cached_property
    def model_class(self) -> Any:
        """The class of the network: `source.head`; else the plain model, with the projection if it is a CLIP.

        Raises:
            UserError: transformers has no such class for this kind of model.
        """
        import transformers
        head = self.source.head or 'AutoModel'
        if head == 'AutoModel' and self.config.model_type == 'clip_vision_model':
            head = 'CLIPVisionModelWithProjection'
        cls = getattr(transformers, head)
        classes = getattr(cls, '_model_mapping', {cls.config_class: cls} if hasattr(cls, 'config_class') else {})
        if type(self.config) not in classes:
            raise UserError(f"'{self.source}' is a model of type '{self.config.model_type}', which transformers has no "
                            f'{head} for; name another model.')
        return classes[type(self.config)]

    @cached_property
    def net(self) -> Any:
        """The network in fp32, frozen, in eval mode.

        Raises:
            UserError: its weights don't fit.
        """
        options: dict[str, Any] = {}
        if 'add_pooling_layer' in inspect.signature(self.model_class.__init__).parameters:
            # DINO's ViTs have no pooling layer in their weights; a random one would change the features.
            names = weight_files(os.listdir(self.folder))
            keys = read_headers(self.folder, names, str(self.source))
            options['add_pooling_layer'] = any(key.startswith('pooler.') for key in keys)
        net = load_pretrained(self.model_class, str(self.root), dtype=torch.float32, shown=self.source.model,
                              subfolder=self.source.subfolder or None, **options)
        return net.eval().requires_grad_(False)

    @cached_property
    def _processor_root(self) -> Path | None:
        """Folder of the image processor and tokenizer, if they are not the model's own."""
        if not self.source.processor:
            return None
        path = hub.local_path(str(shipped(self.source.processor)))
        if path is None:
            repo = hub.Repo(self.source.processor)
            path = repo.fetch(repo.tokenizer_files(''))
        return path

    @cached_property
    def preprocess(self) -> Callable[..., Any]:
        """The model's own image processor, by PIL; CLIP's for a CLIP that has none.

        Raises:
            UserError: there is none, or its settings are invalid.
        """
        from transformers import AutoImageProcessor, CLIPImageProcessorPil
        folders = [self._processor_root] if self._processor_root else [
            self.folder, self.folder.resolve().parent / 'feature_extractor']
        folder = next((f for f in folders if (f / PREPROCESSOR).is_file()), None)
        if folder is not None:
            check_files(folder)
            processor: Callable[..., Any] = as_user_error(str(self.source), AutoImageProcessor.from_pretrained,
                                                          str(folder), backend='pil', trust_remote_code=False)
            return processor
        if self.source.processor or self.config.model_type not in ('clip', 'clip_vision_model'):
            raise UserError(f"'{self.source.processor or self.source}' has no {PREPROCESSOR}, which says how images "
                            'are resized and normalized; copy it from the repository of the model.')
        side = getattr(self.config, 'vision_config', self.config).image_size
        return CLIPImageProcessorPil(size={'shortest_edge': side}, crop_size={'height': side, 'width': side})

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            UserError: the model reads no text, or has no tokenizer.
        """
        from transformers import AutoTokenizer
        if not hasattr(self.model_class, 'get_text_features'):
            raise UserError(f"'{self.source}' ({self.model_class.__name__}) reads no text; a metric of image and "
                            "prompt needs a CLIP or SigLIP with both, such as 'openai/clip-vit-large-patch14'.")
        folder = self._processor_root or self.folder
        if not any((folder / name).is_file() for name in ('tokenizer.json', 'vocab.json', 'spiece.model')):
            raise UserError(f"'{self.source.processor or self.source}' has no tokenizer.json (nor vocab.json or "
                            'spiece.model), so it cannot read prompts; copy it from the repository of the model.')
        check_files(folder)
        return as_user_error(str(folder), AutoTokenizer.from_pretrained, str(folder), trust_remote_code=False)

    def check(self) -> None:
        """Find all that images need but the weights, and download it; see `ImageFeatures.check`."""
        self.model_class, self.preprocess  # noqa: B018  (each raises)

    def check_texts(self) -> None:
        """Find all that texts need but the weights; see `TextFeatures.check`."""
        self.tokenizer  # noqa: B018

    @property
    def max_tokens(self) -> int:
        """Length of the text that it reads, in tokens with those of begin and end."""
        return int(min(self.tokenizer.model_max_length, self.config.text_config.max_position_embeddings))

    @torch.no_grad()
    def embed(self, images: Tensor, device: torch.device) -> np.ndarray:
        """Return the features of images [B, 3, H, W] in [0, 1], fp32 [B, D]."""
        pixels = [to_pil(image) for image in images.detach().float().cpu().numpy()]
        key = _digest('images', *(part for p in pixels for part in (str(p.size).encode(), p.tobytes())))

        def compute() -> Tensor:
            inputs = self.preprocess(images=pixels, return_tensors='pt').to(device)
            net = self.on(device)
            output = net.get_image_features(**inputs) if hasattr(net, 'get_image_features') else net(**inputs)
            return _pooled(output, ('image_embeds', 'pooler_output'))
        return self._remembered(key, compute)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], device: torch.device) -> np.ndarray:
        """Return the features of B texts, cut to `max_tokens`, fp32 [B, D]."""
        def compute() -> Tensor:
            tokens = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens, return_tensors='pt',
                                    # SigLIP was trained with padding, which it reads.
                                    padding='max_length' if self.config.model_type.startswith('siglip') else True)
            output = self.on(device).get_text_features(**tokens.to(device))
            return _pooled(output, ('text_embeds', 'pooler_output'))
        return self._remembered(_digest('texts', *(text.encode() for text in texts)), compute)

    def num_cut(self, texts: Sequence[str]) -> int:
        """Return how many texts have more tokens than it reads."""
        return sum(len(ids) > self.max_tokens for ids in self.tokenizer(list(texts), verbose=False)['input_ids'])

    def on(self, device: torch.device) -> Any:
        """Return the network, moved to a device."""
        return placed(self.net, device)

    def _remembered(self, key: bytes, compute: Callable[[], Tensor]) -> np.ndarray:
        """Return what `compute` gives, computed once for a whole batch.

        Not for each image: with another batch size a kernel's last bits may differ, so what the other processes
        measure would tell in a result.
        """
        if key not in self._features:
            self._features[key] = compute().float().cpu().numpy()
            while len(self._features) > CACHE_SIZE:
                self._features.popitem(last=False)
        return self._features[key].copy()

    def release(self) -> None:
        """Forget its features."""
        self._features.clear()


_NETWORKS: dict[NetworkSource, Network] = {}
#: Network -> where it is, of all that `placed` moved away from the CPU.
_PLACED: WeakKeyDictionary[nn.Module, torch.device] = WeakKeyDictionary()


def placed(net: nn.Module, device: torch.device) -> nn.Module:
    """Return a network of a metric, moved to a device until `release`."""
    if _PLACED.get(net, torch.device('cpu')) != device:
        _PLACED[net.to(device)] = device
    return net


def shared(source: NetworkSource) -> Network:
    """Return the network of `source`, the same for all metrics."""
    return _NETWORKS.setdefault(source, Network(source))


def release() -> None:
    """Move all networks to the CPU and forget features, after an evaluation."""
    for net in [*_PLACED]:
        del _PLACED[net.to('cpu')]
    for network in _NETWORKS.values():
        network.release()


class ImageFeatures:
    """The features of images by a vision model of transformers: what a metric compares images by.

    They are the projected embedding of a CLIP (also of an image encoder alone, with its projection); of a SigLIP its
    pooled embedding; else `pooler_output`, which of a DINOv2 or DINOv3 is the CLS token after the layer norm; of a
    model without one, as DINO's ViTs, that token itself. Images go through the model's own image processor by PIL, in
    8 bits, and through the model in fp32.

    Args:
        model: folder, hub id, or 'diffengine_sdxl::<folder>' of this package.
        subfolder: of it.
        revision: branch, tag or commit of the hub.
        processor: folder or hub id of the image processor and tokenizer; '' for the model's own.
    """

    def __init__(self, model: str, subfolder: str = '', revision: str | None = None, processor: str = '') -> None:
        if not isinstance(model, str) or not model:
            raise UserError(f'model={model!r} of a metric must be the folder or hub id of a vision model.')
        self.network = shared(NetworkSource(model, subfolder, revision, processor))
        self.label = self.network.source.label

    @property
    def num_features(self) -> int:
        """D, from the config alone."""
        config = self.network.config
        if config.model_type in ('clip', 'clip_vision_model'):
            return int(config.projection_dim)
        config = getattr(config, 'vision_config', config)
        return int(config.hidden_size if hasattr(config, 'hidden_size') else config.hidden_sizes[-1])

    def check(self) -> None:
        """Find its files, and download them, without loading the weights.

        Raises:
            UserError: names what is missing.
        """
        self.network.check()

    def __call__(self, images: Tensor, device: torch.device) -> np.ndarray:
        """Return the features of images [B, 3, H, W] in [0, 1], fp32 [B, D], not normalized."""
        return self.network.embed(images, device)


class TextFeatures:
    """The features of texts in the same space as those of images: of a CLIP, SigLIP or the like.

    What is longer than the model reads (77 tokens of CLIP, with begin and end) is cut, and a warning says so once.

    Args:
        model, subfolder, revision, processor: see `ImageFeatures`.
    """

    def __init__(self, model: str, subfolder: str = '', revision: str | None = None, processor: str = '') -> None:
        self.network = shared(NetworkSource(model, subfolder, revision, processor))
        self._warned = False

    def check(self) -> None:
        """Find its files, and download them, without loading the weights.

        Raises:
            UserError: names what is missing, or the model reads no text.
        """
        self.network.check_texts()

    def __call__(self, texts: Sequence[str], device: torch.device) -> np.ndarray:
        """Return the features of B texts, fp32 [B, D], not normalized."""
        network = self.network
        if not self._warned and (cut := network.num_cut(texts)):
            self._warned = True
            print_log(f"'{network.source}' reads {network.max_tokens} tokens; {count_of(cut, 'prompt', 'prompts')} of "
                      f'this batch, and maybe later ones, are cut before they are measured.', logger='current')
        return network.embed_texts(texts, device)

    @property
    def logit_scale(self) -> float:
        """The learned factor of a cosine, exp(logit_scale)."""
        return float(self.network.net.logit_scale.detach().cpu().exp())


def metric_name(kind: str, source: NetworkSource, default: str) -> str:
    """Return `kind`, with the network's label unless that is the default's, or a copy of it in a folder of its name."""
    return kind if source.label == NetworkSource(default).label else f'{kind}_{source.label}'


def unit(features: np.ndarray) -> np.ndarray:
    """Return features [..., D] brought to length 1, fp64; zeros stay zeros."""
    exact = features.astype(np.float64)
    return exact / np.maximum(np.linalg.norm(exact, axis=-1, keepdims=True), np.finfo(np.float64).tiny)


def _digest(kind: str, *parts: bytes) -> bytes:
    digest = blake2b(kind.encode(), digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, 'big') + part)
    return digest.digest()


def _pooled(output: Any, names: Sequence[str]) -> Tensor:
    """Return one vector of each row, [B, D], of a model's output: the first of `names`, else the CLS token."""
    found = next((output[name] for name in names if output.get(name) is not None), None)
    features: Tensor = output['last_hidden_state'][:, 0] if found is None else found
    return features.flatten(1)
