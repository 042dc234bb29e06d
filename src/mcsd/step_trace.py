"""What one step drafted and accepted, for pages that draw it. Free of torch."""

from dataclasses import dataclass

from mcsd.tree_picture import MAX_NOT_ACCEPTED, TreeNode, label_of, probabilities_of


@dataclass(frozen=True)
class StepTrace:
    """The candidate tree of one step, and what verification made of it.

    Candidates are numbered from 0 in order of depth. Entry 0 of ``top`` belongs to the root, the last token before the
    step; entry 1 + i to candidate i.

    Attributes:
        parents: of each candidate, -1 for the root.
        token_ids: of each candidate; None where the drafter had none. Such a node is never verified.
        pieces: the text that each candidate adds after its parent; empty without a tokenizer.
        q: the probability of each candidate after its parent under the draft, as it was drawn; None if it was not drawn
            from a distribution (n-grams, temperature 0).
        p: the same under the target: the distribution that verification uses, with penalties, temperature and
            truncation. None where it is none (NaN).
        top: the target's most probable tokens and their probabilities after the root and after each candidate.
        top_q: the probabilities of the same tokens under the draft; None where candidates were not drawn from it.
        path: the accepted candidates, from the root on.
        token_id: the token that the target added after the path; None if it gave no distribution there. The chunk has
            fewer tokens if the text ended before.
        scheme: the name of the scheme that verified the step; "top-k" where candidates were not drawn (see ``q``).
        piece: the text that ``token_id`` adds after the path; empty without a tokenizer.
    """

    parents: tuple[int, ...]
    token_ids: tuple[int | None, ...]
    pieces: tuple[str, ...]
    q: tuple[float | None, ...]
    p: tuple[float | None, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]
    top_q: tuple[tuple[float | None, ...], ...]
    path: tuple[int, ...]
    token_id: int | None
    scheme: str
    piece: str = ""

    @property
    def acceptance_length(self) -> int:
        """The accepted candidates, and the target's own token."""
        return len(self.path) + (self.token_id is not None)

    @property
    def summary(self) -> str:
        """How many candidates were accepted, and the acceptance length, on one line."""
        count, accepted = len(self._drafted()), len(self.path)
        parts = [f"{accepted} of {count} candidates accepted" if count else "no candidates"]
        if count - accepted > MAX_NOT_ACCEPTED:
            parts.append(f"{count - accepted - MAX_NOT_ACCEPTED} not shown")
        return " · ".join([*parts, f"acceptance length {self.acceptance_length}"])

    def _repr_html_(self) -> str:
        from mcsd.notebook import tree_html

        return tree_html(self.picture(), self.summary)

    def picture(self) -> list[TreeNode]:
        """The nodes to draw, parents before children: the root, the accepted path and the first other candidates by
        depth, at most `mcsd.tree_picture.MAX_NOT_ACCEPTED`, and the target's token after the path.
        """
        nodes = {-1: TreeNode("root")}
        others = [node for node in self._drafted() if node not in self.path][:MAX_NOT_ACCEPTED]
        for node in sorted([*self.path, *others]):
            token, kind = self.token_ids[node], "accepted" if node in self.path else "not accepted"
            assert token is not None
            piece = self.pieces[node] if self.pieces else ""
            nodes[node] = TreeNode(kind, label_of(piece, token), probabilities_of(self.p[node], self.q[node]))
            nodes[self.parents[node]].children.append(nodes[node])
        if self.token_id is None:
            return [*nodes.values()]
        last = self.path[-1] if self.path else -1
        p = dict(self.top[1 + last]).get(self.token_id)
        target = TreeNode("from the target", label_of(self.piece, self.token_id), probabilities_of(p))
        nodes[last].children.append(target)
        return [*nodes.values(), target]

    def _drafted(self) -> list[int]:
        """The candidates that have a token, as have all nodes above them."""
        found = {-1}
        for node, (parent, token) in enumerate(zip(self.parents, self.token_ids, strict=True)):
            if token is not None and parent in found:
                found.add(node)
        return sorted(found - {-1})
