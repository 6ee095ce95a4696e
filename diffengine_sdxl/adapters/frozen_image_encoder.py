"""The frozen image encoder that IP-Adapters read images through: finding, loading, preprocessing, sharing."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import torch
from mmengine.logging import print_log
from PIL import Image
from torch import Tensor, nn

from diffengine_sdxl import rng
from diffengine_sdxl.adapters.formats.files import Folder, locate
from diffengine_sdxl.adapters.image_encoder import MEAN, STD
from diffengine_sdxl.cache.keys import digest
from diffengine_sdxl.cache.plan import EntryStore
from diffengine_sdxl.cache.rows import by_row
from diffengine_sdxl.errors import UserError, listed
from diffengine_sdxl.loading import hub
from diffengine_sdxl.loading.component_checks import check_files, read_headers
from diffengine_sdxl.loading.deferred import Deferred
from diffengine_sdxl.loading.digests import FileDigest, Source
from diffengine_sdxl.loading.files import WEIGHTS, read_json, weight_files
from diffengine_sdxl.loading.single_file import is_single_file
from diffengine_sdxl.loading.strict import as_user_error, load_pretrained, shipped
from diffengine_sdxl.protocols import AdapterHost
from diffengine_sdxl.structures import Lookups, send

#: Pixels of a side of the images that an encoder may read.
MAX_SIDE = 4096
#: Source of an image encoder, and its subfolder there.
EncoderSource = tuple[str, str | None]
#: Folders that may hold the image encoder of a base or repository, first choice first; and, seen from the folder of an
#: IP-Adapter's file, its own: in h94/IP-Adapter there is one beside the files and one in 'models'.
INSIDE = ('.', 'image_encoder', 'models/image_encoder')
BESIDE = ('image_encoder', 'models/image_encoder', '../image_encoder', '../models/image_encoder')


@dataclass(frozen=True)
class ImagePreprocessing:
    """The images that an encoder expects: the options of `clip_pixels`, and mean and std of the channels."""

    size: int
    resample: str = 'bicubic'
    short_edge: int | None = None
    stretch: bool = False
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @classmethod
    def from_config(cls, config: Mapping[str, Any], image_size: int, source: str) -> ImagePreprocessing:
        """Read transformers' preprocessor_config.json.

        Args:
            config: its content; what it lacks is CLIP's.
            image_size: the encoder's own, if `config` has no size.
            source: the encoder, for errors.

        Raises:
            UserError: a setting is invalid, or the images are not square.
        """
        def side(name: str) -> tuple[Any, bool]:
            """Return the number of pixels, and whether it is that of the short edge only."""
            value = config.get(name)
            if not isinstance(value, Mapping):
                return value, True
            if value.get('shortest_edge') is not None:
                return value['shortest_edge'], True
            if value.get('height') != value.get('width'):
                raise UserError(f"The image encoder '{source}' takes images with {name}={dict(value)}; only square "
                                'ones are supported.')
            return value.get('height'), False

        scaled, is_short = side('size')
        cropped, _ = side('crop_size')
        if scaled is None or not config.get('do_center_crop', is_short):
            cropped = None
            if is_short and scaled is not None:
                raise UserError(f"The image encoder '{source}' takes images of any aspect ratio "
                                '(do_center_crop=false); only square ones are supported.')
        scaled = image_size if scaled is None else scaled
        cropped = scaled if cropped is None else cropped
        resample = config.get('resample', 3)
        mean, std = config.get('image_mean') or MEAN, config.get('image_std') or STD
        if not config.get('do_normalize', True):
            mean, std = (0.0,) * 3, (1.0,) * 3
        if (resample not in list(Image.Resampling) or any(not isinstance(v, int) or not 1 <= v <= MAX_SIDE
                                                                for v in (scaled, cropped))
                or any(not isinstance(v, list | tuple) or len(v) != 3
                       or not all(isinstance(x, int | float) for x in v) for v in (mean, std))):
            raise UserError(f"The preprocessor_config.json of the image encoder '{source}' is invalid: it has "
                            f'size={scaled!r}, crop_size={cropped!r}, resample={resample!r}, image_mean={mean!r}, '
                            f'image_std={std!r}.')
        return cls(cropped, Image.Resampling(resample).name.lower(), scaled if scaled > cropped else None, not is_short,
                   tuple(mean), tuple(std))


class FrozenImageEncoder(nn.Module):
    """A frozen image encoder of transformers, with its preprocessing.

    Args:
        net: CLIPVisionModelWithProjection, or any vision model with `hidden_states` [N, T, E] and, for `embed`,
            `image_embeds` or `pooler_output` [N, E].
        preprocessing: what it expects of an image.
        source: where it comes from, for errors.
        widths: E of embeddings and of hidden states.
        device: returns the device of a deferred `net`.
    """

    net: Any

    def __init__(self, net: Any, preprocessing: ImagePreprocessing, source: str, widths: tuple[int, int],
                 device: Callable[[], torch.device] | None = None) -> None:
        super().__init__()
        self.deferred = net if isinstance(net, Deferred) else None
        if self.deferred is not None and device is not None:
            self.deferred.place(self, 'net', device)
        else:
            self.net = net.eval().requires_grad_(False)
        self.preprocessing, self.source, self._widths = preprocessing, source, widths
        #: The adapters that read through it.
        self.users: list[str] = []
        self._null: dict[int, Tensor] = {}

    def width(self, hidden: bool) -> int:
        """E, of hidden states or of embeddings."""
        return self._widths[hidden]

    def digest(self, hidden: bool, file_digest: FileDigest) -> str | None:
        """Return the digest of what `embed` gives for pixels in [0, 1]; None if it was not loaded lazily.

        Raises:
            UserError: a file cannot be read.
        """
        if self.deferred is None:
            return None
        return digest('images', self.deferred.digest(file_digest), hidden, astuple(self.preprocessing))

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalize [N, 3, S, S] in [0, 1], and cast it to the encoder's dtype."""
        mean, std = (send(torch.tensor(v, dtype=pixels.dtype), pixels.device).view(-1, 1, 1)
                     for v in (self.preprocessing.mean, self.preprocessing.std))
        return ((pixels - mean) / std).to(self.net.dtype)

    @torch.no_grad()
    def embed(self, pixels: Tensor, hidden: bool) -> Tensor:
        """Turn normalized [N, 3, S, S] into embeddings [N, E], or the hidden states [N, T, E] before the last layer.

        Raises:
            UserError: this encoder has none.
        """
        output = self.net(pixel_values=pixels, output_hidden_states=hidden)
        if hidden:
            embeds = output.hidden_states[-2]
        else:
            embeds = output.get('image_embeds')
            embeds = output.get('pooler_output') if embeds is None else embeds
        if embeds is None or embeds.dim() != 2 + hidden:
            raise UserError(f"The image encoder '{self.source}' ({type(self.net).__name__}) gives no "
                            + ("hidden states [N, T, E]; architecture='plus' needs them." if hidden else
                               "pooled embedding; use architecture='plus', which reads its hidden states."))
        return embeds

    def null(self, hidden: bool, num_images: int = 1, store: EntryStore | None = None) -> Tensor:
        """Return what stands for no image, [1, E] or [num_images, T, E]: zeros, or the hidden states of zero pixels.

        Zero after normalization, so a gray image, as in diffusers. Remembered for each number of images, as the encoder
        is frozen, and kept in `store`; in one batch, as by diffusers' `encode_image`, since kernels depend on the batch
        size.
        """
        options: dict[str, Any] = {'dtype': self.net.dtype, 'device': self.net.device}
        if not hidden:
            return torch.zeros(1, self.width(False), **options)
        null = self._null.get(num_images)
        if null is None or (null.dtype, null.device) != (self.net.dtype, self.net.device):
            side = self.preprocessing.size
            of_files = None if store is None else self.digest(True, store.file_digest)
            key = '' if of_files is None else digest('image_embeds', of_files, 'null', num_images)
            null = by_row(1, lambda _: {'embeds': self.embed(torch.zeros(num_images, 3, side, side, **options), True)},
                          'image_embeds', Lookups([key], [None]), store, self.net.device)['embeds'][0]
            self._null[num_images] = null
        return null


