"""The verification schemes, by name."""

from collections.abc import Mapping

from mcsd.schemes.base import CandidateTree, Node, Scheme, Texts, Verdict
from mcsd.schemes.naive import Naive, TopK
from mcsd.schemes.recursive import Mcss, McssWithoutReplacement

SCHEMES: Mapping[str, type[Scheme]] = {scheme.name: scheme for scheme in (McssWithoutReplacement, Mcss, Naive, TopK)}

__all__ = ["SCHEMES", "CandidateTree", "Node", "Scheme", "Texts", "Verdict"]
