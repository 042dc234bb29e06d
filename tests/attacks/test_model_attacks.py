"""What a folder or file of a model may try: to run code, or to have memory allocated that it does not fill.

GGUF headers that lie are in `loading/test_gguf_file.py`, pickled weights and adapters in `test_bad_input.py`.
"""

import json
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mcsd
from mcsd import errors
from mcsd.cpu.weight_plan import WeightPlan
from mcsd.loading.load import load
from support.memory import peak_growth
from support.server import Table, chat_tokenizer
from support.tiny import tiny

CPU = torch.device("cpu")
TALK = [{"role": "user", "content": "x"}]

TEMPLATES = [
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{% set run = lipsum.__globals__['os'].popen('touch MARK') %}{{ run.read() }}",
    "{{ messages.append(messages) }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_runs_no_code_and_reads_no_file(template: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template.replace("MARK", str(mark))
    engine = mcsd.Engine(Table(), tokenizer=tokenizer, tree="none", max_length=64)
    with pytest.raises(errors.InvalidParameter, match="the chat template"):
        engine.chat(TALK, max_new_tokens=1)
    assert not mark.exists()


def test_code_beside_the_weights_is_never_imported(tmp_path: Path) -> None:
    mark, folder = tmp_path / "mark", tmp_path / "model"
    tiny("llama").save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps(config))
    load(folder, CPU, WeightPlan(torch.float32))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(errors.UnsupportedModel, match="code of its own"):
        load(folder, CPU, WeightPlan(torch.float32))
    assert not mark.exists()


def write_header(file: Path, header: Any, length: int | None = None) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * 64)


TENSOR = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ({}, 1 << 62),
        ({TENSOR: {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 64]}}, None),
        ({TENSOR: {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 1 << 32]}}, None),
        ({TENSOR: {"dtype": "F32", "shape": [16], "data_offsets": [1 << 62, (1 << 62) + 64]}}, None),
        ({TENSOR: {"dtype": "F32", "shape": [-16], "data_offsets": [64, 0]}}, None),
        ({TENSOR: {"dtype": "F4096", "shape": [16], "data_offsets": [0, 64]}}, None),
    ],
)
def test_a_safetensors_header_that_lies(header: Any, length: int | None, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert TENSOR in load_file(file)
    write_header(file, header, length)

    def refused() -> None:
        with pytest.raises(errors.ModelError):
            load(tmp_path, CPU, WeightPlan(torch.float32))

    assert peak_growth(refused) < 200e6


EXPLODING = [
    {"regex": "((a{1,999}){1,999}){1,999}"},
    {"regex": "(a|aa)" * 3000},
    {"regex": "(" * 5000 + "a" + ")" * 5000},
    {"regex": "a{2000000000}"},
    {"grammar": "start: a\n" + "\n".join(f"a{'a' * i}: a{'a' * (i + 1)} a{'a' * (i + 1)}" for i in range(60))},
    {"json_schema": {"type": "string", "pattern": "^(([a-z]{1,500}){1,500}){1,500}$"}},
    {"json_schema": {"type": "array", "minItems": 1 << 40}},
    {"json_schema": {"type": "string", "minLength": 1 << 40}},
    {"json_schema": {"$ref": "#"}},
    {"json_schema": {"allOf": [{"anyOf": [{"const": f"{i}-{j}"} for j in range(8)]} for i in range(12)]}},
]


@pytest.mark.parametrize("fields", EXPLODING)
def test_a_grammar_that_is_built_to_explode(fields: dict[str, Any]) -> None:
    """It is refused, or its request fails or makes one token, before it takes memory."""
    engine = mcsd.Engine(Table(), tokenizer=chat_tokenizer(), tree="none", max_length=64)

    def tried() -> None:
        with suppress(errors.RequestError):
            engine.generate("x", max_new_tokens=1, **fields)

    assert peak_growth(tried) < 500e6
    assert engine.generate("x", max_new_tokens=1).stats.new_tokens == 1


def test_a_schema_reads_no_file_and_no_address(tmp_path: Path) -> None:
    engine = mcsd.Engine(Table(), tokenizer=chat_tokenizer(), tree="none", max_length=64)
    file = tmp_path / "schema.json"
    file.write_text('{"const": 1}')
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for address in (file.as_uri(), f"http://127.0.0.1:{listener.getsockname()[1]}/schema.json"):
            with pytest.raises(errors.InvalidParameter, match="json_schema"):
                engine.generate("x", max_new_tokens=4, json_schema={"$ref": address})
        listener.settimeout(0.05)
        with pytest.raises(TimeoutError):
            listener.accept()
