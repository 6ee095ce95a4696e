"""Keyed random numbers: a draw depends on its key only, never on earlier draws.

What a sample sees (order, augmentation, VAE sample, noise, timestep) is drawn in fp32 on the CPU from the key
(seed, sample key, epoch, stream). So it does not depend on the number of processes and workers, the batch size, the
device, or a resume. All other randomness is seeded once per micro-batch by `seed_all`.
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
    """Hash `key` to a 63-bit seed that depends on the value, type and order of its parts (BLAKE2b)."""
    text = '\x1f'.join(f'{type(part).__name__}:{part}' for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big') >> 1


def generator(*key: Key) -> torch.Generator:
    """Return a new CPU generator seeded from `key`."""
    return torch.Generator().manual_seed(key_seed(*key))


def seed_all(*key: Key) -> None:
    """Seed torch (the CPU and CUDA, once it is in use), numpy and Python's `random` from `key`."""
    seed = key_seed(*key)
    # Not `torch.manual_seed`: for a CUDA that is not in use yet it notes the stack of its caller, 1 ms each time.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def fork(*key: Key) -> Iterator[None]:
    """Seed the global generators from `key`; restore their state on exit."""
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
    """The keyed draws of a batch: row i depends on (seed[i], key[i], epoch[i], stream) only.

    Args:
        seed, epoch: int64 tensors [B] on any device.
        key: B sample keys.
    """

    def __init__(self, seed: Tensor, key: Sequence[str], epoch: Tensor) -> None:
        self.keys = list(zip(seed.tolist(), key, epoch.tolist(), strict=True))

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers, fp32 on the CPU, [B, *shape]."""
        return torch.stack([torch.randn(tuple(shape), generator=generator(*k, stream)) for k in self.keys])

    def uniform(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """Return uniform numbers in [0, 1), fp32 on the CPU, [B, *shape]."""
        return torch.stack([torch.rand(tuple(shape), generator=generator(*k, stream)) for k in self.keys])
