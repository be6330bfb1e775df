"""Files of every kind that is read, damaged or edited, for tests/fuzz.py.

`spoilt` is what a disk or a cut connection does to bytes, `edited` what a person does to JSON: its checksum is made
anew, so that the checks behind it are reached too.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
import struct
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image

import aha
from aha import files, plan, weights
from aha.data.index import Index, _state
from aha.evaluation import engine
from aha.explainer.config import ExplainerConfig
from aha.lock import held
from aha.metrics import Suite
from aha.store import Memory, Packs
from aha.training import checkpoint

from .kernels.fuzz import Draw
from .toys import TINY_DECODER, tiny_classifier

if TYPE_CHECKING:
    from .fuzz import World

# in place of an entry of a file of JSON
ENTRIES = (
    None, True, False, 0, 1, 2, 3, -1, 0.5, -0.5, 1e308, float("nan"), float("inf"), 10**9, 2**63, 2**70, -(2**63),
    "", "x", "3", "é🙂", "\0", "a\nb", "x" * 5000, "../x", "/etc/passwd", "hf:x", "local-dir:..", "timm",
    [], [1], [[]], [1, 2], [0, 0], [-1, 2], ["x"], [None], [1e300, 1e300], list(range(3000)),
    {}, {"a": 1}, {"a": {"b": []}}, {"": None},
)  # fmt: skip


NUMBERS = (bytes(8), b"\xff" * 4, b"\xff" * 8, b"\x7f" + b"\xff" * 7)
PLAIN = (b"{}", b"[]", b"null", b"1", b"x,y\n", b"\n", b"\xef\xbb\xbf{}", b"[" * 100_000, b'"')


class Reader(NamedTuple):
    """A file and who reads it.

    Attributes:
        content: as it was written.
        read: what is read of other content; an error, where it is refused.
        spoil: how other content is made.
        same: whether whatever is read must be what was written, for a checksum shows the rest.
        share: see `tests.fuzz.Case`.
        named: whether a refusal names the file, which is in the world's folder.
    """

    content: bytes
    read: Callable[[bytes], Any]
    spoil: Callable[[Draw, bytes], bytes]
    same: bool = False
    share: float = 1.0
    named: bool = True


def spoilt(draw: Draw, content: bytes) -> bytes:
    """Bytes flipped, cut, lost, doubled, in another order, of another file."""
    at, other = sorted(draw.between(0, len(content)) for _ in range(2))
    ways: dict[str, Callable[[], bytes]] = {
        "bit": lambda: _set(content, at, lambda byte: byte ^ 1 << draw.between(0, 7)),
        "bits": lambda: _flips(draw, content, draw.one(2, 5, 50)),
        "byte": lambda: _set(content, at, lambda byte: draw.between(0, 255)),
        "beginning": lambda: _set(content, draw.between(0, min(200, len(content))), lambda byte: draw.between(0, 255)),
        "cut": lambda: content[:at],
        "cut at the end": lambda: content[: -draw.between(1, 20)],
        "without the beginning": lambda: content[at:],
        "lost": lambda: content[:at] + content[other:],
        "zeros": lambda: content[:at] + bytes(other - at) + content[other:],
        "doubled": lambda: content[:at] + content[at:other] + content[at:],
        "twice": lambda: content + content,
        "moved": lambda: content[other:] + content[at:other] + content[:at],
        "more": lambda: content + draw.random.randbytes(draw.between(1, 50)),
        "number": lambda: content[:at] + draw.one(*NUMBERS) + content[at + 8 :],
        "noise": lambda: draw.random.randbytes(draw.between(1, 300)),
        "text": lambda: draw.one(*PLAIN),
        "empty": lambda: b"",
    }  # fmt: skip
    return ways[draw.one(*ways)]()


def _set(content: bytes, at: int, change: Callable[[int], int]) -> bytes:
    at = min(at, len(content) - 1)
    return content[:at] + bytes([change(content[at]) & 255]) + content[at + 1 :]


def _flips(draw: Draw, content: bytes, count: int) -> bytes:
    for _ in range(count):
        content = _set(content, draw.between(0, len(content) - 1), lambda byte: byte ^ 1 << draw.between(0, 7))
    return content


def changed(draw: Draw, content: Any) -> Any:
    """JSON of which an entry or two are others, missing or in the place of one another."""
    root = [json.loads(json.dumps(content))]
    for _ in range(draw.one(1, 1, 1, 2, 3)):
        places = list(_places(root))
        inside, key = draw.one(*places)
        way = draw.one("other", "other", "other", "missing", "swapped", "more")
        if way == "missing" and inside is not root:
            del inside[key]
        elif way == "swapped":
            there, at = draw.one(*places)
            inside[key], there[at] = json.loads(json.dumps([there[at], inside[key]]))
        elif way == "more" and isinstance(inside[key], dict):
            inside[key][draw.one("x", "", "weights", "options", "checkpoint_path")] = draw.one(*ENTRIES)
        elif way == "more" and isinstance(inside[key], list):
            inside[key].append(draw.one(*ENTRIES))
        else:
            inside[key] = draw.one(*ENTRIES)
    return root[0]


def _places(inside: Any) -> Any:
    """(dict or list, key) of every entry."""
    for key in list(inside) if isinstance(inside, dict) else range(len(inside)):
        yield inside, key
        if isinstance(inside[key], (dict, list)):
            yield from _places(inside[key])


def edited(draw: Draw, content: bytes) -> bytes:
    """`changed` of a file of JSON, with a checksum that fits."""
    plain = json.loads(content)
    signed = isinstance(plain, dict) and plain.pop(files.CHECKSUM, None)
    plain = changed(draw, plain)
    if signed and isinstance(plain, dict):
        plain[files.CHECKSUM] = files._of_json(plain)
    return json.dumps(plain).encode()


def _tensors(draw: Draw, content: bytes) -> bytes:
    """A file of safetensors with a header that was edited, or other tensors in it."""
    size = struct.unpack("<Q", content[:8])[0]
    if draw.chance(0.5):
        header = json.dumps(changed(draw, json.loads(content[8 : 8 + size]))).encode()
        return struct.pack("<Q", draw.one(len(header), len(header), len(header) + 1)) + header + content[8 + size :]
    found = safetensors.torch.load(content)
    for name in draw.random.sample(sorted(found), draw.one(1, 1, 2)):
        value = found.pop(name)
        numbers = value.is_floating_point()
        others = [value[None], value.flatten(), value[:0] if value.ndim else value, torch.zeros(3), None]
        others += [value.half(), value.long(), value.double(), torch.full_like(value, torch.nan if numbers else -1)]
        if (other := draw.one(*others)) is not None:
            found[name] = other.contiguous().clone()
    return safetensors.torch.save(found)


def _array(draw: Draw, array: np.ndarray) -> np.ndarray:
    """Of another shape or type, or with other values."""
    number = array.dtype.kind in "fi"
    ways = [
        lambda: array[..., None],
        lambda: array[:-1] if array.ndim else array,
        lambda: array[:0] if array.ndim else array,
        lambda: np.concatenate([array, array]) if array.ndim else array,
        lambda: array.reshape(-1)[::-1].reshape(array.shape),
        lambda: array.astype(draw.one("float16", "float64", "int8", "U3", "bool") if number else "U1"),
        lambda: np.array(draw.one(0, -1, 0.5, "x", True)),
        lambda: np.full_like(array, draw.one(-1, 0, 1, 100) if number else draw.one("", "x", "-1", "1 x", "\0a\n")),
        lambda: np.full_like(array, draw.one(np.nan, np.inf, 1e300)) if array.dtype.kind == "f" else array,
    ]
    with np.errstate(all="ignore"):
        try:
            return draw.one(*ways)()
        except ValueError:  # a text as a number
            return array[..., None]


class Foreign:
    """A store of which one piece is no longer what it was: named arrays of other shapes, types or values.

    >>> Foreign(pieces, draw)  # a Store
    """

    keeps_maps = True

    def __init__(self, kept: Mapping[tuple[str, ...], Any], draw: Draw | None):
        self.kept = dict(kept)
        if draw is None:
            return
        key = draw.one(*sorted(self.kept))
        piece = dict(self.kept[key])
        for name in draw.random.sample(sorted(piece), min(len(piece), draw.one(1, 1, 2))):
            piece[name] = _array(draw, piece[name])
        if draw.chance(0.1):
            piece.pop(draw.one(*sorted(piece)))
        self.kept[key] = piece

    def get(self, key: tuple[str, ...]) -> Any:
        return self.kept.get(key)

    def put(self, pieces: Mapping) -> None:
        self.kept.update(pieces)

    def refresh(self) -> None:
        pass


def _image(kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def shard() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        long = "deep/" + "x" * 150
        members = {"a.png": _image("PNG"), "a.cls": b"1", "b.jpg": _image("JPEG"), "b.json": b'{"label": 2}'}
        members |= {f"{long}.png": _image("PNG"), f"{long}.txt": b" 3\n"}
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return content.getvalue()


def _headers(draw: Draw, content: bytes) -> bytes:
    """A tar file with a field of a header set, and the header's sum as it should be."""
    starts = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    at = draw.one(*starts)
    header = bytearray(content[at : at + 512])
    field, size = draw.one((0, 100), (100, 8), (124, 12), (124, 12), (156, 1), (157, 100), (345, 155))
    values = (
        b"", b"0", b"7" * size, b"-1", b"../x.png", b"/x.png", b"a\n.png", b"\xff" * size, b"\x80" + b"\xff" * 11,
        b"\x80" + b"\0" * 10 + b"\x09", b"L", b"K", b"x", b"g", b"S", b"2", b"5", b"Z", b"a.png", b"\0",
    )  # fmt: skip
    header[field : field + size] = draw.one(*values)[:size].ljust(size, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + 512 :]


