"""What notebooks show: completions with drafted tokens marked, engines, a progress bar. All of it escaped."""

import re
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

import mcsd
from mcsd.notebook import MAX_TOKENS, table_html, text_html
from mcsd.testing import TabularModel
from support.tables import tables

LETTERS = ["<b>", "&", '"', "\n", "a", "b", "c", "d", "e", "f", "g", "h"]


class Letters:
    """Every token is a piece of markup or a letter."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(LETTERS[id] for id in ids)


class Marks(HTMLParser):
    """The text of a page, and the parts of it in spans."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.parts: list[tuple[str, bool]] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.parts.append((data, "span" in self.open))


def engine(tokenizer: Any = None) -> mcsd.Engine:
    target, draft = tables()
    return mcsd.Engine(target, draft, tokenizer, "2x1")


def test_drafted_tokens_are_marked_and_the_text_is_escaped() -> None:
    subject, params = engine(Letters()), mcsd.SamplingParams(seed=1, max_new_tokens=60)
    chunks = list(subject.stream([1], params))
    done = chunks[-1].completion
    assert done is not None
    drafted = [place < chunk.accepted for chunk in chunks for place in range(len(chunk.token_ids))]
    assert done.drafted == tuple(drafted)
    assert done.pieces == tuple(piece for chunk in chunks for piece in chunk.pieces)
    assert sum(drafted) == done.stats.accepted_tokens
    assert any(drafted)
    page = Marks(done._repr_html_())
    assert page.tags == {"div", "span"}
    text = "".join(part for part, _ in page.parts)
    assert text.startswith(done.text)
    shown = [mark for part, mark in page.parts for _ in part][: len(done.text)]
    assert shown == [mark for piece, mark in zip(done.pieces, done.drafted, strict=True) for _ in piece]
    assert "60 tokens" in text


def test_without_a_tokenizer_token_ids_are_shown() -> None:
    done = engine().generate([1], seed=1, max_new_tokens=5)
    text = unescape(re.sub("<[^>]*>", "", done._repr_html_()))
    assert text.startswith(" ".join(map(str, done.token_ids)))


def test_a_long_text_is_cut() -> None:
    page = text_html(["a"] * (MAX_TOKENS + 3), [False] * (MAX_TOKENS + 3), "note")
    assert "(3 more tokens)" in page
    assert page.count("a" * MAX_TOKENS) == 1


def test_an_engine_shows_its_options() -> None:
    subject = engine()
    page = subject._repr_html_()
    for value in ("tabular", "2x1", "mcss-wor", str(subject.max_length)):
        assert f"<td>{value}</td>" in page
    assert "auto" in mcsd.Engine(*tables())._repr_html_()
    assert "<script>" not in table_html("<script>", {"<script>": "<script>"})


def test_a_progress_bar_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    subject = engine()
    plain = subject.generate([[1], [2], [3]], seed=1, max_new_tokens=4)
    assert capfd.readouterr() == ("", "")
    done = subject.generate([[1], [2], [3]], seed=1, max_new_tokens=4, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "3/3" in err
    assert [one.token_ids for one in done] == [one.token_ids for one in plain]


def test_a_request_that_fails_ends_the_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    broken = TabularModel(torch.full((4, 4), 0.25))
    broken._logits[2] = torch.nan
    with pytest.raises(mcsd.errors.NonFiniteLogits):
        mcsd.Engine(broken, "ngram").generate([[1], [2]], max_new_tokens=1, temperature=0, progress=True)
    assert "2/2" in capfd.readouterr().err
