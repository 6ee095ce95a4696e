"""Do the images as a set look like real ones? FID, KID and CMMD, in the features of a vision network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffengine_sdxl.errors import UserError
from diffengine_sdxl.evaluation.base import Measured, SetMetric
from diffengine_sdxl.evaluation.networks import ImageFeatures
from diffengine_sdxl.evaluation.references import DatasetFeatures, sample_images
from diffengine_sdxl.evaluation.torchvision_networks import InceptionFeatures
from diffengine_sdxl.registry import METRICS

#: (kept of N images, kept of M real ones), two masks -> their distance.
Distance = Callable[[np.ndarray, np.ndarray], float]
#: Rows of a kernel's matrix, or pairs, that are held at once.
CHUNK = 1024


class Distribution(SetMetric):
    """A distance between the images and real ones: by default the samples' own images, else a data set's.

    A sample's own image counts once, whatever the number of seeds, and is left out with the sample by the jackknife. A
    data set of real images is fixed: the interval does not say how another choice of them would change the number.

    Args:
        model, subfolder, revision: of the network, see `ImageFeatures`; its label is in the metric's name.
        inception: file of weights, see `InceptionFeatures`: measure by this network, as published FIDs do, in place of
            `model`. Needs torchvision (the extra 'metrics').
        reference: entry of the samples with their own image; unused with `real`.
        real: config of a data set of real images.
        max_real: use so many of them, evenly spaced; None: all.
        kwargs: see ImageMetric.
    """

    better = -1
    bounds = (0.0, np.inf)
    kind = ''
    hint = 'Name the entry with the real image of each sample (reference=...), or a data set of real images (real=...).'

    def __init__(self, model: str = 'facebook/dinov2-base', subfolder: str = '', revision: str | None = None,
                 inception: str | None = None, reference: str = 'img', real: Mapping[str, Any] | None = None,
                 max_real: int | None = None, **kwargs: Any) -> None:
        self.features = (ImageFeatures(model, subfolder, revision) if inception is None else
                         InceptionFeatures(inception))
        self.name = f'{self.kind}_{self.features.label}'
        self.key = reference
        self.real = None if real is None else DatasetFeatures(real, self.features, max_real, type(self).__name__)
        self.needs = (reference,) if real is None else ()
        self._known: dict[tuple[str, bytes], float] = {}
        super().__init__(**kwargs)

    def check(self, num_samples: int, num_seeds: int) -> str | None:
        """See ImageMetric.

        Raises:
            UserError: a file of the network is missing, or there are too few samples to leave one out.
        """
        self.features.check()
        for number, what in ((num_samples, 'samples'), (3 if self.real is None else len(self.real), 'real images')):
            if number < 3:
                raise UserError(f'{type(self).__name__} compares sets of images and needs 3 {what} at least; there '
                                f'{"is" if number == 1 else "are"} {number}.')
        return None

    def measure(self, images: Tensor, batch: Mapping[str, Any]) -> Sequence[np.ndarray]:
        """Return the features of each image, fp32 [D]."""
        return list(self.features(images, self.device))

    def reference(self, batch: Mapping[str, Any]) -> Sequence[np.ndarray] | None:
        """Return the features of each sample's own image, fp32 [D]; None with a data set of real images."""
        if self.real is not None:
            return None
        return list(self.features(sample_images(batch, self.key, type(self).__name__), self.device))

    def evaluate(self, size: int) -> dict[str, Any]:
        """See BaseMetric; called in all processes, which share the reading of real images."""
        if self.real is not None:
            self.real.compute(self.device)
        self._known.clear()
        try:
            numbers: dict[str, Any] = super().evaluate(size)
            return numbers
        finally:
            self._known.clear()

    @abstractmethod
    def distance(self, images: Tensor, real: Tensor, samples: Sequence[int]) -> Distance:
        """Return the distance of kept images and kept real ones, of which there are always two at least.

        Args:
            images, real: their features, fp64 [N, D] and [M, D].
            samples: number of the sample of each image; without a data set, real image k is that of sample k.
        """

    def statistic(self, values: Sequence[np.ndarray], rows: Sequence[Measured]) -> float:
        """Return the distance of a whole set."""
        return self._distance(values, rows)(np.ones(len(rows), dtype=bool))

    def _distance(self, values: Sequence[np.ndarray], rows: Sequence[Measured]) -> Callable[[np.ndarray], float]:
        """Return the distance of kept images to the real ones that belong to them."""
        own = {row.key: row.reference for row in rows}
        real = np.stack(list(own.values())) if self.real is None else self.real.compute(self.device)
        number = {key: k for k, key in enumerate(own)}
        samples = [number[row.key] for row in rows]
        between = self.distance(torch.from_numpy(np.stack(values)).double(), torch.from_numpy(real).double(), samples)

        def distance(kept: np.ndarray) -> float:
            kept_real = np.ones(len(real), dtype=bool)
            if self.real is None:
                kept_real = np.isin(np.arange(len(real)), np.array(samples)[kept])
            return between(kept, kept_real) if min(kept.sum(), kept_real.sum()) > 1 else float('nan')
        return distance

    def _of(self, rows: Sequence[Measured], image_set: str) -> Callable[[np.ndarray], float]:
        """Return the distance of kept images; a set's own number and its differences share what is computed."""
        distance: Callable[[np.ndarray], float] | None = None
        whole = len(rows) == len(self.rows)

        def statistic(kept: np.ndarray) -> float:
            nonlocal distance
            key = image_set, kept.tobytes()
            if whole and key in self._known:
                return self._known[key]
            distance = distance or self._distance([row.values[image_set] for row in rows], rows)
            value = distance(kept)
            if whole:
                self._known[key] = value
            return value
        return statistic