def encoder_inside(source: str) -> EncoderSource:
    """Return where in `source` (a folder, hub id or link) its image encoder is.

    Raises:
        UserError: there is none, or there are several.
    """
    folder, name = locate(source)
    if name is not None:  # a link
        return source, None
    places = [place for place in INSIDE if _is_model(folder.at(place))]
    if not places:
        raise UserError(f"'{source}' holds no image encoder: neither it nor a folder {' or '.join(INSIDE[1:])} in it "
                        'has a config.json and weights. Set image_encoder_subfolder to the folder that has.')
    if len(places) > 1 and places[0] != '.':
        raise UserError(f"'{source}' holds several image encoders; set image_encoder_subfolder to one of "
                        f'{listed(places)}.')
    return source, None if places[0] == '.' else places[0]


def encoder_beside(folder: Folder, base: str | None, embed_dim: int | None, plus: bool) -> EncoderSource | None:
    """Return the image encoder of an IP-Adapter that names none, or None: one near its file, else the base's own.

    Args:
        folder: with the IP-Adapter's file.
        base: the base's folder or hub id.
        embed_dim: the width that the IP-Adapter reads, of hidden states if `plus`; None fits any.

    Raises:
        UserError: several near the file have that width.
    """
    def fits(place: Folder) -> bool:
        return _is_model(place) and embed_dim in (None, _width(place, plus))

    near = [place for place in dict.fromkeys(folder.at(place) for place in BESIDE) if fits(place)]
    if len(near) > 1:
        raise UserError(f"There are several image encoders near '{folder}' ({listed(near)}); set image_encoder to the "
                        'one that the IP-Adapter was trained with.')
    if near:
        return _source(near[0])
    if base is not None and not is_single_file(base):
        with suppress(UserError):  # a hub id that was loaded from another cache
            if fits(locate(base)[0].at('image_encoder')):
                return base, 'image_encoder'
    return None


