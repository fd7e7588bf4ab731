"""Saved retrievers: what comes back, what a failed save leaves, and folders that somebody else wrote."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save, save_file

from lorakern import LorakernError
from lorakern.mixture import LoraRetriever
from lorakern.mixture.retriever_files import SETTINGS, VECTORS

NAMES = ["org/math", "späße", "poet"]


class Encoder:
    def __init__(self, identity="one"):
        self.identity = identity

    def __call__(self, texts):
        return torch.tensor([[len(text), text.count("a"), 1.0] for text in texts])


def saved(folder, **options):
    retriever = LoraRetriever(Encoder(), **options)
    for name in ("gone", *NAMES):
        retriever.add(name, [name, name + "aa"])
    retriever.remove("gone")
    retriever.save(folder)
    return retriever


@pytest.mark.parametrize("similarity", ["cosine", "inner_product"])
def test_what_is_saved_comes_back(tmp_path, similarity):
    retriever = saved(tmp_path / "new" / "folder", similarity=similarity, instruction="Say")
    loaded = LoraRetriever.load(tmp_path / "new" / "folder", encoder=Encoder())
    assert loaded.names == retriever.names == NAMES
    assert (loaded.similarity, loaded.instruction, loaded.index) == (similarity, "Say", "exact")
    assert loaded.retrieve(["banana", "x"]) == retriever.retrieve(["banana", "x"])
    loaded.add("new", ["new"])
    loaded.save(tmp_path / "new" / "folder")
    assert LoraRetriever.load(tmp_path / "new" / "folder").names == [*NAMES, "new"]
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == [SETTINGS, VECTORS]


def test_an_empty_one_comes_back(tmp_path):
    LoraRetriever(Encoder()).save(tmp_path)
    loaded = LoraRetriever.load(tmp_path, encoder=Encoder())
    assert len(loaded) == 0
    loaded.add("a", ["a"])
    loaded.remove("a")
    loaded.save(tmp_path)
    assert LoraRetriever.load(tmp_path).names == []


def test_another_encoder_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(LorakernError, match="identity"):
        LoraRetriever.load(tmp_path, encoder=Encoder("two"))
    # an encoder that does not say what it is cannot be told from the right one
    assert LoraRetriever.load(tmp_path, encoder=lambda texts: torch.ones(len(texts), 3)).retrieve(["x"])
    # saved again before any text was encoded, it still says whose embeddings they are
    LoraRetriever.load(tmp_path).save(tmp_path)
    with pytest.raises(LorakernError, match="identity"):
        LoraRetriever.load(tmp_path, encoder=Encoder("two"))


def test_a_save_that_fails_leaves_what_was(tmp_path, monkeypatch):
    saved(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr("lorakern.mixture.retriever_files.MAX_SETTINGS_BYTES", 100)
    with pytest.raises(LorakernError, match="names take"):
        saved(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(LorakernError, match="cannot be saved"):
        saved(tmp_path / "file" / "folder")


def edit(**fields):
    """The settings with other fields; None takes one out."""

    def change(folder):
        known = json.loads((folder / SETTINGS).read_text()) | fields
        (folder / SETTINGS).write_text(json.dumps({k: v for k, v in known.items() if v is not OUT}))

    return change


OUT = object()


def other_vectors(make):
    """Other vectors, with their hash in the settings."""

    def change(folder):
        data = save(make())
        (folder / VECTORS).write_bytes(data)
        edit(sha256=hashlib.sha256(data).hexdigest())(folder)

    return change


def huge_shape(folder):
    """A header that declares a terabyte, and settings that agree with it."""
    header = b'{"embeddings":{"dtype":"F32","shape":[3,65536],"data_offsets":[0,786432]}}'
    (folder / VECTORS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 12)
    edit(dim=65536)(folder)


UNIT = torch.nn.functional.normalize(torch.ones(3, 3), dim=1)
MALFORMED = {
    "no settings": lambda f: (f / SETTINGS).unlink(),
    "no vectors": lambda f: (f / VECTORS).unlink(),
    "settings that are a folder": lambda f: ((f / SETTINGS).unlink(), (f / SETTINGS).mkdir()),
    "vectors that are a folder": lambda f: ((f / VECTORS).unlink(), (f / VECTORS).mkdir()),
    "no JSON": lambda f: (f / SETTINGS).write_text("{"),
    "no object": lambda f: (f / SETTINGS).write_text("[]"),
    "no UTF-8": lambda f: (f / SETTINGS).write_bytes(b'{"a": "\xff"}'),
    "deep JSON": lambda f: (f / SETTINGS).write_text("[" * 100_000),
    "a field twice": lambda f: (f / SETTINGS).write_text('{"dim": 1, "dim": 2}'),
    "no names": edit(names=OUT),
    "another format": edit(format="lorakern.other"),
    "a later version": edit(version=2),
    "a version of true": edit(version=True),
    "an unknown field": edit(pickle="x"),
    "an unknown similarity": edit(similarity="euclid"),
    "an unknown index": edit(index="os.system"),
    "an instruction of null": edit(instruction=None),
    "an encoder of numbers": edit(encoder=3),
    "names that are an object": edit(names={"a": 1}),
    "a name that is no text": edit(names=["a", "b", 3]),
    "a name of control characters": edit(names=["a", "b", "c\u0000"]),
    "a name twice": edit(names=["a", "b", "a"]),
    "an empty name": edit(names=["a", "b", ""]),
    "half a character": edit(names=["a", "b", "\ud800"]),
    "more names than vectors": edit(names=["a", "b", "c", "d"]),
    "a negative width": edit(dim=-3),
    "an enormous width": edit(dim=1 << 40),
    "another width": edit(dim=4),
    "another hash": edit(sha256="0" * 64),
    "vectors cut short": lambda f: (f / VECTORS).write_bytes((f / VECTORS).read_bytes()[:-4]),
    "vectors that are a pickle": lambda f: torch.save({"embeddings": UNIT}, f / VECTORS),
    "no bytes": lambda f: (f / VECTORS).write_bytes(b""),
    "a shape beyond the file": huge_shape,
    "float64": other_vectors(lambda: {"embeddings": UNIT.double()}),
    "another tensor": other_vectors(lambda: {"vectors": UNIT}),
    "a second tensor": other_vectors(lambda: {"embeddings": UNIT, "more": UNIT.clone()}),
    "one dimension": other_vectors(lambda: {"embeddings": torch.ones(9)}),
    "NaN": other_vectors(lambda: {"embeddings": UNIT * float("nan")}),
    "infinity": other_vectors(lambda: {"embeddings": UNIT * float("inf")}),
    "not of norm 1": other_vectors(lambda: {"embeddings": 2 * UNIT}),
    "zeros": other_vectors(lambda: {"embeddings": 0 * UNIT}),
    "vectors of another retriever": lambda f: save_file({"embeddings": UNIT}, f / VECTORS),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_folders_are_refused(tmp_path, what):
    saved(tmp_path)
    MALFORMED[what](tmp_path)
    with pytest.raises(LorakernError, match=rf"{SETTINGS}|{VECTORS}") as error:
        LoraRetriever.load(tmp_path, encoder=Encoder())
    assert len(str(error.value)) < 1000


def test_settings_beyond_their_limit_are_not_parsed(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.setattr("lorakern.mixture.retriever_files.MAX_SETTINGS_BYTES", 100)
    with pytest.raises(LorakernError, match="no retriever"):
        LoraRetriever.load(tmp_path)