@METRICS.register_module()
class FID(Distribution):
    """Fréchet distance of two normal distributions with the means and covariances of the features.

    |mean - mean'|^2 + tr(C) + tr(C') - 2 tr((C C')^(1/2)). The last trace is the nuclear norm of A B^T for C = A^T A
    and C' = B^T B, so no matrix is larger than the smaller of the numbers of images and of features, and a covariance
    may be singular. It is that of torchmetrics, to the accuracy of torchmetrics' eigenvalues.

    Biased: it falls as images become more, so only numbers of equally many images compare.

    Source: Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium (2017).
    """

    kind = 'fid'

    def check(self, num_samples: int, num_seeds: int) -> str | None:
        """Warn of fewer images than features; see Distribution."""
        super().check(num_samples, num_seeds)
        images, real = num_samples * num_seeds, num_samples if self.real is None else len(self.real)
        if min(images, real) > (num := self.features.num_features):
            return None
        return (f'FID: {images} images ({num_samples} samples, seeds: {num_seeds}) and {real} real ones are too few '
                f'for the covariance of {num} features, which is singular up to {num} images: the number depends on '
                'how many there are more than on how good they are. Read KID or CMMD, which have no covariance, or '
                f"take more than {num} of both, of which FID's papers take 10000 at least.")

    def distance(self, images: Tensor, real: Tensor, samples: Sequence[int]) -> Distance:
        """Return the Fréchet distance."""
        def between(kept: np.ndarray, kept_real: np.ndarray) -> float:
            x, y = images[torch.from_numpy(kept)], real[torch.from_numpy(kept_real)]
            a, b = ((z - z.mean(dim=0)) / (len(z) - 1) ** 0.5 for z in (x, y))
            gap, cross = x.mean(dim=0) - y.mean(dim=0), _short(a) @ _short(b).T
            # Four times as fast as the singular values of `cross`.
            squares = torch.linalg.eigvalsh(cross @ cross.T if len(cross) < cross.shape[1] else cross.T @ cross)
            root = squares.clamp(min=0).sqrt().sum()
            return float(gap.square().sum() + a.square().sum() + b.square().sum() - 2 * root)
        return between


def _short(factor: Tensor) -> Tensor:
    """Return R [D, D] with R^T R = F^T F for a factor F [N, D] of more rows than columns; else F itself."""
    return torch.linalg.qr(factor, mode='r').R if len(factor) > factor.shape[1] else factor


class KernelDistance(Distribution):
    """The squared maximum mean discrepancy of two sets: mean k(x, x') + mean k(y, y') - 2 mean k(x, y).

    Attributes:
        unbiased: pairs within one sample don't count: an image with itself, with those of its sample's other seeds, and
            with its sample's own image.
        scale: factor of the number.
    """

    unbiased = True
    scale = 1.0

    @abstractmethod
    def kernel(self, dot: Tensor, norm: Tensor, other: Tensor, num_features: int) -> Tensor:
        """Return k(x, y) from x . y, |x|^2 and |y|^2, which broadcast."""

    def distance(self, images: Tensor, real: Tensor, samples: Sequence[int]) -> Distance:
        """Return the discrepancy; leaving rows out takes no more than the kernel among these rows."""
        of_sample: dict[int, list[int]] = {}
        for i, sample in enumerate(samples):
            of_sample.setdefault(sample, []).append(i)
        within = [[(i, j) for rows in of_sample.values() for i in rows for j in rows],
                  [(k, k) for k in range(len(real))], [] if self.real is not None else list(enumerate(samples))]
        xx, yy, xy = (_KernelMean(self.kernel, *pair, left_out if self.unbiased else ()) for pair, left_out in
                      zip(((images, images), (real, real), (images, real)), within, strict=True))

        def between(kept: np.ndarray, kept_real: np.ndarray) -> float:
            x, y = torch.from_numpy(kept), torch.from_numpy(kept_real)
            return self.scale * (xx(x, x) + yy(y, y) - 2 * xy(x, y))
        return between