def _is_model(folder: Folder) -> bool:
    names = folder.names()
    return 'config.json' in names and any(WEIGHTS.fullmatch(name) for name in names)


def _width(folder: Folder, hidden: bool) -> int:
    """Return `FrozenImageEncoder.width` of a model from its config alone."""
    from transformers import AutoConfig
    return _config_width(as_user_error(str(folder), AutoConfig.from_pretrained,
                                       str(folder.file('config.json').parent)), hidden)


def _config_width(config: Any, hidden: bool) -> int:
    projects = not hidden and config.model_type in ('clip', 'clip_vision_model')
    return int(config.projection_dim if projects else getattr(config, 'vision_config', config).hidden_size)


def _source(folder: Folder) -> EncoderSource:
    if folder.repo is None:
        return folder.path, None
    if folder.repo.revision is None:
        return folder.repo.source, folder.path
    # An IP-Adapter's `revision` is that of its weights; a link has its own.
    revision = quote(folder.repo.revision, safe='')
    return f'{hub.HOSTS[0]}/{folder.repo.source}/blob/{revision}/{folder.path}/config.json', None


def load_encoder(source: str, subfolder: str | None, dtype: torch.dtype,
                 lazy_on: Callable[[], torch.device] | None = None) -> FrozenImageEncoder:
    """Load an image encoder of transformers strictly, without a change of the global random state.

    Args:
        source: folder, hub id, 'diffengine_sdxl::<folder>', or link to the weights or config of one on the hub.
        subfolder: of it.
        lazy_on: load the network at its first use, to the device that this returns; None: now.

    Raises:
        UserError: it cannot be loaded, or its preprocessing is not supported.
    """
    from transformers import AutoConfig
    source = str(shipped(source))
    source, revision, inner, variant = hub.parse_model_link(source) or (source, None, None, None)
    subfolder = subfolder or inner
    shown = f'{source}/{subfolder}' if subfolder else source
    path, settings = _fetch(source, subfolder, revision, variant)
    folder = Path(path) / (subfolder or '')
    check_files(folder)
    config = as_user_error(shown, AutoConfig.from_pretrained, path, **({'subfolder': subfolder} if subfolder else {}))
    load = partial(_load_net, config, path, subfolder, dtype, source, variant)
    names = [] if lazy_on is None else weight_files(os.listdir(folder), variant)
    if names:
        num_values = sum(math.prod(info.shape) for info in read_headers(folder, names, shown).values())
        net: Any = Deferred('image_encoder', config, dtype, load, Source(
            folder / 'config.json', tuple(folder / name for name in names)), num_values * dtype.itemsize)
    else:
        net = load()
    size = getattr(getattr(config, 'vision_config', config), 'image_size', None) or 224
    preprocessing = read_json(settings) if settings else {}
    return FrozenImageEncoder(net, ImagePreprocessing.from_config(
        preprocessing, size if isinstance(size, int) else size[0], shown), shown,
        (_config_width(config, False), _config_width(config, True)), lazy_on)


