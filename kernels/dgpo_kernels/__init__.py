"""Fused kernels for Direct Group Preference Optimization, each with an eager implementation that runs anywhere."""

from dgpo_kernels.api import DGPOLoss, dgpo_loss, group_noise, guided_dpmpp_2m_step, guided_euler_step, philox_normal

__all__ = ["DGPOLoss", "dgpo_loss", "group_noise", "guided_dpmpp_2m_step", "guided_euler_step", "philox_normal"]
