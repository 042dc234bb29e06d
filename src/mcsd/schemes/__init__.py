"""The verification schemes. Importing this package imports no torch: the classes are imported on first use."""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mcsd.lazy import lazy_attributes
from mcsd.schemes.registry import REGISTRY

if TYPE_CHECKING:
    from mcsd.schemes.base import Scheme
    from mcsd.schemes.types import CandidateTree, TokenHistory, VerificationResult, VerifiedSequence

    SCHEMES: Mapping[str, type[Scheme]]
    """The class of every scheme, by name."""

__all__ = ["SCHEMES", "CandidateTree", "Scheme", "TokenHistory", "VerificationResult", "VerifiedSequence"]

_lazy = lazy_attributes(
    __name__,
    {
        "CandidateTree": "mcsd.schemes.types",
        "Scheme": "mcsd.schemes.base",
        "TokenHistory": "mcsd.schemes.types",
        "VerificationResult": "mcsd.schemes.types",
        "VerifiedSequence": "mcsd.schemes.types",
    },
)


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used."""
    return _classes() if name == "SCHEMES" else _lazy(name)


@cache
def _classes() -> "Mapping[str, type[Scheme]]":
    """Every scheme's class, by name."""
    return MappingProxyType(
        {name: getattr(import_module(scheme.module), scheme.class_name) for name, scheme in REGISTRY.items()}
    )
