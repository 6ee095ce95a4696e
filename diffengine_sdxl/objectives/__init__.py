"""What is learned: the objective and its parts, each a registry entry of one folder."""

from . import denoise, losses, noises, timesteps, weightings

__all__ = ['denoise', 'losses', 'noises', 'timesteps', 'weightings']
