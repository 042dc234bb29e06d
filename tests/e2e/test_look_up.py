"""Look-up and predicted output on Qwen2.5-Coder 1.5B: acceptance, and speed against plain decoding in the same run.

Speed needs an idle machine. Run by `make large`.
"""

import pytest

from look_up.__main__ import run

pytestmark = pytest.mark.large


def test_edits_summaries_plain_answers_and_predictions() -> None:
    rows = {(str(row["prompts"]), float(row["temperature"])): row for row in run("qwen2.5-coder-1.5b", 2, 96)}
    for kind in ("edit", "summary"):
        assert float(rows[kind, 0.0]["acceptance length"]) >= 1.6
        assert float(rows[f"{kind} with prediction", 0.0]["acceptance length"]) >= 3
    for temperature in (0.0, 1.0):
        assert float(rows["plain", temperature]["times plain"]) >= 0.97