def _read_all(data: Any) -> list[Any]:
    """Every item that can be read, and the message for the others."""
    found: list[Any] = []
    for place in range(len(data)):
        try:
            found.append(data[place])
        except aha.data.ImageReadError as error:
            text = str(error)
            assert text and "\n" not in text and len(text) < 2000, text
    return found


def readers(w: World) -> dict[str, Reader]:
    """By the name of what reads, and in brackets what is damaged."""
    made = itertools.count()

    def folder() -> Path:
        path = w.folder / "files" / str(next(made))
        path.mkdir(parents=True)
        return path

    def of(name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
        """``read`` of a file of that name, alone in a folder."""

        def at(content: bytes) -> Any:
            path = folder() / name
            path.write_bytes(content)
            return read(path)

        return at

    def beside(source: Path, name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
        """``read`` of a folder as ``source``, of which that file is another."""
        copy = folder()
        for file in source.iterdir():
            if file.is_file() and file.name != name:
                os.link(file, copy / file.name)

        def at(content: bytes) -> Any:
            (copy / name).unlink(missing_ok=True)
            (copy / name).write_bytes(content)
            return read(copy)

        return at

    found: dict[str, Reader] = {}

    def add(reads: str, what: str, content: bytes | Path, read: Callable[[bytes], Any], **how: Any) -> None:
        spoil = how.pop("spoil", spoilt)
        content = content.read_bytes() if isinstance(content, Path) else content
        found[f"{reads}({what})"] = Reader(content, read, spoil, **how)

    # an explainer
    saved = w.explainer.save_pretrained(folder())
    state = saved / "decoder.safetensors"
    unsigned = folder()
    config = {key: value for key, value in json.loads((saved / "config.json").read_text()).items() if key != "sha256"}
    (unsigned / "decoder.safetensors").write_bytes(state.read_bytes())
    (unsigned / "config.json").write_text(json.dumps({key: x for key, x in config.items() if key != "weights"}))

    def explainer(path: Path) -> Any:
        return aha.Explainer.from_pretrained(path, w.clf).decoder.state_dict()

    name = "aha.Explainer.from_pretrained"
    add(name, "config.json", saved / "config.json", beside(saved, "config.json", explainer), same=True, share=0.3)
    add(name, "weights", state, beside(saved, "decoder.safetensors", explainer), same=True, share=0.3)
    add(name, "config.json, edited", saved / "config.json", beside(saved, "config.json", explainer), spoil=edited)
    made_again = folder() / "test_vit.safetensors"
    network = timm.create_model("test_vit", num_classes=3)
    made_again.write_bytes(safetensors.torch.save(network.state_dict()))
    known = aha.Classifier.from_timm("test_vit", weights=made_again, num_classes=3)
    named = aha.Explainer.build(known, evidence=False, decoder=TINY_DECODER).save_pretrained(folder())
    again = beside(named, "config.json", lambda path: aha.Explainer.from_pretrained(path).settings)
    add(name, "config.json, edited, and no classifier", named / "config.json", again, spoil=edited, share=0.3)
    by_name = beside(unsigned, "decoder.safetensors", explainer)
    add(name, "weights without a checksum, edited", state, by_name, spoil=_tensors, share=0.5)
    schema = lambda content: ExplainerConfig.from_json(_object(content), saved)  # noqa: E731
    plain = json.dumps(config).encode()
    add("aha.explainer.config.ExplainerConfig.from_json", "edited", plain, schema, spoil=edited, share=2.0, named=False)

    # a checkpoint, of an optimizer that has stepped
    decoder = tiny_classifier(3).module
    decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters())
    sum(p.sum() for p in decoder.parameters()).backward()
    optimizer.step()
    curves = {"total": torch.rand(2, 4), "images": 3}
    mean = {"mean": {"weight": torch.rand(3)}, "steps": 2}
    plain_made = {"seed": 1, "data": {"size": 4}}
    states = decoder.state_dict(), optimizer.state_dict(), curves, mean
    kept = checkpoint.save(folder(), checkpoint.Checkpoint("run", 3, plain_made, *states))

    def checked(path: Path) -> Any:
        return {key: value for key, value in vars(checkpoint.load(path)).items() if key != "version"}

    name = "aha.training.checkpoint.load"
    add(name, "run.json", kept / "run.json", beside(kept, "run.json", checked), same=True)
    tensors = "state.safetensors"
    add(name, tensors, kept / tensors, beside(kept, tensors, checked), same=True)
    add(name, "run.json, edited", kept / "run.json", beside(kept, "run.json", checked), spoil=edited)

    # pieces
    pack = folder()
    arrays = {"value": np.linspace(0, 1, 6).reshape(2, 3), "name": np.array(["a", "é"])}
    keys = [("row", "maps", f"{number:06d}") for number in range(3)]
    store = Packs(pack)
    for number, key in enumerate(keys):
        store.put({key: {**arrays, "number": np.array([number])}})

    def sound(path: Path) -> Any:
        """What is left of the pieces, and the same after another was put: none of them is another's."""
        read = Packs(path)
        whole = {key: piece for key in keys if (piece := read.get(key)) is not None}
        for key, piece in whole.items():
            assert piece["number"].tolist() == [keys.index(key)] and piece["name"].tolist() == ["a", "é"]
            assert (piece["value"] == arrays["value"]).all()
        read.put({("more",): arrays})
        after = Packs(path)
        assert after.get(("more",)) is not None and all(after.get(key) is not None for key in whole)
        return None

    def packs(content: bytes) -> Any:
        path = folder()
        (path / "0000-0000.pack").write_bytes(content)
        return sound(path)

    add("aha.store.Packs", "a pack", pack / "0000-0000.pack", packs)

    # pieces that are sound as records, and not what an evaluation wrote
    clf, scenes = tiny_classifier(10), aha.data.Scenes("val", 4, image_size=32)
    short = Suite(clf, dataclasses.replace(aha.metrics.PROTOCOLS["aha"], points=3))
    rows = [engine.Row(name, name, aha.attributors.create(name, clf)) for name in ("input_x_gradient", "random")]
    whole = Memory()
    evaluation = engine.Engine(clf, rows, scenes, range(4), "predicted", {"short": short}, 2, whole)
    evaluation.run()

    def measured(content: bytes) -> Any:
        store = Foreign(whole._pieces, Draw(content.hex()) if content else None)
        found = dataclasses.replace(evaluation.pieces, store=store)
        result = found.result(seed=0)
        maps = [found.maps(row.name, [0, 3]) for row in rows]
        assert all(part is None or part.shape == (2, 1, 32, 32) for part in maps)
        return result.summary()

    # what is changed is the pieces in the store, by a number
    seed = lambda draw, _: draw.random.randbytes(8)  # noqa: E731
    add("aha.evaluation.pieces.Pieces", "of other arrays", b"", measured, spoil=seed, share=0.5, named=False)

    # tables
    key = aha.evaluation.Key("c", "predicted", "m", "aha", "", "deletion")
    records = aha.evaluation.Records()
    records.add(key, [0, 1, 2], [0.5, 0.25, 1e-3])
    records.add(key._replace(metric="insertion"), [0, 1, 2], [0.5, float("nan"), -1.0])
    table = records.write(folder())

    def rows_of(path: Path) -> Any:
        read = aha.evaluation.Records.read(path)
        return {key: (part.images, part.values) for key, part in read.items()}

    name = "aha.evaluation.Records.read"
    add(name, "scores.parquet", table, beside(table.parent, table.name, rows_of), same=True)
    add(name, "scores.parquet without a checksum", table, of(table.name, lambda path: rows_of(path.parent)))
    text = io.StringIO(newline="")
    lines = csv.writer(text)
    lines.writerow([*aha.evaluation.Key._fields, "image", "value"])
    lines.writerows([*key, image, value] for image, value in ((0, 0.5), (1, ""), (2, 1e-3)))
    csv_file = text.getvalue().encode()
    add(name, "scores.csv", csv_file, of("scores.csv", lambda path: rows_of(path.parent)))
    columns = lambda path: files.read_columns(path.with_name("t"))  # noqa: E731
    add("aha.files.read_columns", "parquet", table, of("t.parquet", columns))
    add("aha.files.read_columns", "csv", csv_file, of("t.csv", columns))
    summed = table.with_name(f"{table.name}.sha256")
    add("aha.files.read_columns", "checksum", summed, beside(table.parent, summed.name, rows_of), same=True)
    digest = files.digest(csv_file)
    add("aha.files.read_checked", "a file", csv_file, of("x", lambda path: files.read_checked(path, digest)), same=True)

    # JSON
    signed = folder() / "x.json"
    files.write_json(signed, {"a": [1, 2.5, {"b": None}], "é": "x"})
    strict = of("x.json", lambda path: files.read_json(path, required=True))
    add("aha.files.read_json", "required", signed, strict, same=True)
    add("aha.files.read_json", "a file", signed, of("x.json", files.read_json))
    step = plan.StepTime("cpu", "fp32", "2", "c", "e", 4, 3, 2, 1e-3, 2.0, 1e-3, 1e-3, (0.1, 0.2), 0.1)
    timed = json.dumps({"measured": dataclasses.asdict(step)}).encode()
    add("aha.plan.step_from_json", "a file", timed, of("x.json", plan.step_from_json))
    add("aha.plan.step_from_json", "edited", timed, of("x.json", _planned), spoil=edited, share=2.0)

    # images, alone, labelled, in shards
    data = folder()
    (data / "a.png").write_bytes(_image("PNG"))
    (data / "b.png").write_bytes(_image("PNG"))
    labelled = lambda path: aha.data.ImageFolder(path, 16).samples  # noqa: E731
    add("aha.data.ImageFolder", "labels.csv", b"file,label\na.png,1\nb.png,2\n", beside(data, "labels.csv", labelled))
    for kind, options in KINDS.items():
        load = lambda path: aha.data.load_image(path, 16)  # noqa: E731
        add("aha.data.load_image", kind, _image(kind, **options), of("a.png", load))
    photograph = of("a.png", lambda path: aha.data.Photograph(path).view(16).inputs)
    add("aha.data.Photograph", "JPEG", _image("JPEG"), photograph, share=0.5)
    shards = of("a.tar", lambda path: _read_all(aha.data.Shards(path.parent, 16)))
    add("aha.data.Shards", "a shard", shard(), shards)
    add("aha.data.Shards", "headers", shard(), shards, spoil=_headers, share=2.0)
    either = of("a.tar", lambda path: _read_all(aha.data.images_in(path.parent)))
    add("aha.data.images_in", "a shard", shard(), either, share=0.3)

    def listing(content: bytes) -> Any:
        file = Index("folders", data)._file
        assert file is not None
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return [str(path) for path in aha.data.find_images(data)]

    listed = [_state(str(data)), {"files": "a.png/b.png", "folders": "", "links": ""}]
    index = json.dumps({os.path.realpath(data): listed}, separators=(",", ":")).encode()
    head = f"aha index 1 {hashlib.sha256(index).hexdigest()}\n".encode()
    add("aha.data.index.Index", "a listing", head + index, listing, same=True)

    # weights, and who holds a folder
    state_dict = w.clf.module.state_dict()
    content = io.BytesIO()
    torch.save(state_dict, content)
    old = io.BytesIO()
    torch.save(state_dict, old, _use_new_zipfile_serialization=False)
    tensors_of = lambda path: weights.read_weights(path)[0]  # noqa: E731
    add("aha.weights.read_weights", "torch.save", content.getvalue(), of("x.pth", tensors_of), share=0.5)
    add("aha.weights.read_weights", "torch.save before 1.6", old.getvalue(), of("x.bin", tensors_of), share=0.5)
    plain = safetensors.torch.save(state_dict)
    add("aha.weights.read_weights", "safetensors", plain, of("x.safetensors", tensors_of))
    loaded = of("x.safetensors", lambda path: weights.load_weights(tiny_classifier().module, tensors_of(path), path))
    add("aha.weights.load_weights", "edited", plain, loaded, spoil=_tensors)

    def lock(path: Path) -> Any:
        with held(path.parent):
            return sorted(file.name for file in path.parent.iterdir())

    add("aha.lock.held", "a lock file", f"host {os.getpid()}\n".encode(), of(".lock", lock), same=True)
    return found


KINDS: dict[str, dict[str, Any]] = {
    "PNG": {}, "JPEG": {}, "WEBP": {}, "BMP": {}, "GIF": {}, "TIFF": {"compression": "tiff_lzw"}, "PPM": {},
    "JPEG2000": {}, "TGA": {},
}  # fmt: skip


def _object(content: bytes) -> Any:
    found = json.loads(content)
    return found if isinstance(found, dict) else {}


def _planned(path: Path) -> Any:
    """What is made of a measured step by whoever reads one."""
    step = plan.step_from_json(path)
    plan.Plan(measured=step).to_json()
    assert len(step.spread) == 2
    return plan._assumed(step, aha.TrainConfig())
