"""mcsd inside ``model.generate`` of transformers."""

from mcsd.hf.speculator import Speculator, speculative

__all__ = ["Speculator", "speculative"]
