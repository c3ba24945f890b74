"""Sources: what is found where, the documents in it, and the one line for what cannot be read."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.data.text.readers import documents, pieces, token_arrays
from train.data.text.sources import resolve
from train.errors import UserError

END = "<|endoftext|>"


def read(path, **settings):
    return list(documents(resolve(str(path), **settings)))


def names(path):
    return [os.path.basename(part.name) for part in resolve(str(path)).parts]


def refused(call) -> str:
    """The message, which is one line."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_file_is_one_document_or_as_many_as_separators_make(tmp_path):
    file = write(tmp_path / "a.txt", f"one\ntwo\n{END}\n\n{END}\nthree {END} four\n{END}")
    assert read(file) == ["one\ntwo\n", f"three {END} four\n"]
    assert read(file, separator="") == [file.read_text()]
    assert read(file, separator="two") == ["one\n", f"{END}\n\n{END}\nthree {END} four\n{END}"]


def test_a_byte_order_mark_is_dropped_and_line_ends_are_kept(tmp_path):
    file = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n" + END.encode() + b"\r\ntwo\rthree\r\n")
    assert read(file) == ["one\r\n", "two\rthree\r\n"]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_block_borders_change_nothing(tmp_path, monkeypatch, block):
    text = f"\nnaïve café \U0001f600\n\n  x y\n{END}\n{END}x\n  {END}  \nlast ü"
    whole = read(file := write(tmp_path / "a.txt", text))
    assert whole == ["\nnaïve café \U0001f600\n\n  x y\n", f"{END}x\n", "last ü"]
    monkeypatch.setattr("train.data.text.readers.BLOCK", block)
    assert read(file) == whole
    assert read(file, separator="") == [text]
    cut = list(pieces(resolve(str(file), separator="")))
    assert [begins for begins, _ in cut] == [True] + [False] * (len(cut) - 1)
    assert len(cut) > 3 or block == 64


def test_a_folder_is_searched_sorted_and_its_notes_are_not_its_data(tmp_path):
    for name in ("b.txt", "sub/a.txt", "README.md", ".hidden/c.txt", ".d.txt", "e.csv"):
        write(tmp_path / name, name)
    write(tmp_path / "empty.txt", "")
    assert read(tmp_path) == ["b.txt", "sub/a.txt"]
    assert names(tmp_path / "*.md") == ["README.md"]
    assert names(f"{tmp_path}/**/*.txt") == ["b.txt", "a.txt"]
    assert names(f"{tmp_path / 'sub'}, {tmp_path / 'b.txt'},{tmp_path / 'sub/a.txt'}") == [
        "a.txt",
        "b.txt",
    ]
    (tmp_path / "b.txt").unlink()
    (tmp_path / "sub/a.txt").unlink()
    (tmp_path / "empty.txt").unlink()
    assert names(tmp_path) == ["README.md"]


def test_no_path_is_the_help_topics():
    from pydoc_data.topics import topics

    assert read("") == [topics[name] for name in sorted(topics)]
    assert len(read("")) > 50


def test_paths_that_lead_nowhere(tmp_path):
    write(tmp_path / "data/notes.csv", "a,b")
    missing = refused(lambda: resolve(str(tmp_path / "data/x.txt")))
    assert "no file or folder" in missing
    assert "notes.csv" in missing
    assert ".txt, .md, .jsonl, .parquet, .npy" in refused(lambda: resolve(str(tmp_path / "data")))
    assert "kind that cannot be read" in refused(lambda: resolve(str(tmp_path / "data/notes.csv")))
    assert "matches nothing" in refused(lambda: resolve(str(tmp_path / "*.txt")))
    assert "matches 1 names" in refused(lambda: resolve(str(tmp_path / "data/*")))
    empty = write(tmp_path / "e/empty.txt", "")
    assert "is empty" in refused(lambda: resolve(str(empty)))
    assert "only empty files" in refused(lambda: resolve(str(tmp_path / "e")))
    assert "strict or replace" in refused(lambda: resolve("", errors="ignore"))


def test_bytes_that_are_not_utf8_are_named_by_position(tmp_path, monkeypatch):
    content = "é".encode() + b"abc\xff def\n"
    for name, data, place in (
        ("a.txt", content, 5),
        ("b.txt", b"\xef\xbb\xbf" + content, 8),
        ("c.jsonl", b'{"text": "ok"}\n{"text": "\xe9"}\n', 25),
    ):
        file = write(tmp_path / name, data)
        assert data[place] in (0xFF, 0xE9)
        for block in (1 << 20, 3):
            monkeypatch.setattr("train.data.text.readers.BLOCK", block)
            message = refused(lambda file=file: read(file))
            assert f"byte {place} " in message
            assert str(file) in message
            assert "--config.data.errors=replace" in message
    assert read(tmp_path / "a.txt", errors="replace") == ["éabc\ufffd def\n"]
    assert read(tmp_path / "c.jsonl", errors="replace") == ["ok", "\ufffd"]
    cut_short = write(tmp_path / "d.txt", "ab é".encode()[:-1])
    assert "byte 3 " in refused(lambda: read(cut_short))


