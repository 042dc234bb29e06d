"""For tests of the engine: a language model without a network."""

from mcsd.testing.tabular import TabularModel

__all__ = ["TabularModel"]
