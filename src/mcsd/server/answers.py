"""Parts that all answers have: their head, usage with statistics of acceptance, and log-probabilities."""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mcsd.engine import Engine
from mcsd.models.token_texts import is_readable, token_texts
from mcsd.results import Completion, TokenLogprobs


def head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """The first fields of an answer, equal in all parts of a streamed one."""
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def usage(done: Sequence[Completion]) -> dict[str, Any]:
    """Tokens of the texts of one request; completions of one prompt count it once."""
    stats = [each.stats for each in done]
    prompt, new = stats[0].prompt_tokens, sum(each.new_tokens for each in stats)
    drafted, accepted = (sum(getattr(each, name) for each in stats) for name in ("draft_tokens", "accepted_tokens"))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": stats[0].cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
        "speculative_decoding": acceptance(done),
    }


def usage_of_prompts(groups: Sequence[Sequence[Completion]]) -> dict[str, Any]:
    """`usage`, for several prompts."""
    whole = usage([each for group in groups for each in group])
    whole["prompt_tokens"] = sum(group[0].stats.prompt_tokens for group in groups)
    whole["prompt_tokens_details"] = {"cached_tokens": sum(group[0].stats.cached_tokens for group in groups)}
    return whole | {"total_tokens": whole["prompt_tokens"] + whole["completion_tokens"]}


def acceptance(done: Sequence[Completion]) -> dict[str, Any]:
    """Statistics of acceptance of several texts, with the names of ``mcsd generate --json``."""
    stats = [each.stats for each in done]
    calls, drafted, accepted, new = (
        sum(getattr(each, name) for each in stats)
        for name in ("target_calls", "draft_tokens", "accepted_tokens", "new_tokens")
    )
    histograms = [each.acceptance_histogram for each in stats]
    longest = max(map(len, histograms))
    return {
        "mean_acceptance_length": new / calls if calls else 0.0,
        "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
        "acceptance_histogram": [sum(each[i] for each in histograms if i < len(each)) for i in range(longest)],
        "target_calls": calls,
        "draft_tokens": drafted,
        "accepted_tokens": accepted,
    }


def note(log: dict[str, Any], counts: Mapping[str, Any]) -> None:
    """Write the tokens of a request into its line of the log."""
    log |= {name: counts[name] for name in ("prompt_tokens", "completion_tokens")}
    log["mean_acceptance_length"] = round(counts["speculative_decoding"]["mean_acceptance_length"], 3)


class TokenWriter:
    """Tokens as texts and bytes, for log-probabilities. Its table of the vocabulary is made on first use."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._texts: dict[int, bytes] | None = None

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; without a tokenizer its number as text."""
        if self._texts is None:
            tokenizer, size = self._engine.tokenizer, self._engine.target.vocab_size
            texts = token_texts(tokenizer, size) if is_readable(tokenizer) else {}
            self._texts = {id: one.encode() if isinstance(one, str) else one for id, one in texts.items()}
        return self._texts.get(token, b"token_id:%d" % token)

    def text_of(self, token: int) -> str:
        """The text of a token, with U+FFFD for parts of characters."""
        return self.bytes_of(token).decode(errors="replace")

    def chat_logprobs(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Log-probabilities as chat completions have them."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {"token": self.text_of(token), "logprob": logprob, "bytes": list(self.bytes_of(token))}

        content = [
            entry(each.token_id, each.logprob) | {"top_logprobs": [entry(*other) for other in each.top]}
            for each in tokens
        ]
        return {"content": content, "refusal": None}

    def text_logprobs(self, tokens: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
        """Log-probabilities as text completions have them.

        Args:
            tokens: emitted.
            offset: characters of the text before them.
        """
        texts = [self.text_of(each.token_id) for each in tokens]
        offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
        tops = [{self.text_of(token): logprob for token, logprob in each.top} for each in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [each.logprob for each in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }
