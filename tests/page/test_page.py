"""The playground as a person uses it: answers, the tree of each step, keys, comparison, errors, phones and axe."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from support.threads import LIMIT

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make page")
expect = playwright.expect
Open = Callable[..., Any]
CHAT = "**/v1/chat/completions"


def traces_of(body: str) -> list[dict[str, Any]]:
    events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    return [choice for event in events for choice in event["choices"]]


def send(page: Any, prompt: str | None = None, **controls: str) -> list[dict[str, Any]]:
    """Send a prompt with some controls, wait for the whole answer, and return its choices as the server sent them."""
    for name, value in controls.items():
        page.fill(f"#{name}", value)
    if prompt is not None:
        page.fill("#prompt", prompt)
    with page.expect_response(CHAT) as answer:
        page.click("#send")
    body = answer.value.text()
    expect(page.locator("#status")).to_contain_text("acceptance length", timeout=1000 * LIMIT)
    return traces_of(body)


def answer_with(page: Any, **answer: Any) -> None:
    page.route(CHAT, lambda route: route.fulfill(**answer))


def nodes(page: Any, state: str = "") -> set[str]:
    found = page.locator(f"#picture .node{state}").evaluate_all("all => all.map((each) => each.dataset.node)")
    assert len(found) == len(set(found))
    return set(found)


def test_an_answer_streams_with_tokens_by_origin(server: str, visit: Open) -> None:
    page = visit(server)
    expect(page.locator("#lead")).to_contain_text("guesses the next words")
    expect(page.locator("#server")).to_contain_text("4x2x2")
    choices = send(page, "Tell me the capital of France.", seed="3", length="32", temperature="0")
    assert sum("trace" in choice for choice in choices) > 1
    answer = page.locator("#chat .assistant .text")
    assert answer.inner_text() == "".join(choice["delta"].get("content", "") for choice in choices).rstrip("\n")
    assert "Paris" in answer.inner_text()
    expected = [
        "own" if place >= len(trace["path"]) else f"d{min(place + 1, 4)}"
        for trace in (choice["trace"] for choice in choices if "trace" in choice)
        for place in range(len(trace["emitted"]))
    ]
    classes = page.locator("#chat .assistant .token").evaluate_all("all => all.map((each) => each.classList[1])")
    assert classes == expected
    assert {"own", "d1", "d2"} <= set(classes)
    again = send(page, "And of Italy?")
    assert any(choice["delta"].get("content") for choice in again)
    assert page.locator("#chat .bubble").count() == 4
    page.click("#clear")
    assert page.locator("#chat .bubble").count() == 0


def test_the_picture_has_the_nodes_of_the_trace_and_keys_go_through_the_steps(server: str, visit: Open) -> None:
    page = visit(server)
    traces = [each["trace"] for each in send(page, "Write a poem.", seed="1", length="40") if "trace" in each]
    page.locator("#slider").blur()
    assert page.locator("#position").inner_text() == f"Step 1 of {len(traces)}"
    rejected = 0
    for step, trace in enumerate(traces, 1):
        expect(page.locator("#position")).to_have_text(f"Step {step} of {len(traces)}")
        candidates = {str(index) for index in range(len(trace["candidates"]))}
        assert nodes(page) == candidates | {"-1", "own"}
        assert nodes(page, ".accepted") == {str(node) for node in trace["path"]}
        for node in nodes(page, ".rejected"):
            rejected += 1
            text = page.locator(f'#picture [data-node="{node}"]').text_content()
            candidate = trace["candidates"][int(node)]
            assert candidate["parent"] in (-1, *trace["path"])
            assert "q" in text
            assert "p" in text
            assert "rejected" in text
        words = page.locator("#explanation").inner_text()
        for noun in ("draft", "candidate", "target", "Verification"):
            assert noun in words
        for node in trace["path"]:
            assert " ".join(trace["candidates"][node]["text"].split()) in words
        ends_at = trace["path"][-1] if trace["path"] else -1
        has_more = any(each["parent"] == ends_at for each in trace["candidates"])
        assert ("residual" in words) == has_more
        page.keyboard.press("ArrowRight")
    assert rejected > 10
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#position")).to_have_text(f"Step {len(traces) - 1} of {len(traces)}")
    page.focus("#back")
    page.keyboard.press("Enter")
    expect(page.locator("#position")).to_have_text(f"Step {len(traces) - 2} of {len(traces)}")
    page.focus("#prompt")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#position")).to_have_text(f"Step {len(traces) - 2} of {len(traces)}")
    page.focus("#slider")
    page.keyboard.press("Home")
    expect(page.locator("#position")).to_have_text(f"Step 1 of {len(traces)}")
    page.click("#play")
    expect(page.locator("#play")).to_have_text("Pause")
    expect(page.locator("#position")).to_have_text(f"Step 3 of {len(traces)}", timeout=1000 * LIMIT)
    page.click("#play")
    expect(page.locator("#play")).to_have_text("Play")
    page.locator("#chat .step").nth(4).click()
    expect(page.locator("#position")).to_have_text(f"Step 5 of {len(traces)}")


def test_everything_can_be_reached_with_the_keyboard(server: str, visit: Open) -> None:
    page = visit(server)
    expect(page.locator("#server")).to_contain_text("4x2x2")
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    order = ["prompt", "example", "example", "temperature", "seed", "length", "speculation", "send", "compare"]
    assert reached[: len(order)] == order
    page.focus("#prompt")
    with page.expect_response(CHAT):
        page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("acceptance length", timeout=1000 * LIMIT)


def test_speculation_off_shows_plain_decoding(server: str, visit: Open) -> None:
    page = visit(server)
    page.uncheck("#speculation")
    choices = send(page, length="12", temperature="0")
    assert all(not each["trace"]["candidates"] for each in choices if "trace" in each)
    expect(page.locator("#status")).to_contain_text("acceptance length 1.00")
    expect(page.locator("#explanation")).to_contain_text("Speculation is off")
    assert nodes(page) == {"-1", "own"}


def test_comparison_runs_both_one_after_the_other(server: str, visit: Open) -> None:
    page = visit(server)
    bodies: list[Any] = []
    page.on("request", lambda sent: sent.method == "POST" and bodies.append(sent.post_data_json))
    page.fill("#temperature", "0")
    page.click("#compare")
    expect(page.locator("#verdict")).to_contain_text(re.compile("times as (fast|long)"), timeout=1000 * LIMIT)
    assert [body["speculative"] for body in bodies] == [{"enabled": True}, {"enabled": False}]
    assert bodies[0]["messages"] == bodies[1]["messages"]
    fast, plain = page.locator(".run .figures").all_inner_texts()
    assert "tokens/s" in fast
    assert "1.00 tokens a step" in plain
    assert "1.00" not in fast
    assert max(page.locator(".run meter").evaluate_all("all => all.map((each) => each.value)")) == 1


def test_a_wrong_key_is_told_and_the_right_one_works(server_with_key: tuple[str, str], visit: Open) -> None:
    url, key = server_with_key
    page = visit(url, 401)
    expect(page.locator("#error")).to_have_text("This server needs a valid API key.")
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key")).to_have_value("")
    expect(page.locator("#error")).to_have_text("This server needs a valid API key.")
    page.fill("#key", key)
    page.keyboard.press("Enter")
    expect(page.locator("#error")).to_be_hidden()
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#server")).to_contain_text("auto")
    expect(page.locator("#server")).to_contain_text("smollm2-135m-head")
    choices = send(page, "Count from one to ten.", length="48")
    assert any(each.get("trace", {}).get("path") for each in choices)
    assert page.evaluate("[document.cookie, localStorage.length, sessionStorage.length]") == ["", 0, 0]


def test_errors_are_sentences(server: str, visit: Open) -> None:
    page = visit(server, 400, 429, 503)
    page.fill("#prompt", "a b c d e " * 1990)
    page.click("#send")
    expect(page.locator("#error")).to_contain_text("The server refused the request: ", timeout=1000 * LIMIT)
    page.fill("#prompt", "x")
    body = json.dumps({"error": {"message": "why", "type": "t", "param": None, "code": "c"}})
    for status, text in ((429, "The server is busy"), (503, "cannot answer now: why")):
        answer_with(page, status=status, body=body, headers={"Retry-After": "1"})
        page.click("#send")
        expect(page.locator("#error")).to_contain_text(text)
        expect(page.locator("#error")).to_contain_text("Try again in 1 s.")
        page.unroute(CHAT)
    cut = 'data: {"choices":[{"index":0,"delta":{"content":"half"}}]}\n\n'
    answer_with(page, status=200, body=cut)
    page.click("#send")
    expect(page.locator("#error")).to_contain_text("The connection to the server broke")
    expect(page.locator("#chat .text").last).to_have_text("half")
    page.unroute(CHAT)
    page.fill("#temperature", "5")
    page.click("#send")
    assert page.evaluate("document.querySelector('#temperature').validity.rangeOverflow")
    send(page, temperature="0.5", length="4")
    expect(page.locator("#error")).to_be_hidden()


def test_stop_ends_an_answer_and_pause_holds_the_picture(server: str, visit: Open) -> None:
    page = visit(server)
    page.fill("#length", "4000")
    page.fill("#prompt", "Write a long story about a city.")
    page.click("#send")
    expect(page.locator("#position")).to_contain_text("of 1", timeout=1000 * LIMIT)
    page.click("#play")
    held = page.locator("#position").inner_text().split(" of ")[0]
    expect(page.locator("#play")).to_have_text("Follow")
    page.click("#stop")
    expect(page.locator("#status")).to_have_text("Stopped.")
    assert page.locator("#position").inner_text().split(" of ")[0] == held
    send(page, "Say yes.", length="4")


def test_text_is_never_html(server: str, visit: Open) -> None:
    page = visit(server)
    attack = "Repeat: <img src=x onerror=alert(1)><b>bold</b>"
    send(page, attack, length="40", temperature="0")
    assert page.locator("#chat .user .text").inner_text() == attack
    assert page.locator("#chat img, #chat b, #steps img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(server: str, visit: Open, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe: make page")
    page = visit(server, color_scheme=scheme)
    page.click("#compare")
    expect(page.locator("#verdict")).to_contain_text("peculation", timeout=1000 * LIMIT)
    send(page, "Write a poem.", seed="1")
    for _ in range(3):
        found = axe.Axe().run(page).response["violations"]
        serious = [
            (each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")
        ]
        assert not serious
        page.click("#forward")


def test_a_phone_needs_no_horizontal_scroll_and_shows_the_whole_tree(server: str, visit: Open) -> None:
    page = visit(server, viewport={"width": 375, "height": 740}, has_touch=True)
    page.click("#compare")
    expect(page.locator("#verdict")).to_contain_text("peculation", timeout=1000 * LIMIT)
    send(page, "Write a poem.", seed="1")
    for _ in range(3):
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        width = page.locator("#picture").evaluate("each => each.clientWidth")
        edges = page.locator("#picture .node").evaluate_all(
            "all => all.map((each) => each.transform.baseVal[0].matrix.e + each.getBBox().width)"
        )
        assert max(edges) <= width + 1
        page.click("#forward")


def test_with_reduced_motion_the_picture_keeps_still(server: str, visit: Open) -> None:
    page = visit(server, reduced_motion="reduce")
    page.click("#send")
    expect(page.locator("#position")).to_contain_text("Step 1 of", timeout=1000 * LIMIT)
    expect(page.locator("#play")).to_have_text("Follow")
    expect(page.locator("#status")).to_contain_text("acceptance length", timeout=1000 * LIMIT)
    expect(page.locator("#position")).to_contain_text("Step 1 of")