def _load_net(config: Any, path: str, subfolder: str | None, dtype: torch.dtype, source: str,
              variant: str | None) -> nn.Module:
    from transformers import AutoModel, CLIPVisionModelWithProjection
    with rng.fork('image encoder'):
        cls = CLIPVisionModelWithProjection if config.model_type == 'clip_vision_model' else AutoModel
        net = load_pretrained(cls, path, dtype=dtype, shown=source, variant=variant, subfolder=subfolder)
        if config.model_type == 'clip':
            both, net = net, CLIPVisionModelWithProjection(config.vision_config)
            net.vision_model, net.visual_projection = both.vision_model, both.visual_projection
            net.to(dtype)
        elif hasattr(net, 'vision_model') and hasattr(net, 'text_model'):  # SigLIP and its like
            net = net.vision_model
    module: nn.Module = net
    return module


def _fetch(source: str, subfolder: str | None, revision: str | None, variant: str | None) -> tuple[str, Path | None]:
    """Return an image encoder's folder, downloaded if need be, and its preprocessor_config.json, if there is one.

    The file is looked for beside the weights, and in a folder 'feature_extractor' beside theirs or within theirs.
    """
    inner = PurePosixPath(subfolder or '.')
    folders = dict.fromkeys((inner, inner.parent / 'feature_extractor'))
    names = [str(folder / 'preprocessor_config.json') for folder in folders]
    folder = hub.local_path(source)
    if folder is not None:
        paths = [folder / name for name in names]
        if not subfolder:
            paths.append(folder.resolve().parent / 'feature_extractor' / 'preprocessor_config.json')
        return str(folder), next((path for path in paths if path.is_file()), None)
    repo = hub.Repo(source, revision)
    settings = [name for name in names if name in repo.names][:1]
    if repo.partial and not settings:
        print_log(f"{repo} has no preprocessor_config.json for the image encoder in the local cache; CLIP's "
                  'preprocessing is used, whatever the repository has.', logger='current', level=logging.WARNING)
    folder = repo.fetch([*repo.model_files(subfolder, variant), *settings])
    return str(folder), folder / settings[0] if settings else None


def share_encoder(model: AdapterHost, source: str, subfolder: str | None, user: str) -> FrozenImageEncoder:
    """Return the image encoder from `source`, loaded once for all adapters of `model`."""
    name = f'image_encoder_{rng.key_seed(source, subfolder or "")}'
    if name not in model.shared_encoders:
        weight = model.unet_weight
        model.shared_encoders[name] = load_encoder(
            source, subfolder, weight.dtype, (lambda: model.device) if model.lazy_encoders else None).to(weight.device)
    encoder = model.shared_encoders[name]
    assert isinstance(encoder, FrozenImageEncoder)
    encoder.users.append(user)
    return encoder


def release_encoder(model: AdapterHost, encoder: FrozenImageEncoder, user: str) -> None:
    """Undo one `share_encoder`; the last user's drops the encoder."""
    encoder.users.remove(user)
    if not encoder.users:
        del model.shared_encoders[next(n for n, shared in model.shared_encoders.items() if shared is encoder)]
