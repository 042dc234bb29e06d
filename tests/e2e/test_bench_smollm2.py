"""`mcsd bench` on real weights: at temperature 0 in float32 every system says the same, in fewer calls than tokens."""

import json
from pathlib import Path

from mcsd.bench import Experiment, Weights, grid
from mcsd.bench.measure import measure
from mcsd.bench.prompts import QUESTIONS


def test_the_default_draft(tmp_path: Path) -> None:
    models = Weights(dtype="float32").load(assisted=False)
    systems = tuple(grid(["2x1"], ["mcss-wor"], ["single"]))
    experiment = Experiment(systems, (0.0,), max_new_tokens=16)
    results = measure(models, {"questions": list(QUESTIONS[:2])}, experiment, tmp_path, 128)
    texts: dict[int, set[str]] = {}
    for line in (tmp_path / "requests.jsonl").read_text().splitlines():
        entry = json.loads(line)
        texts.setdefault(entry["numbers"][0], set()).add(json.dumps(entry["token_ids"]))
    assert [len(said) for said in texts.values()] == [1, 1]
    efficiency = {row.system: row.block_efficiency.value for row in results.speeds if row.block_efficiency}
    assert efficiency["plain"] == 1.0
    assert efficiency["2x1 mcss-wor"] > 1.3
    (acceptance,) = results.acceptances
    shares = [interval.value for interval in acceptance.within]
    assert shares == sorted(shares)
    assert shares[0] > 0.2
