"""Versions of packages and the git commit, for manifests."""

from __future__ import annotations

import importlib.metadata
import subprocess

import torch

from diffengine_sdxl import __version__


def versions() -> dict[str, str]:
    """Return the versions of this package and of those that determine its numbers."""
    # torch's metadata omit the build ('+cu130') if it comes from PyPI.
    names = ('diffusers', 'transformers', 'peft', 'mmengine', 'datasets')
    return {'diffengine_sdxl': __version__, 'torch': torch.__version__,
            **{n: importlib.metadata.version(n) for n in names}}


def git_commit() -> str | None:
    """Return the commit of the current folder, with '-dirty' if it has changes; None outside git."""
    try:
        commit = subprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True, text=True, timeout=5)
        if commit.returncode != 0:
            return None
        changes = subprocess.run(['git', 'status', '--porcelain', '-uno'], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ('-dirty' if changes.stdout.strip() else '')
