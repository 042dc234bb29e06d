"""What a test of the engine needs: a language model without a network."""

from mcsd.testing.tabular import TabularModel

__all__ = ["TabularModel"]
