"""How much of a text a draft reads: its last stretch, if the rest takes longer to read than it saves."""

MAX_REMAINING = 256
"""Tokens that a text is expected to grow by at most: most texts end long before their limit."""

_SPEED = ((32, 0.71), (64, 0.75), (128, 0.78), (256, 0.82), (512, 0.91))
"""Tokens of a stretch, and the tokens per step as a share of those after the whole text. Measured on Qwen2.5-Coder
1.5B with the 0.5B: see "Long prompts" in docs/benchmarks.md."""


def best_stretch(unread: int, remaining: int, plain: float, drafted: float, reading: float) -> tuple[int, float]:
    """The stretch of a text that saves the most time.

    Args:
        unread: tokens that the draft has not read.
        remaining: tokens that the text is still to grow by, at most.
        plain, drafted: seconds a token of plain decoding, and of speculation by a draft that has read everything.
        reading: seconds in which the draft reads a token.

    Returns:
        Tokens to read, and the seconds that speculation saves with them, reading included; negative if it saves none.
    """
    remaining = min(remaining, MAX_REMAINING)
    options = [(tokens, speed) for tokens, speed in _SPEED if tokens < unread]
    saved = {tokens: remaining * (plain - drafted / speed) - reading * tokens for tokens, speed in options}
    saved[unread] = remaining * (plain - drafted) - reading * unread
    best = max(saved, key=lambda tokens: saved[tokens])
    return best, saved[best]
