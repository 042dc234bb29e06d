"""The verification schemes, by name."""

from collections.abc import Mapping

from mcsd.schemes.base import Scheme
from mcsd.schemes.block import Block
from mcsd.schemes.candidates import CandidateTree, Texts, Verdict
from mcsd.schemes.greedy_draft import GreedyDraft
from mcsd.schemes.kseq import KSeq
from mcsd.schemes.naive import Naive, TopK
from mcsd.schemes.recursive import Mcss, McssWithoutReplacement
from mcsd.schemes.spechub import SpecHub
from mcsd.schemes.traversal import Traversal

SCHEMES: Mapping[str, type[Scheme]] = {
    scheme.name: scheme
    for scheme in (McssWithoutReplacement, Mcss, Naive, TopK, GreedyDraft, KSeq, SpecHub, Block, Traversal)
}

__all__ = ["SCHEMES", "CandidateTree", "Scheme", "Texts", "Verdict"]
