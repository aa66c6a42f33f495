"""Diffusion models' adapters, in the keys of diffusers, ComfyUI, kohya's scripts and LyCORIS."""

from .read import from_diffusion
from .write import to_diffusion

__all__ = ["from_diffusion", "to_diffusion"]
