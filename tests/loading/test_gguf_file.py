"""The header of a GGUF file: what the gguf package reads, and a named error for whatever is broken."""

import random
import struct
from pathlib import Path

import gguf
import pytest
from gguf import GGUFReader

from mcsd import errors
from mcsd.loading.catalog import path_of, pull
from mcsd.loading.gguf_file import GgufFile
from support.gguf_files import write_gguf


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"

    def add_texts(writer: gguf.GGUFWriter) -> None:
        writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(50)])
        writer.add_array("tokenizer.ggml.scores", [0.5] * 50)
        writer.add_string("general.name", "grüße")

    write_gguf(path, change=add_texts)
    return path


def test_arrays_in_arrays_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, change=lambda writer: writer.add_array("nested", [[1, 2], [3, 4, 5]]))
    assert len(GgufFile(path).tensors) == len(GGUFReader(path).tensors)


def header_size(path: Path) -> int:
    return min(info.offset for info in GgufFile(path).tensors.values())


def assert_as_the_package_reads_it(path: Path) -> None:
    ours, theirs = GgufFile(path), GGUFReader(path).tensors
    assert len(ours.tensors) == len(theirs)
    for tensor in theirs:
        found = ours.tensors[tensor.name]
        assert (found.type, found.offset) == (int(tensor.tensor_type), tensor.data_offset)
        assert found.shape == tuple(map(int, reversed(tensor.shape)))
        assert bytes(ours.bytes_of(tensor.name, int(tensor.n_bytes)).numpy()) == tensor.data.tobytes()


@pytest.mark.parametrize("alignment", [32, 64, 1024])
def test_tensors_are_those_that_the_package_reads(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, change=lambda writer: writer.add_custom_alignment(alignment))
    assert_as_the_package_reads_it(path)


@pytest.mark.thorough
def test_tensors_of_smollm2() -> None:
    pull("smollm2-135m")
    assert_as_the_package_reads_it(path_of("smollm2-135m"))


@pytest.mark.parametrize(
    ("offset", "format", "value"),
    [
        (0, "I", 0x46554748),  # another magic number
        (4, "I", 1),
        (4, "I", 4),
        (8, "Q", 2**40),  # tensors
        (16, "Q", 2**63),  # metadata
        (24, "Q", 2**50),  # the length of the first key
        (24, "Q", 2**64 - 1),
    ],
)
def test_lying_counts_and_lengths(written: Path, tmp_path: Path, offset: int, format: str, value: int) -> None:
    data = bytearray(written.read_bytes())
    struct.pack_into("<" + format, data, offset, value)
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(errors.WeightsCorrupt, match="cannot be read"):
        GgufFile(path)


def test_truncated_headers(written: Path, tmp_path: Path) -> None:
    data, path = written.read_bytes(), tmp_path / "model.gguf"
    for size in (*range(0, 200), *range(200, header_size(written), 37)):
        path.write_bytes(data[:size])
        with pytest.raises(errors.WeightsCorrupt):
            GgufFile(path)


def test_truncated_tensors(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(written.read_bytes()[:-40])
    file = GgufFile(path)
    last = max(file.tensors, key=lambda name: file.tensors[name].offset)
    with pytest.raises(errors.WeightsCorrupt, match="ends within tensor"):
        file.bytes_of(last, 1024)


def test_mutated_headers_are_read_or_refused(written: Path, tmp_path: Path) -> None:
    """10,000 headers with one to four changed bytes or numbers: no other error, and no tensor outside of the file."""
    original, size, generator = written.read_bytes(), header_size(written), random.Random(0)
    path = tmp_path / "model.gguf"
    refused = 0
    for _ in range(10_000):
        data = bytearray(original[: size + 64])
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(size - 8)
            if generator.random() < 0.5:
                data[at] = generator.randrange(256)
            else:
                number = generator.choice(
                    [0, 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1, generator.getrandbits(64)]
                )
                struct.pack_into("<Q", data, at, number)
        path.write_bytes(data)
        try:
            file = GgufFile(path)
        except errors.WeightsCorrupt:
            refused += 1
            continue
        assert all(0 <= info.offset <= len(data) for info in file.tensors.values())
    assert 3_000 < refused < 10_000
