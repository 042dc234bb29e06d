"""Prompts and conversations in the forms that users have them. Free of torch: tensors are read with ``tolist``."""

from collections.abc import Mapping, Sequence
from typing import Any

from mcsd.errors import InvalidParameter
from mcsd.tokenization import PROMPT_FORMS, Message, Prompt


def as_prompts(prompts: Any, pad_token_id: int | None = None) -> tuple[list[Prompt], bool]:
    """Prompts in any form as a list, and whether they were one prompt.

    Args:
        prompts: a text, a list of token ids or a tensor ``[n]``: one prompt; a list of those or a tensor ``[B, n]``; or
            a mapping with ``input_ids`` and perhaps an ``attention_mask``, such as ``BatchEncoding``.
        pad_token_id: of the tokenizer; token ids that are padded with it need an attention mask.

    Raises:
        InvalidParameter: another form, or padding without an attention mask.
    """
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        ids, mask = _listed(prompts["input_ids"]), _listed(prompts.get("attention_mask"))
        rows, single = _unpadded(ids, mask)
        if mask is None:
            _check_no_padding(rows, pad_token_id)
        return rows, single
    prompts = _listed(prompts)
    if not isinstance(prompts, list):
        raise InvalidParameter(f"prompt {prompts!r:.60} is neither a text nor token ids", PROMPT_FORMS)
    if prompts and isinstance(prompts[0], Mapping) and "role" in prompts[0]:
        raise InvalidParameter("generate takes texts, not conversations", "use engine.chat(messages)")
    listed: list[Any] = [_listed(one) for one in prompts]
    single = bool(listed) and not any(isinstance(one, (str, list)) for one in listed)
    listed = [listed] if single else listed
    _check_no_padding(listed, pad_token_id)
    return listed, single


def as_conversations(messages: Any) -> tuple[list[list[Message]], bool]:
    """Conversations as a list, and whether they were one: a list of messages, rather than a list of such lists.

    Raises:
        InvalidParameter: neither.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if isinstance(messages, Sequence) and messages:
        if all(isinstance(one, Mapping) for one in messages):
            return [list(messages)], True
        if all(isinstance(one, Sequence) and not isinstance(one, str) for one in messages):
            return [list(one) for one in messages], False
    raise InvalidParameter(f"{messages!r:.60} is not a conversation", 'give [{"role": "user", "content": "..."}]')


def _listed(value: Any) -> Any:
    """Arrays and tuples as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return (
        list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, list)) else value
    )


def _unpadded(ids: Any, mask: Any) -> tuple[list[Prompt], bool]:
    """Token ids without the positions that an attention mask hides; without a mask, all of them."""
    if not isinstance(ids, list):
        raise InvalidParameter(f"input_ids={ids!r:.60} is not a list of token ids", PROMPT_FORMS)
    single = not (ids and isinstance(_listed(ids[0]), list))
    rows: list[Any] = [ids] if single else [_listed(row) for row in ids]
    if mask is None:
        return rows, single
    try:
        pairs = zip(rows, [mask] if single else mask, strict=True)
        return [[token for token, seen in zip(row, _listed(of), strict=True) if seen] for row, of in pairs], single
    except (TypeError, ValueError) as error:
        raise InvalidParameter(
            "input_ids and attention_mask differ in shape", "give both as the tokenizer does"
        ) from error


def _check_no_padding(prompts: list[Any], pad_token_id: int | None) -> None:
    """Check that prompts are not padded, as far as their tokens show it.

    Tokenizers use one token as padding and as the beginning or the end, so one of them at an end shows padding only if
    the prompts have one length and not all of them have it there.
    """
    rows = [row for row in prompts if isinstance(row, list) and row]
    if pad_token_id is None or not rows:
        return
    rectangle = len(rows) > 1 and len({len(row) for row in rows}) == 1
    for end in (slice(0, 2), slice(-1, -3, -1)):
        pads = [row[end].count(pad_token_id) if row[end][0] == pad_token_id else 0 for row in rows]
        if max(pads) > 1 or (rectangle and 0 < sum(pads) < len(rows)):
            raise InvalidParameter(
                f"prompts are padded with token {pad_token_id} and have no attention mask",
                "give the tokenizer's whole result, or input_ids with their attention_mask",
            )
