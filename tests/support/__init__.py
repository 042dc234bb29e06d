"""Helpers of the tests: tiny models, exact references, statistics. Test modules import from here only."""
