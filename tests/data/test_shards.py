"""Shards: the same images, labels and order as from files, whoever wrote the tar; hostile tars end in one line."""

import io
import json
import os
import random
import tarfile
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from aha.data import ImageFolder, ImageReadError, Part, Shards, fit_labels, identity, images_in, readable
from aha.data import index as index_module
from aha.data import shards as shards_module
from aha.data.tar import members
from aha.source import Source

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def picture(seed, suffix="png"):
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, {"jpg": "jpeg"}.get(suffix, suffix))
    return stream.getvalue()


def pack(path, *files, form=tarfile.GNU_FORMAT):
    """A tar of (name, content), written by the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(number, label, kind="cls", suffix="jpg"):
    key = f"{number:04d}"
    return (f"{key}.{suffix}", picture(number, suffix)), (f"{key}.{kind}", label.encode())


def refused(path, says):
    with pytest.raises(ValueError, match=says) as caught:
        Shards(path)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("form", FORMATS)
def test_members_are_those_of_the_standard_library(tmp_path, form):
    names = ["a.png", "sub/b.png", "c" * 90 + ".png", "d" * 60 + "/" + "e" * 80 + ".png", "dir/"]
    names += ["é.png"] + ([] if form == "ustar" else ["f" * 300 + ".png", "g/" * 150 + "ü.png"])
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name.rstrip("/"))
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = 0 if name.endswith("/") else number * 307
            info.mtime = 1.5  # in pax, a header of its own
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("z.png")
            info.type, info.linkname = kind, "h" * (10 if form == "ustar" else 200)
            tar.addfile(info)
    with open(path, "rb") as file:
        ours = list(members(file.fileno()))
    with tarfile.open(path) as tar:
        theirs = [(info.name, info.offset_data, info.size, info.isreg()) for info in tar]
    assert [(each.name.rstrip("/"), each.start, each.size, each.kind == "a file") for each in ours] == theirs
    assert len(ours) == len(names) + 4


@pytest.mark.parametrize("kind", ["cls", "json", "txt"])
@pytest.mark.parametrize("augment", [False, True])
def test_shards_are_a_folder_of_the_same_images(tmp_path, kind, augment):
    classes = ["ant", "bee", "cat"]
    rows = [(number, classes[number % 3]) for number in range(7)]

    def label(name):
        return json.dumps({"label": name, "width": 16}) if kind == "json" else f"{name}\n"

    for number, name in rows:
        (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name / f"{number:04d}.jpg").write_bytes(picture(number, "jpg"))
    files = [sample(number, label(name), kind) for number, name in rows]
    pack(tmp_path / "shards" / "0000.tar", *files[0], *files[1], ("notes.md", b"x"), *files[2])
    pack(tmp_path / "shards" / "0001.tar", *(reversed(files[3])), *files[4], *files[5], *files[6])
    shards = images_in(tmp_path / "shards", image_size=8, augment=augment, seed=3)
    folder = images_in(tmp_path / "in", image_size=8, augment=augment, seed=3)
    assert (type(shards), type(folder)) == (Shards, ImageFolder)
    assert shards.class_names == folder.class_names == classes
    assert (len(shards), shards.labelled_by) == (7, "names")
    order = {path.stem: place for place, (path, _) in enumerate(folder.samples)}
    for epoch in range(1 + augment):
        for place in range(7):
            one, other = shards[place + 7 * epoch], folder.samples[order[f"{place:04d}"]]
            assert one["label"] == other[1]
            shard = tmp_path / "shards" / ("0000.tar" if place < 3 else "0001.tar")
            assert one["path"] == str(shard / f"{place:04d}.jpg")
            if not augment:
                assert torch.equal(one["image"], folder[order[f"{place:04d}"]]["image"])
    assert shards.virtual_epochs == augment
    with pytest.raises(IndexError):
        shards[-1 if augment else 7]
    again = images_in(tmp_path / "shards", image_size=8, augment=augment, seed=3)
    assert all(torch.equal(again[i]["image"], shards[i]["image"]) for i in reversed(range(7)))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_in_the_workers_of_a_data_loader(tmp_path, method):
    pack(tmp_path / "a.tar", *(file for number in range(6) for file in sample(number, "1")))
    data = readable(Part(Shards(tmp_path, 8), [5, 0, 3, 1, 2, 4]))
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=method)
    images = torch.cat([batch["image"] for batch in loader])
    assert torch.equal(images, torch.stack([data[i]["image"] for i in range(6)]))


def test_labels_meet_a_classifier(tmp_path):
    pack(tmp_path / "a.tar", *sample(0, "n02979186"), *sample(1, "n01440764"))
    clf = SimpleNamespace(num_classes=1000, class_names=None, name="net")
    with pytest.warns(UserWarning, match="2 class names, the classifier has 1000 classes: labels are mapped by wnid"):
        fitted = fit_labels(Part(Shards(tmp_path, 8), [0, 1]), clf)
    assert [item["label"] for item in fitted] == [482, 0]
    pack(tmp_path / "n" / "a.tar", *sample(0, "7"), *sample(1, "2"))
    data = Shards(tmp_path / "n", 8)
    assert (data.labelled_by, data.class_names) == ("numbers", None)
    # numbers in a shard are labels, also where the names of classes are numbers
    clf = SimpleNamespace(num_classes=8, class_names=list("76543210"), name="net")
    assert fit_labels(data, clf) is data
    with pytest.raises(ValueError, match=r"label 7 is not among the classes of net, 0 … 6 .*a.tar/0000.jpg has 7"):
        fit_labels(data, SimpleNamespace(num_classes=7, class_names=None, name="net"))
    assert [label for _, label in Shards(tmp_path / "n", labels=False).samples] == [-1, -1]
    assert Shards(tmp_path / "n", class_names=list("abcdefgh")).class_names == list("abcdefgh")


def test_source_takes_shards_by_looking(tmp_path):
    def of(split=None, **options):
        return Source(data=str(tmp_path), split=split, **options).images((8, 8), training=True, augment=True).data

    pack(tmp_path / "data-train-0.tar", *sample(0, "1"))
    pack(tmp_path / "data-train-1.tar", *sample(1, "1"))
    assert [len(of()), len(of("train"))] == [2, 2]
    pack(tmp_path / "data-validation-0.tar", *sample(2, "1"))
    with pytest.raises(ValueError, match="holds shards of train and validation: pass split='train'"):
        of()
    assert [len(of("train")), len(of("validation"))] == [2, 1]
    assert of("train").augment
    with pytest.raises(FileNotFoundError, match="no split 'dev'"):
        of("dev")
    with pytest.raises(ValueError, match="for which no masks are read"):
        Source(data=str(tmp_path), split="train", masks=tmp_path).images((8, 8), training=False)
    pack(tmp_path / "test" / "0.tar", *sample(3, "1"))
    assert of("test").folder == tmp_path / "test"
    (tmp_path / "test" / "a.png").write_bytes(picture(0))
    assert isinstance(of("test"), ImageFolder)
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="no shards in"):
        Shards(tmp_path / "none")
    with pytest.raises(ValueError, match="leads out of"):
        of("..")


def test_identity_tells_what_changed(tmp_path):
    def now(content=True, **options):
        return identity(Shards(tmp_path / "in", 8, **options), content)

    def write(*files):
        pack(tmp_path / "in" / "a.tar", *files)

    write(*sample(0, "1"), *sample(1, "2"))
    content, listing = now(), now(False)
    assert (now(), now(False)) == (content, listing)
    assert content != listing
    write(*sample(0, "1"), *sample(1, "3"))
    assert now(False) != listing
    other = picture(5, "bmp")
    write(("0000.bmp", picture(0, "bmp")), ("0001.bmp", other))
    content, listing = now(), now(False)
    write(("0000.bmp", picture(1, "bmp")), ("0001.bmp", other))
    assert now(False) == listing  # the same sizes
    assert now() != content
    assert identity(Part(Shards(tmp_path / "in", 8), [1])) == identity(Part(Shards(tmp_path / "in", 8), [1]))
    kept = now()
    (tmp_path / "in").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "in")
    assert now() == kept
    assert now(augment=True) != kept


def test_headers_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_module, "WORTH", 1)
    monkeypatch.setattr(index_module, "SETTLED", -(10**18))
    for number in range(3):
        pack(tmp_path / "in" / f"{number}.tar", *sample(number, "1"))
    before = Shards(tmp_path / "in", 8)
    seen, read = [], shards_module._listed
    monkeypatch.setattr(shards_module, "_listed", lambda path: seen.append(path.name) or read(path))
    again = Shards(tmp_path / "in", 8)
    assert seen == []
    assert again.samples == before.samples
    assert torch.equal(again[1]["image"], before[1]["image"])
    pack(tmp_path / "in" / "1.tar", *sample(7, "1"), *sample(8, "2"))
    assert len(Shards(tmp_path / "in", 8)) == 4
    assert seen == ["1.tar"]
    with pytest.raises(ImageReadError, match=r"1.tar/0001.jpg: its shard has changed since it was listed"):
        before[1]
    (tmp_path / "in" / "0.tar").unlink()
    with pytest.raises(ImageReadError, match=r"0.tar/0000.jpg: No such file"):
        before[0]


def test_members_outside_the_contract_are_left_out_and_said(tmp_path):
    image = picture(0)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in (
            "/abs.png",
            "../up.png",
            "x/../../up.png",
            "new\nline.png",
            "./fine.png",
            "._fine.png",
            ".h/b.png",
        ):
            info = tarfile.TarInfo(name)
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE):
            info = tarfile.TarInfo("z.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    with pytest.warns(UserWarning, match="left out") as warned:
        data = Shards(tmp_path, 8)
    (said,) = [str(each.message) for each in warned]
    assert said.startswith("members of shards left out: 9; the first, of ")
    assert said.endswith("a.tar, is /abs.png (its name is absolute)")
    assert [path.name for path, _ in data.samples] == ["fine.png"]
    assert data[0]["image"].shape == (3, 8, 8)


def header(name=b"a.png", size=b"00000000000\0", kind=b"0", magic=b"ustar\x0000"):
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136] = size
    block[156:157] = kind
    block[257:265] = magic
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)
HUGE = b"\x80" + (1 << 60).to_bytes(11, "big")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cut off: it has 0 bytes, and no mark of its end"),
        (b"x" * 2000, "it is not a tar file"),
        (b"\x1f\x8b" + b"x" * 600, "compressed with gzip"),
        (b"BZh9" + b"x" * 600, "compressed with bzip2"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 600, "compressed with zstd"),
        (header(size=HUGE) + END, "cut off"),
        (header(size=b"-0000000001\0") + END, "not a tar file"),
        (header(size=b"\xff" * 12) + END, "not a tar file"),
        (header() + header(size=b"77777777777\0"), "cut off"),
        (header(), "no mark of its end"),
        (header() + b"x" * 512 + END, "damaged: there is no header at byte 512"),
        (header(kind=b"S") + END, "sparse"),
        (header(kind=b"L", size=b"00010000000\0") + bytes(1 << 21) + END, "a header of 2097152 bytes"),
        (header(kind=b"x", size=b"00000000012\0") + b"9" * 10 + bytes(502) + END, "pax header at byte 512"),
        (header(kind=b"x", size=b"00000000012\0") + b"0 a=b\n    " + bytes(502) + END, "pax header at byte 512"),
        (header(kind=b"x", size=b"00000000013\0") + b"11 size=-1\n" + bytes(501) + header() + END, "pax header"),
        (header() + header(b"a.jpg") + END, "a has two images, a.png and a.jpg: leave one"),
    ],
)
def test_tars_that_are_none(tmp_path, content, says):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    assert str(refused(tmp_path, says)).startswith(f"cannot read shard {path}: ")


def test_a_shard_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    refused(tmp_path, "a.tar: it is not a file")


@pytest.mark.parametrize(
    ("kind", "label", "says"),
    [
        ("txt", "a cat\non a mat", "its .txt is not a label of one line"),
        ("txt", "x" * 301, "its .txt is not a label of one line"),
        ("cls", "\xff\xfe", "label"),
        ("cls", "7.5", "not an integer"),
        ("cls", "-2", "not an integer"),
        ("json", "{", "its .json cannot be read"),
        ("json", '{"label": [1]}', "its .json cannot be read"),
        ("json", '{"label": true}', "its .json cannot be read"),
        ("json", "[" * 100_000, "its .json cannot be read"),
        ("txt", "x" * 2_000_000, "2000000 bytes"),
    ],
)
def test_labels_that_are_none(tmp_path, kind, label, says):
    files = sample(0, label, kind)
    if label == "\xff\xfe":
        files = files[0], ("0000.cls", b"\xff\xfe")
    pack(tmp_path / "a.tar", *files, *sample(1, "3", "cls"))
    refused(tmp_path, says)
    assert len(Shards(tmp_path, labels=False)) == 2


def test_images_without_a_label_are_said(tmp_path):
    pack(tmp_path / "a.tar", *sample(0, "3"), ("0001.jpg", picture(1, "jpg")), *sample(2, '{"width": 3}', "json"))
    with pytest.warns(UserWarning, match="2 of 3 images have no label: the first of them is in .*a.tar"):
        assert [label for _, label in Shards(tmp_path).samples] == [3, -1, -1]
    pack(tmp_path / "a.tar", ("0001.jpg", picture(1, "jpg")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Shards(tmp_path).labelled_by is None


def outcome_of(folder):
    """What becomes of the shards in a folder; all else is an exception."""
    try:
        data = Shards(folder, 8)
    except (ImageReadError, ValueError, FileNotFoundError) as error:
        return str(error), []
    lines = []
    for index in range(len(data)):
        try:
            assert torch.isfinite(data[index]["image"]).all()
        except ImageReadError as error:
            lines.append(str(error))
    return "", lines


def test_damaged_tars_end_in_one_line_or_in_fewer_images(tmp_path):
    files = [file for number in range(3) for file in sample(number, "1")]
    path = pack(tmp_path / "a.tar", *files, ("k" * 200 + ".png", picture(9)), form=tarfile.PAX_FORMAT)
    whole = path.read_bytes()
    content = len(whole.rstrip(b"\0"))
    rng = random.Random(0)
    refusals = unreadable = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for turn in range(1000):
            if turn % 3:
                damaged = bytearray(whole)
                for _ in range(rng.randint(1, 4)):
                    damaged[rng.randrange(content)] ^= 1 << rng.randrange(8)
            else:
                damaged = whole[: rng.randrange(len(whole))]
            path.write_bytes(damaged)
            refusal, lines = outcome_of(tmp_path)
            assert all("\n" not in line and str(tmp_path) in line for line in [refusal, *lines] if line)
            if not turn % 3 and len(damaged) < content:
                assert refusal.startswith("cannot read shard ")
            refusals += bool(refusal)
            unreadable += len(lines)
    assert refusals > 300
    assert unreadable > 50
