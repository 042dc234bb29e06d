"""Pictures of candidate trees: which nodes are drawn, their labels, and the SVG of notebooks."""

import subprocess
import sys
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

import mcsd
from mcsd import StepTrace
from mcsd.tree_picture import LEGEND, MARKS, MAX_NOT_ACCEPTED, escape_invisible
from support.tables import tables

SVG = "{http://www.w3.org/2000/svg}"
TRACE = StepTrace(
    parents=(-1, -1, 0, 0, 1, 2, 4),
    token_ids=(10, 11, 12, 13, None, 14, 15),
    pieces=(" Paris", " <b>&", ".", "\n", "", " It", " never"),
    q=(0.4, 0.3, None, 0.2, None, 0.1, 0.1),
    p=(0.8, 0.1, 0.5, None, None, 0.25, 0.1),
    top=((), (), (), ((16, 0.75), (14, 0.25)), (), (), (), ()),
    top_q=((), (), (), (0.5, None), (), (), (), ()),
    path=(0, 2),
    token_id=16,
    scheme="mcss-wor",
    piece=" is",
)


def drawn(trace: StepTrace) -> list[tuple[str, str, str, list[str]]]:
    return [
        (node.kind, node.label, node.probabilities, [each.label for each in node.children]) for node in trace.picture()
    ]


def chain(count: int, accepted: int) -> StepTrace:
    """A chain of candidates whose first ones were accepted."""
    parents, tokens = tuple(range(-1, count - 1)), tuple(range(count))
    pieces, numbers = tuple(f"t{token}" for token in tokens), (0.5,) * count
    top = ((),) * (count + 1)
    return StepTrace(parents, tokens, pieces, numbers, numbers, top, top, tokens[:accepted], 7, "mcss-wor", "end")


def wide(count: int, accepted: int) -> StepTrace:
    """Candidates of one level, of which one was accepted."""
    return replace(chain(count, 0), parents=(-1,) * count, path=(accepted,))


def test_the_target_s_token_follows_the_path_and_missing_candidates_are_left_out() -> None:
    assert drawn(TRACE) == [
        ("root", "", "", ['" Paris"', '" <b>&"']),
        ("accepted", '" Paris"', "p 0.800  q 0.400", ['"."', '"\\n"']),
        ("not accepted", '" <b>&"', "p 0.100  q 0.300", []),
        ("accepted", '"."', "p 0.500", ['" It"', '" is"']),
        ("not accepted", '"\\n"', "q 0.200", []),
        ("not accepted", '" It"', "p 0.250  q 0.100", []),
        ("from the target", '" is"', "p 0.750", []),
    ]
    assert TRACE.summary == "2 of 5 candidates accepted · acceptance length 3"


def test_without_an_accepted_candidate_the_target_s_token_follows_the_root() -> None:
    trace = replace(TRACE, path=())
    assert [node.label for node in trace.picture()[0].children] == ['" Paris"', '" <b>&"', '" is"']
    assert trace.picture()[-1].probabilities == ""  # Its p is not among the most probable.
    assert trace.summary == "0 of 5 candidates accepted · acceptance length 1"


def test_without_the_target_s_token_the_path_is_the_end() -> None:
    trace = replace(TRACE, token_id=None, piece="")
    assert "from the target" not in [node.kind for node in trace.picture()]
    assert trace.summary.endswith("acceptance length 2")


def test_tokens_without_text_are_shown_by_their_numbers() -> None:
    labels = [node.label for node in replace(TRACE, pieces=(), piece="").picture()]
    assert labels == ["", "#10", "#11", "#12", "#13", "#14", "#16"]


def test_a_step_without_candidates() -> None:
    plain = StepTrace((), (), (), (), (), (((3, 0.9),),), ((None,),), (), 3, "mcss-wor", "x")
    assert drawn(plain) == [("root", "", "", ['"x"']), ("from the target", '"x"', "p 0.900", [])]
    assert plain.summary == "no candidates · acceptance length 1"


