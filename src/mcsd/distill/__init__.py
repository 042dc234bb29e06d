"""Making a draft for a target: text the target writes, a head or a small model trained on it, a card that says how."""

from mcsd.distill.run import Events, Options, distill

__all__ = ["Events", "Options", "distill"]
