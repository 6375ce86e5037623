"""Hostile and broken safetensors files stop at the header, with an InputError that names what is wrong."""

import contextlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.files import GOOD, HOSTILE, JSON, A, peak_of, tiny_arrays, with_header, write_safetensors

from lpsparse import open as open_checkpoint
from lpsparse import prune
from lpsparse.checkpoint.header import read_header
from lpsparse.errors import InputError


@pytest.mark.parametrize(("data", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_by_what_is_wrong_with_it(
    data: bytes, words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    started = time.perf_counter()
    with pytest.raises(InputError) as refused:
        read_header(path)
    assert time.perf_counter() - started < 5  # the bound for any bad input, on a busy machine too
    said = f"{refused.value.code}: {refused.value.what} | {refused.value.hint}"
    assert str(path) in said
    assert [word for word in words if word not in said] == []


LIKE_OTHERS = [60, 128, 384, 0x3C + 256, 0x80 + 512, 0x12_0708, 0x80 + 4 * 256, 0x213C]


@pytest.mark.parametrize("length", LIKE_OTHERS)
def test_a_header_length_that_looks_like_another_format_is_read(length: int, tmp_path: Path) -> None:
    text = json.dumps({"a": A})
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(text + " " * (length - len(text)), bytes(7)))
    assert [each.name for each in read_header(path).entries] == ["a"]
    assert path.read_bytes()[0] in b"<\x80\x08"


@pytest.mark.parametrize("length", LIKE_OTHERS)
def test_such_a_file_cut_short_is_told_as_cut_short(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b'{"a":')
    with pytest.raises(InputError) as refused:
        read_header(path)
    assert refused.value.code == "LPS303"


def test_many_duplicate_names_are_refused_at_once(tmp_path: Path) -> None:
    text = ",".join(f'"{i}":0' for i in range(100_000)) + ',"99999":0'
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header("{" + text + "}"))
    started = time.perf_counter()
    with pytest.raises(InputError, match="'99999'"):
        read_header(path)
    assert time.perf_counter() - started < 2


def test_more_tensors_than_the_cap_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpsparse.checkpoint.header.MAX_TENSORS", 12)
    path = write_safetensors(tmp_path / "m.safetensors", {str(i): ("U8", [0], b"") for i in range(13)})
    with pytest.raises(InputError) as refused:
        read_header(path)
    assert refused.value.code == "LPS304" and "LPSPARSE_MAX_TENSORS=13" in refused.value.hint
    monkeypatch.setenv("LPSPARSE_MAX_TENSORS", "13")
    assert len(read_header(path).entries) == 13


@pytest.mark.parametrize(
    "rest", ['"data_offsets":[0,0]', '"data_offset\\u0073":[0,0]', '"\\u0064ata_offsets":0', '"x":[0]']
)
def test_tensors_are_counted_before_they_are_parsed_however_their_keys_are_written(
    rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lpsparse.checkpoint.header.MAX_TENSORS", 12)
    text = ",".join(f'"{i}":{{"dtype":"U8","shape":[0],{rest}}}' for i in range(29))
    (tmp_path / "m.safetensors").write_bytes(with_header("{" + text))  # cut: no parser would come to its end
    with pytest.raises(InputError) as refused:
        read_header(tmp_path / "m.safetensors")
    assert refused.value.code == "LPS304"


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_mutation_of_a_file_reads_or_raises_input_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    mutated = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        kind = data.draw(st.sampled_from(["set", "insert", "delete", "repeat"]))
        if kind == "set":
            mutated[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            mutated[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            cut = mutated[at : at + data.draw(st.integers(1, 40))]
            mutated[at : at + len(cut)] = cut + cut if kind == "repeat" else b"\0"
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(bytes(mutated))
    try:
        sizes = [tensor.read().nbytes for tensor in open_checkpoint(path).tensors]
    except InputError:
        return
    assert sum(sizes) < len(mutated)


ENTRY = st.fixed_dictionaries({"dtype": JSON, "shape": JSON | st.lists(st.integers()), "data_offsets": JSON})


@settings(max_examples=400, deadline=None)
@given(header=st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), JSON | ENTRY, max_size=4))
def test_any_json_as_header_reads_or_raises_input_error(
    tmp_path_factory: pytest.TempPathFactory, header: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "json.safetensors"
    path.write_bytes(with_header(header, bytes(13)))
    with contextlib.suppress(InputError):
        read_header(path)


# Python's objects for the densest JSON, [[{"":[]}],[{"":[]}],...], take 36 times its bytes: a table of 64
# bytes, its list and pairs for every 3 to 8 letters. What is not ASCII takes 4 bytes a letter besides.
MULTIPLE, CONSTANT = 45, 300_000
DENSE = ["[],", "{},", '{"":{}},', '{"a":0,"b":0},', "1.5,", '"\U0001f600a",', "999,", '[{"":[]}],']


@pytest.mark.parametrize(
    "part", [*DENSE, '"{}":{{}},', '"{}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},']
)
def test_a_header_or_an_index_takes_memory_in_proportion_to_its_file(part: str, tmp_path: Path) -> None:
    named = '"{}"' in part
    text = "".join(part.format(n) if named else part for n in range(200_000 // len(part)))
    text = f"{{{text[:-1]}}}" if named else f'{{"a":[{text[:-1]}]}}'
    path, index = tmp_path / "m.safetensors", tmp_path / "m.index.json"
    path.write_bytes(with_header(text))
    index.write_text(text)
    assert peak_of(lambda: read_header(path)) < MULTIPLE * path.stat().st_size + CONSTANT
    assert peak_of(lambda: open_checkpoint(index)) < MULTIPLE * index.stat().st_size + CONSTANT


@settings(max_examples=100, deadline=None)
@given(length=st.integers(0, 2**64 - 1) | st.integers(0, 10**8), data=st.binary(max_size=600))
def test_a_length_is_not_believed_before_it_fits_the_file(
    tmp_path_factory: pytest.TempPathFactory, length: int, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "length.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + data)
    assert peak_of(lambda: read_header(path)) < MULTIPLE * path.stat().st_size + CONSTANT


def test_a_file_of_the_safetensors_library_reads_with_the_same_tensors(tmp_path: Path) -> None:
    arrays = tiny_arrays()
    save_file(arrays, tmp_path / "model.safetensors")
    found = {tensor.name: tensor for tensor in open_checkpoint(tmp_path / "model.safetensors").tensors}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        assert found[name].read().tobytes() == array.tobytes()


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_the_safetensors_library_opens_what_we_write(framework: str, tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "out", sparsity=0)
    written = tmp_path / "out" / "model.safetensors"
    if framework == "torch":
        import safetensors.torch

        found = {name: tensor.numpy() for name, tensor in safetensors.torch.load_file(written).items()}
    else:
        found = load_file(written)
    assert found.keys() == tiny_arrays().keys()
    assert all(np.array_equal(found[name], array) for name, array in tiny_arrays().items())


def test_data_starts_at_a_multiple_of_eight_and_wide_tensors_come_first(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "out", sparsity=0)
    header = read_header(tmp_path / "out" / "model.safetensors")
    assert header.entries[0].offset % 8 == 0
    assert header.entries[0].dtype == "I64"
    assert header.metadata == {"format": "pt"}