@pytest.mark.parametrize("trace", [wide(60, 59), chain(60, 0), chain(60, 30)])
def test_a_large_tree_is_drawn_in_part_but_its_path_whole(trace: StepTrace) -> None:
    kinds = [node.kind for node in trace.picture()]
    assert kinds.count("accepted") == len(trace.path)
    assert kinds.count("not accepted") == MAX_NOT_ACCEPTED
    assert f" · {60 - len(trace.path) - MAX_NOT_ACCEPTED} not shown · " in trace.summary


def test_invisible_characters_are_escaped() -> None:
    assert escape_invisible("naïve 日本 🙂\"'") == "naïve 日本 🙂\"'"
    assert escape_invisible("\n\t\x1b[2J\x9b\u202e\u200b\ud800\\n") == r"\n\t\x1b[2J\x9b\u202e\u200b\ud800\\n"


def svg(trace: StepTrace) -> ElementTree.Element:
    page = ElementTree.fromstring(f"<page>{trace._repr_html_().replace('<br>', '<br/>')}</page>")
    (found,) = page.iter(f"{SVG}svg")
    return found


def test_the_svg_has_a_box_for_each_node_with_its_text_escaped() -> None:
    found = svg(TRACE)
    lines = ["".join(text.itertext()) for text in found.iter(f"{SVG}text")]
    nodes = TRACE.picture()[1:]
    assert lines == [line for node in nodes for line in (f"{MARKS[node.kind]} {node.label}", node.probabilities)]
    assert {element.tag.removeprefix(SVG) for element in found.iter()} == {
        *("svg", "title", "path", "circle", "g", "rect", "text")
    }
    page = TRACE._repr_html_()
    assert "<b>" not in page
    assert TRACE.summary in page
    assert LEGEND in page


@pytest.mark.parametrize("trace", [TRACE, wide(60, 59), chain(60, 30), chain(1024, 1024)])
def test_boxes_of_the_svg_do_not_overlap_and_lie_inside(trace: StepTrace) -> None:
    found = svg(trace)
    boxes = [[float(box.get(key, "")) for key in ("x", "y", "width", "height")] for box in found.iter(f"{SVG}rect")]
    assert len(boxes) == len(trace.picture()) - 1
    for i, (x, y, width, height) in enumerate(boxes):
        assert 0 <= x <= x + width <= float(found.get("width", ""))
        assert 0 <= y <= y + height <= float(found.get("height", ""))
        # Boxes of a column come from top to bottom.
        assert all(abs(other[1] - y) >= height for other in boxes[i + 1 :] if other[0] == x)


def test_colors_are_those_of_the_page_but_the_path_is_green() -> None:
    found = svg(TRACE)
    colors = {element.get(key, "none") for element in found.iter() for key in ("fill", "stroke")}
    assert colors == {"none", "currentColor", "#2ea043"}
    green = [box for box in found.iter(f"{SVG}rect") if box.get("stroke") == "#2ea043"]
    assert len(green) == len(TRACE.path)


def test_a_long_label_is_cut_and_its_tooltip_is_whole() -> None:
    long = "a" * 40
    titles = [title.text for title in svg(replace(TRACE, piece=long)).iter(f"{SVG}title")]
    lines = ["".join(text.itertext()) for text in svg(replace(TRACE, piece=long)).iter(f"{SVG}text")]
    assert f'"{long}"' in titles
    assert f'★ "{"a" * 14}…' in lines


def test_traces_of_an_engine_name_the_text_of_the_target_s_token() -> None:
    class Letters:
        def decode(self, ids: list[int], **options: Any) -> str:
            return "".join(chr(97 + id) for id in ids)

    subject = mcsd.Engine(*tables(), Letters(), "2x1")
    for chunk in subject.stream([1], mcsd.SamplingParams(seed=1, max_new_tokens=20), trace=True):
        trace = chunk.trace
        assert trace is not None
        assert trace.token_id is not None
        assert trace.piece == chr(97 + trace.token_id)
        kinds = [node.kind for node in trace.picture()]
        assert (kinds.count("accepted"), kinds.count("from the target")) == (len(trace.path), 1)


@pytest.mark.thorough
def test_pictures_need_no_torch() -> None:
    code = (
        "import sys; from mcsd import StepTrace;"
        "StepTrace((), (), (), (), (), ((),), ((),), (), 3, 'top-k')._repr_html_(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
