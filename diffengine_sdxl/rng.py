"""Keyed random numbers: every draw is a function of what it is for, never of what was drawn before it.

What a sample sees (order, augmentation, VAE sample, noise, timestep) is drawn in fp32 on the CPU from a key of
(seed, sample key, epoch, stream). So the number of processes and workers, the batch size, the device and a
stop and resume in between change nothing of it. All other randomness is set once per micro-batch by `seed_all`.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

Key = str | int


def key_seed(*key: Key) -> int:
    """A 63-bit seed that depends on every part of `key`, on its type and its order (BLAKE2b)."""
    text = '\x1f'.join(f'{type(part).__name__}:{part}' for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big') >> 1


def generator(*key: Key) -> torch.Generator:
    """A CPU generator of its own for `key`."""
    return torch.Generator().manual_seed(key_seed(*key))


def seed_all(*key: Key) -> None:
    """Seed torch (all devices), numpy and python's `random` from `key`."""
    seed = key_seed(*key)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def fork(*key: Key) -> Iterator[None]:
    """Inside, the global generators are seeded from `key`; afterwards they are what they were."""
    cpu, npy, py = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    seed_all(*key)
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        np.random.set_state(npy)
        random.setstate(py)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


class Draws:
    """The keyed draws of a batch: row i depends on (seed[i], key[i], epoch[i], stream) alone.

    Args:
        seed, epoch: int64 tensors [B] on any device.
        key: B sample keys.
    """

    def __init__(self, seed: Tensor, key: Sequence[str], epoch: Tensor) -> None:
        self.keys = list(zip(seed.tolist(), key, epoch.tolist(), strict=True))

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, fp32 on the CPU, [B, *shape]."""
        return torch.stack([torch.randn(tuple(shape), generator=generator(*k, stream)) for k in self.keys])

    def uniform(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers in [0, 1), fp32 on the CPU, [B, *shape]."""
        return torch.stack([torch.rand(tuple(shape), generator=generator(*k, stream)) for k in self.keys])