def jsonl(path, *lines):
    return write(path, "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))


def test_jsonl_and_its_bad_lines(tmp_path, capsys):
    good = [{"text": "a\nb"}, {"id": 1, "text": "ü"}, {"text": " "}]
    file = jsonl(tmp_path / "a.jsonl", *good, "", '{"text": "cut', {"text": None}, {"text": "end"})
    assert read(file) == ["a\nb", "ü", "end"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"passed over 2 unreadable lines: {file} line 5 is not JSON")
    message = refused(lambda: read(file, max_bad_lines=1))
    assert f"{file} line 6" in message
    assert "max_bad_lines=1" in message
    half = jsonl(tmp_path / "h.jsonl", '{"text": "x\\ud800y"}', {"text": "z"})
    assert read(half) == ["z"]
    assert read(half, errors="replace") == ["x\ufffdy", "z"]


def test_a_field_that_is_not_there(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", {"content": "x", "id": 3})
    message = refused(lambda: read(file))
    assert "'content', 'id'" in message
    assert "--config.data.text_field" in message
    assert read(file, text_field="content") == ["x"]
    assert "no object" in refused(lambda: read(jsonl(tmp_path / "b.jsonl", "[1]")))


def test_parquet_by_row_group(tmp_path):
    texts = [f"document {i} é" for i in range(1000)]
    table = pa.table({"text": [*texts, None, " "], "n": range(1002)})
    file = tmp_path / "a.parquet"
    pq.write_table(table, file, row_group_size=100)
    assert read(file) == texts
    pq.write_table(pa.table({"text": pa.array(["x", "y", "x"]).dictionary_encode()}), file)
    assert read(file) == ["x", "y", "x"]
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), file)
    assert "'body', 'n'" in refused(lambda: read(file))
    assert "holds int64, not text" in refused(lambda: read(file, text_field="n"))
    pq.write_table(pa.table({"text": pa.array([b"ok", b"a\xff"], pa.binary())}), file)
    assert "row 2: byte 1 " in refused(lambda: read(file))
    file.write_bytes(file.read_bytes()[:-30])
    assert f"{file} is not a whole parquet file" in refused(lambda: read(file))


def test_tokens_are_mapped_and_never_mixed_with_text(tmp_path):
    file = tmp_path / "a.npy"
    np.save(file, np.arange(10, dtype=np.uint16))
    [array] = token_arrays(resolve(str(file)))
    assert isinstance(array, np.memmap)
    np.testing.assert_array_equal(array, range(10))
    write(tmp_path / "b.txt", "text")
    assert "mixes tokens" in refused(lambda: resolve(str(tmp_path)))
    for bad, words in (
        (np.zeros((2, 3), np.int32), "int32[2, 3]"),
        (np.zeros(3), "float64[3]"),
        (np.zeros(0, np.int32), "is empty"),
    ):
        np.save(file, bad)
        assert words in refused(lambda: token_arrays(resolve(str(file))))
    file.write_bytes(b"\x93NUMPY no")
    assert "not a whole .npy" in refused(lambda: token_arrays(resolve(str(file))))


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets")

    class LittleTexts(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"text": f"text {i} of {count} é", "n": i}

    folder = tmp_path_factory.mktemp("tfds")
    builder = LittleTexts(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder


def test_a_tfds_set_by_name(tfds_folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    whole = {f"text {i} of 6 é" for i in range(6)}
    assert set(read("tfds:little_texts")) == whole
    assert set(read("tfds:little_texts/train")) == whole
    assert set(read("tfds:little_texts:1.0.0/test")) == {"text 0 of 2 é", "text 1 of 2 é"}
    assert len(read("tfds:little_texts/train[:50%]")) == 3
    assert "'n', 'text'" in refused(lambda: read("tfds:little_texts", text_field="body"))
    assert "is not text" in refused(lambda: read("tfds:little_texts", text_field="n"))
    assert "it has train, test" in refused(lambda: resolve("tfds:little_texts/validation"))
    assert "no 'no_such_set_here'" in refused(lambda: resolve("tfds:no_such_set_here"))
