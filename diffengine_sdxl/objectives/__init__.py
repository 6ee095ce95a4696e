"""What is learned: the objective and its parts, each a registry entry of one folder."""

from . import contrast, denoise, losses, noises, reconstruct, timesteps, weightings

__all__ = ['contrast', 'denoise', 'losses', 'noises', 'reconstruct', 'timesteps', 'weightings']