class _KernelMean:
    """The mean of k(x_i, y_j) over kept rows of x [N, D] and y [M, D], fp64, without the matrix in memory.

    Args:
        kernel: see KernelDistance.
        left_out: pairs (i, j) that don't count.
    """

    def __init__(self, kernel: Callable[[Tensor, Tensor, Tensor, int], Tensor], x: Tensor, y: Tensor,
                 left_out: Sequence[tuple[int, int]]) -> None:
        self.kernel, self.x, self.y = kernel, x, y
        self.of_x, self.of_y = torch.zeros(len(x)).double(), torch.zeros(len(y)).double()
        for start in range(0, len(x), CHUNK):
            block = self._block(x[start:start + CHUNK], y)
            self.of_x[start:start + CHUNK] = block.sum(dim=1)
            self.of_y += block.sum(dim=0)
        self.i, self.j = torch.tensor(left_out, dtype=torch.int64).reshape(-1, 2).T
        pairs = zip(self.i.split(CHUNK), self.j.split(CHUNK), strict=True)
        self.of_pair = torch.cat([self._of_pairs(x[i], y[j]) for i, j in pairs])

    def __call__(self, kept: Tensor, kept_y: Tensor) -> float:
        """Return the mean over kept rows: the sum of all, less rows and columns left out, and what was so twice."""
        twice = self._block(self.x[~kept], self.y[~kept_y]).sum()
        pairs = kept[self.i] & kept_y[self.j]
        total = self.of_x[kept].sum() - self.of_y[~kept_y].sum() + twice - self.of_pair[pairs].sum()
        num = int(kept.sum()) * int(kept_y.sum()) - int(pairs.sum())
        return float(total) / num if num > 0 else float('nan')

    def _of_pairs(self, p: Tensor, q: Tensor) -> Tensor:
        return self.kernel((p * q).sum(dim=1), p.square().sum(dim=1), q.square().sum(dim=1), p.shape[1])

    def _block(self, x: Tensor, y: Tensor) -> Tensor:
        return self.kernel(x @ y.T, x.square().sum(dim=1)[:, None], y.square().sum(dim=1)[None], x.shape[1])


@METRICS.register_module()
class KID(KernelDistance):
    """The unbiased discrepancy under the cubic kernel (x . y / D + 1)^3; below 0 by chance if there is none.

    Over all images at once. The mean over random subsets, as published and in torchmetrics, has the same expectation
    and adds the noise of their choice; with one subset of all images, one seed and a data set of real images it is this
    number. An image resembles its sample's own image more than others, so these pairs would lower the number.

    Source: Binkowski et al., Demystifying MMD GANs (2018); Gretton et al., A Kernel Two-Sample Test (2012), equation 4,
    for pairs.
    """

    kind = 'kid'
    bounds = (-np.inf, np.inf)

    def kernel(self, dot: Tensor, norm: Tensor, other: Tensor, num_features: int) -> Tensor:
        """Return the cubic kernel."""
        return (dot / num_features + 1) ** 3


@METRICS.register_module()
class CMMD(KernelDistance):
    """The discrepancy of normalised CLIP embeddings under a Gaussian kernel of sigma 10, times 1000.

    All pairs count, as in the authors' code: two sets of n images of one distribution are about 10 |x - y|^2 / n apart,
    with the mean squared distance of two embeddings, not 0.

    Source: Jayasumana et al., Rethinking FID: Towards a Better Evaluation Metric for Image Generation (2024);
    github.com/google-research/google-research/tree/master/cmmd.

    Args:
        model: as published by default, then the name is 'cmmd' alone.
        kwargs: see Distribution.
    """

    kind = 'cmmd'
    network = 'openai/clip-vit-large-patch14-336'
    unbiased, scale = False, 1000.0

    def __init__(self, model: str = network, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.name = self.kind if self.features.label == self.network.rpartition('/')[2] else self.name

    def kernel(self, dot: Tensor, norm: Tensor, other: Tensor, num_features: int) -> Tensor:
        """Return exp(-|x - y|^2 / (2 sigma^2)) of vectors brought to length 1."""
        return torch.exp((dot / (norm * other).sqrt() - 1) / 10**2)
