"""Structured output in the engine: schemas, expressions and grammars, what is refused, and what fails."""

import json
from typing import Any

import pytest
import torch

import mcsd
from mcsd.errors import GrammarFailed, InvalidGrammar, InvalidParameter, NoTokenLeft
from mcsd.params import MAX_GRAMMAR, MAX_SCHEMA_DEPTH
from mcsd.testing import TabularModel
from support.faults import EXPLODING_GRAMMAR
from support.small_tokenizers import byte_level

TOKENIZER = byte_level(["ab", '"a"', '":', '{"', "<eos>", "true"], [("a", "b")])
TOKENIZER.add_special_tokens({"eos_token": "<eos>"})
SIZE = len(TOKENIZER)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, "x"]}},
    "required": ["a"],
    "additionalProperties": False,
}


def engine(**options: Any) -> mcsd.Engine:
    generator = torch.Generator().manual_seed(1)
    models = [TabularModel((torch.randn(SIZE, SIZE, generator=generator) * 2).softmax(-1)) for _ in range(2)]
    settings = {"tree": "2x2", "max_length": 256, "max_batch": 8, "tokenizer": TOKENIZER} | options
    return mcsd.Engine(models[0], models[1], **settings)


def test_texts_are_what_plain_decoding_gives() -> None:
    """Constrained and free requests in one batch, with and without candidates, at temperature 0."""
    fields: list[dict[str, Any]] = [
        {"json_schema": SCHEMA},
        {},
        {"json_object": True},
        {"regex": "(ab|ba){3,5}c"},
        {"grammar": 'start: "a" start | "b"'},
        {
            "json_schema": json.dumps(SCHEMA | {"x-guidance": {"whitespace_flexible": False}}),
            "repetition_penalty": 1.3,
            "min_new_tokens": 5,
        },
    ]
    params = [mcsd.SamplingParams(temperature=0, max_new_tokens=40, **each) for each in fields]
    together = engine().generate([[5, 6]] * len(params), params)
    plain = engine(tree="none")
    for one, done in zip(params, together, strict=True):
        assert done.token_ids == plain.generate([5, 6], one).token_ids
    assert together[3].text[-1] == "c"
    assert json.loads(together[5].text).keys() <= {"a", "b"}


def test_a_seed_gives_the_same_text_in_any_batch() -> None:
    params = [mcsd.SamplingParams(seed=seed, max_new_tokens=30, json_schema=SCHEMA, n=2) for seed in range(4)]
    together = engine().generate([[5, 6]] * 4, params)
    for one, both in zip(params, together, strict=True):
        assert [done.token_ids for done in engine(max_batch=1).generate([5, 6], one)] == [
            done.token_ids for done in both
        ]
        assert both[0].token_ids != both[1].token_ids
        for done in both:
            if done.finish_reason == "stop":
                assert isinstance(json.loads(done.text)["a"], bool)


def test_the_text_ends_where_the_grammar_does_and_nowhere_else() -> None:
    ends = TOKENIZER.convert_tokens_to_ids(["c", "d"])
    done = engine().generate([5], regex="(ab)+", stop_token_ids=ends, ignore_eos=True, seed=1, max_new_tokens=200)
    assert done.finish_reason == "stop"
    assert done.token_ids[-1] in ends
    assert set(done.text[:-1]) == {"a", "b"}
    assert len(done.text) % 2


def test_one_grammar_a_request() -> None:
    with pytest.raises(InvalidParameter, match="regex and grammar are given together"):
        mcsd.SamplingParams(regex="a", grammar="start: A")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json_schema": {"not": {}}}, 'json_schema does not compile.*"not"'),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"not": {}, "x-guidance": {"lenient": True}}}, "not"),
        ({"json_schema": {"$ref": "https://example.com/schema"}}, "json_schema does not compile"),
        ({"json_schema": {"$ref": "#"}}, "json_schema does not compile"),
        ({"json_schema": {"enum": []}}, "Unsatisfiable"),
        ({"regex": "(?=a)b"}, "regex does not compile.*look-around"),
        ({"regex": "a(" * 1000}, "regex does not compile"),
        ({"regex": "\ud800"}, "regex does not compile"),
        ({"grammar": "root ::= x"}, "grammar does not compile"),
        ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "nested"),
    ],
)
def test_what_does_not_compile_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidGrammar, match=message) as caught:
        engine().generate([5], **fields)
    assert len(caught.value.message) < 400
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "schema",
    [
        *("[1]", "true", "{", '{"a": NaN}', "[" * 50_000, '{"a":' * 100 + "1" + "}" * 100, 5, ["a"], {"a": {1, 2}}),
        *({"a": float("inf")}, {"a": "x" * MAX_GRAMMAR}, {"enum": [[]] * MAX_GRAMMAR}),
    ],
)
def test_other_schemas_are_refused(schema: Any) -> None:
    with pytest.raises(InvalidParameter, match="json_schema="):
        mcsd.SamplingParams(json_schema=schema)


def test_schemas_that_contain_themselves_are_refused() -> None:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    with pytest.raises(InvalidParameter, match=f"deeper than {MAX_SCHEMA_DEPTH}"):
        mcsd.SamplingParams(json_schema=schema)


@pytest.mark.parametrize(
    "fields",
    [
        {"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(8000)) + '\nr8000: "a"'},
        {
            "json_schema": {
                "$ref": "#/$defs/0",
                "$defs": {str(i): {"properties": {"a": {"$ref": f"#/$defs/{i + 1}"}}} for i in range(1900)}
                | {"1900": {"type": "null"}},
            }
        },
    ],
    ids=["rules", "references"],
)
def test_long_chains_of_references_do_not_overflow_the_stack(fields: dict[str, Any]) -> None:
    """They would end the process."""
    assert engine().generate([5], max_new_tokens=2, **fields).token_ids


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({"tokenizer": None}, {}, "regex needs a tokenizer"),
        ({}, {"ignore_eos": True}, "ignore_eos leaves none"),
    ],
)
def test_what_a_grammar_needs(options: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameter, match=message):
        engine(**options).generate([5], regex="a", **fields)


def test_a_grammar_that_fails_ends_its_request_only() -> None:
    """Its state grows with the text, up to a limit of llguidance."""
    params = [
        mcsd.SamplingParams(temperature=0, max_new_tokens=12),
        mcsd.SamplingParams(temperature=0, max_new_tokens=12, grammar=EXPLODING_GRAMMAR),
    ]
    with pytest.raises(GrammarFailed, match=r"the grammar failed after \d+ new tokens") as caught:
        engine().generate([[5]] * 2, params)
    other, failed = caught.value.completions
    assert failed is None
    assert other.token_ids == engine().generate([5], params[0]).token_ids


def test_a_model_without_an_allowed_token_fails_by_name() -> None:
    table = torch.zeros(SIZE, SIZE)
    table[:, 5] = 1.0
    alone = mcsd.Engine(TabularModel(table), "ngram", TOKENIZER, tree="none", max_length=32)
    with pytest.raises(NoTokenLeft, match="a grammar"):
        alone.generate([5], regex="a")
