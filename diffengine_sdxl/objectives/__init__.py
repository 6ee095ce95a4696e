"""Training objectives and their parts, each in a registry."""

from . import contrast, denoise, joint_distill, loss_weightings, losses, noises, reconstruct, timesteps

__all__ = ['contrast', 'denoise', 'joint_distill', 'loss_weightings', 'losses', 'noises', 'reconstruct', 'timesteps']
