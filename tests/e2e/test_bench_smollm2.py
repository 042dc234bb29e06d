"""`mcsd bench` on real weights: at temperature 0 in float32 every system says the same, in fewer calls than tokens."""

import json
from pathlib import Path

from mcsd.bench import BenchModels, Experiment, grid
from mcsd.bench.measure import measure
from mcsd.loading.load import LoadedModel, load_draft
from mcsd.prompts import QUESTIONS


def test_the_default_draft(smollm2: LoadedModel, tmp_path: Path) -> None:
    models = BenchModels(smollm2.model, smollm2.tokenizer, {"draft": load_draft("smollm2-135m-head", smollm2)})
    systems = tuple(grid(["2x1"], ["mcss-wor"], ["single"]))
    experiment = Experiment(systems, (0.0,), max_new_tokens=12)
    results = measure(models, {"questions": list(QUESTIONS[:1])}, experiment, tmp_path, 128)
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert {line["system"] for line in lines} == {"plain", "chain:2 mcss-wor", "2x1 mcss-wor"}
    assert len({json.dumps(line["token_ids"]) for line in lines}) == 1
    efficiency = {row.system: row.block_efficiency.value for row in results.speeds if row.block_efficiency}
    assert efficiency["plain"] == 1.0
    assert efficiency["2x1 mcss-wor"] > 1.2
    (acceptance,) = results.acceptances
    shares = [interval.value for interval in acceptance.within]
    assert shares == sorted(shares)
    assert shares[0] > 0.2
