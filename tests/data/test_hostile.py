"""Hostile data: what is no image is refused in one line, in little time and memory, and nothing leaves its folder."""

import csv
import io
import os
import random
import resource
import struct
import subprocess
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from aha.data import ImageFolder, ImageReadError, Photograph, find_images, identity, load_image
from aha.data import images as images_module
from aha.data.images import shown


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *extra, data=b""):
    """1 bit per pixel."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def gif(screen, frame):
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\x00;"


def tiff(**changes):
    """64×64, grey, one strip; tags by number, (kind, count, value)."""
    tags = {256: (4, 1, 64), 257: (4, 1, 64), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1)}
    tags |= {273: (4, 1, 200), 278: (4, 1, 64), 279: (4, 1, 4096)}
    tags |= {int(name[1:]): value for name, value in changes.items()}
    entries = b"".join(struct.pack("<HHII", tag, *value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + bytes(8192)


def bmp(width, height, compression=0):
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + head + bytes(1024)


def saved(kind, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def jpeg(width, height):
    whole = saved("JPEG")
    at = whole.index(b"\xff\xc0") + 5
    return whole[:at] + struct.pack(">HH", height, width) + whole[at + 4 :]


SMALL = zlib.compress(bytes(16))
TEXT = zlib.compress(bytes(200_000_000), 9)
BOMBS = {
    "long.png": png(40_000_000, 1, data=zlib.compress(bytes(5_000_001), 9)),
    "square.png": png(2**31 - 1, 2**31 - 1),
    "ztxt.png": png(8, 8, *[chunk(b"zTXt", b"a%d\0\0" % i + TEXT) for i in range(5)], data=SMALL),
    "itxt.png": png(8, 8, *[chunk(b"iTXt", b"a%d\0\1\0\0\0" % i + TEXT) for i in range(5)], data=SMALL),
    "iccp.png": png(8, 8, chunk(b"iCCP", b"a\0\0" + TEXT), data=SMALL),
    "text.png": png(8, 8, *[chunk(b"tEXt", b"a%d\0" % i + b"x" * 900_000) for i in range(90)], data=SMALL),
    "screen.gif": gif((65535, 65535), (8, 8)),
    "frame.gif": gif((8, 8), (65535, 65535)),
    "wide.tif": tiff(t256=(4, 1, 2**32 - 1)),
    "count.tif": tiff(t273=(4, 2**32 - 1, 8)),
    "samples.tif": tiff(t277=(3, 1, 65535)),
    "tile.tif": tiff(
        t259=(3, 1, 5), t322=(4, 1, 2**31 - 16), t323=(4, 1, 2**31 - 16), t324=(4, 1, 200), t325=(4, 1, 99)
    ),
    "rows.tif": tiff(t259=(3, 1, 8), t278=(4, 1, 2**32 - 1), t279=(4, 1, 2**32 - 1)),
    "size.bmp": bmp(2**31 - 1, 2**31 - 1),
    "upside.bmp": bmp(5, -(2**31)),
    "runs.bmp": bmp(12000, 12000, compression=1),
    "digits.ppm": b"P6 99999999999999999999 1 255\n",
    "cut.ppm": b"P6 9000 9000 255\n",
    "header.ppm": b"P6 " + b"1" * 10_000_000,
    "plain.ppm": b"P3 9 9 255\n" + b"1" * 10_000_000,
    "large.jpg": jpeg(65535, 65535),
    "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n/x 1 def\n%%EOF\n",
    "empty.png": b"",
    "text.jpg": b"hello",
}
CHILD = """
import resource, sys, warnings
from pathlib import Path
from PIL import Image
from aha.data import Photograph, load_image
from aha.data.images import ImageReadError, open_mask
warnings.simplefilter("ignore")
image = Path(sys.argv[1])
load_image(image / "good.png", 16), Photograph(image / "good.png"), open_mask(image / "good.png", 16, (20, 24))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 700_000_000,) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(image.glob("bombs/*")):
    for read in (lambda: load_image(path, 16), lambda: Photograph(path).view(16), lambda: open_mask(path, 16, (8, 8))):
        try:
            read()
        except ImageReadError as error:
            print(error)
        else:
            print("read:", path)
load_image(image / "good.png", 16)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_bombs_are_refused_in_little_memory(tmp_path):
    (tmp_path / "bombs").mkdir()
    (tmp_path / "good.png").write_bytes(saved("PNG"))
    for name, content in BOMBS.items():
        (tmp_path / "bombs" / name).write_bytes(content)
    start = time.monotonic()
    child = [sys.executable, "-c", CHILD, str(tmp_path)]
    done = subprocess.run(child, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *lines, megabytes = done.stdout.splitlines()
    assert len(lines) == 3 * len(BOMBS)
    for line, name in zip(lines, np.repeat(sorted(BOMBS), 3), strict=True):
        assert line.startswith(f"cannot read image {tmp_path / 'bombs' / str(name)}: "), line
    assert int(megabytes) < 250
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_the_largest_images_take_bounded_memory(tmp_path):
    side = 13_300
    (tmp_path / "bombs").mkdir()
    (tmp_path / "good.png").write_bytes(saved("PNG"))
    (tmp_path / "bombs" / "a.png").write_bytes(png(side, side, data=zlib.compress(bytes((side // 8 + 2) * side), 9)))
    child = [sys.executable, "-c", CHILD.replace("700_000_000", "1_600_000_000"), str(tmp_path)]
    *lines, megabytes = subprocess.run(child, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line[:5] for line in lines] == ["read:"] * 3
    assert int(megabytes) < 1_100


def test_formats_that_start_programs_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program"))
    path = tmp_path / "a.jpg"
    path.write_bytes(BOMBS["program.jpg"])
    Image.init()
    with Image.open(path) as file:
        assert file.format == "EPS"  # PIL would take it
    with pytest.raises(ImageReadError, match=r"a\.jpg: it is none of JPEG, MPO, PNG"):
        load_image(path)
    path.write_bytes(b"")
    with pytest.raises(ImageReadError, match=r"a\.jpg: it is empty$"):
        load_image(path)
    path.write_bytes(saved("PNG"))  # the suffix does not count
    assert load_image(path, 8).shape == (3, 8, 8)


def test_files_that_never_end(tmp_path, monkeypatch):
    """Pipes and devices are listed, never opened; too large files not read."""
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    with open(tmp_path / "c.png", "wb") as file:
        file.truncate(images_module.LARGEST + 1)
    with pytest.warns(UserWarning, match="links lead out of it to 1 of its images"):
        data = ImageFolder(tmp_path, 8)
    for index, says in enumerate(["not a file", "not a file", "it has 1073741825 bytes; at most 1073741824"]):
        with pytest.raises(ImageReadError, match=says):
            data[index]
    assert identity(data) == identity(data)
    os.mkfifo(tmp_path / "labels.fifo")
    with pytest.raises(FileNotFoundError, match="no such labels file"):
        ImageFolder(tmp_path, labels=tmp_path / "labels.fifo")
    (tmp_path / "labels.csv").write_text("file,label\na.png,1\n/dev/zero,1\n")
    with pytest.raises(ImageReadError, match="not a file"):
        ImageFolder(tmp_path)[1]
    os.mkfifo(tmp_path / "labels.tsv")


def test_paths_that_leave_the_folder(tmp_path):
    for name in ("out/x.png", "in/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(saved("PNG"))
    (tmp_path / "in" / "deep").symlink_to(tmp_path / "out")
    labels = tmp_path / "in" / "labels.csv"
    for name in ("../out/x.png", "a/../../out/x.png", "..\\out\\x.png", "..", "a.png/../../out/x.png"):
        with open(labels, "w", newline="") as file:
            csv.writer(file).writerows([("file", "label"), ("a.png", 1), (name, 1)])
        with pytest.raises(ValueError, match=r"labels.csv, line 3: .* leads out of .*, or give its absolute path"):
            ImageFolder(tmp_path / "in")
    for name in ("deep/x.png", "deep/../out/x.png"):  # the second is lexically inside
        labels.write_text(f"file,label\na.png,1\n{name},1\n")
        with pytest.warns(UserWarning, match=r"in: links lead out of it to 1 of its images; the first is .*x.png, in"):
            assert len(ImageFolder(tmp_path / "in")) == 2
    labels.write_text(f"file,label\n{tmp_path}/out/x.png,1\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(ImageFolder(tmp_path / "in")) == 1  # absolute on purpose
    for split in ("..", "../out", str(tmp_path / "out"), "a/../../out"):
        with pytest.raises(ValueError, match="leads out of"):
            ImageFolder(tmp_path / "in", split=split)


LINE = "file,label\na.png,1\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (LINE.encode("utf-16"), "not in UTF-8"),
        (LINE.encode("utf-32"), "not in UTF-8"),
        (b"file,label\na.png,\xe9\n", "not in UTF-8"),
        (b"file,label\na.png\0,1\n", "not in UTF-8"),
        (b"\xff\xd8\xff\xe0" * 1000, "not in UTF-8"),
        (b"", "no column file or label"),
        (b"\n\n\n", "no column file or label"),
        (b'"file,label\na.png,1\n', "no column file or label"),
        (b"x" * 200_000, "field larger than field limit"),
        (b"file,label\n" + b"x" * 200_000 + b",1\n", "line 2: field larger than field limit"),
        (b'file,label\n"' + b"x" * 200_000 + b",1\n", "field larger than field limit"),
        (b"," * 1_000_000 + b"\n", "line 1: field larger than field limit"),
        (b"a," * 60_000 + b"\n", "no column file or label"),
        (b"file,label" + b",x" * 1_000_000 + b"\n" + b"b.png,1\n" * 3000, "no such image"),
        (b"file,label\na.png,1" + b",x" * 1_000_000 + b"\n", "has 1000002 cells"),
        (b"file,label\na.png," + b"9" * 100_000 + b"\n", "is not an integer from -1"),
        (b"file,label\na.png,4294967296\n", "is not an integer from -1 to 2147483647"),
        (b"file,label\na.png,1e9999999\n", "is not an integer from -1"),
        (b'file,label\n"a\nb.png",1\n', r"no such image: .*a\\nb.png"),
        (b"file,label\n" + b"d/" * 50_000 + b"a.png,1\n", "no such image: .*…"),
        (b"file,label\na.png,1\n" + b"a.png,2" + b" " * 100_000, "another label"),
        (b"file,label\na.png," + b"x" * 100_000 + b"\nb.png,1\n", "both numbers and names"),
        (b"file,label\r" * 3, "line|label"),
    ],
)
def test_labels_files_that_are_none(tmp_path, content, says):
    (tmp_path / "a.png").write_bytes(saved("PNG"))
    (tmp_path / "labels.csv").write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ValueError, match=says) as caught:
        ImageFolder(tmp_path)
    assert str(tmp_path / "labels.csv") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert time.monotonic() - start < 5


def test_damaged_labels_files_end_in_one_line_or_in_labels(tmp_path):
    (tmp_path / "a.png").touch()
    whole = ('file,label,"of, no use"\n' + 'a.png,7,x\n"b,é.png",3,\n./c.png,1.0,\n' * 2).encode()
    rng = random.Random(0)
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for turn in range(1500):
            content = bytearray(whole[: rng.randrange(len(whole))] if turn % 5 == 0 else whole)
            for _ in range(rng.randint(0, 3) if content else 0):
                content[rng.randrange(len(content))] = rng.choice([rng.randrange(256), *b',;\t"\r\n/.\\'])
            (tmp_path / "labels.csv").write_bytes(content)
            line = line_of(lambda: ImageFolder(tmp_path))
            refused += bool(line)
            assert "\n" not in line
    assert 200 < refused < 1400


def line_of(call):
    """The message that ``call`` ends in, "" without one."""
    try:
        call()
    except (ValueError, FileNotFoundError) as error:
        return str(error) or "no message"
    return ""


def test_names_in_messages_are_printable_and_short(tmp_path):
    path = tmp_path / os.fsdecode(b"a\n\x1b[31m\xff.png")
    path.write_bytes(b"x")
    line = line_of(lambda: load_image(path))
    assert r"a\n\x1b[31m\udcff.png: it is none of" in line
    assert line.isprintable()
    assert shown("é 猫 x" * 200).startswith("é 猫 x")
    assert len(shown("x" * 10**6)) < 400


KINDS = {
    "jpg": saved("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
    "progressive.jpg": saved("JPEG", progressive=True),
    "png": saved("PNG"),
    "webp": saved("WEBP"),
    "lossless.webp": saved("WEBP", lossless=True),
    "gif": saved("GIF"),
    "tif": saved("TIFF"),
    "lzw.tif": saved("TIFF", compression="tiff_lzw"),
    "deflate.tif": saved("TIFF", compression="tiff_adobe_deflate"),
    "jpeg.tif": saved("TIFF", compression="jpeg"),
    "bmp": saved("BMP"),
    "ppm": saved("PPM"),
    "jp2": saved("JPEG2000"),
    "tga": saved("TGA", compression="tga_rle"),
    "avif": saved("AVIF"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_images_end_in_one_line_or_in_an_image(tmp_path, kind, capfd):
    whole, path = KINDS[kind], tmp_path / f"a.{kind}"
    path.write_bytes(whole)
    assert load_image(path, 8).shape == (3, 8, 8)
    rng = random.Random(kind)
    refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for turn in range(300):
            content = bytearray(whole[: rng.randrange(len(whole))] if turn % 3 == 0 else whole)
            for _ in range(rng.randint(1, 5) if content else 0):
                # headers are where it hurts
                at = rng.randrange(min(len(content), 100 if turn % 2 else len(content)))
                content[at] = rng.choice([content[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255])
            path.write_bytes(content)
            try:
                image = load_image(path, 8)
            except ImageReadError as error:
                line = str(error)
                refused += 1
            else:
                line = ""
                assert image.shape == (3, 8, 8)
                assert 0 <= image.min() <= image.max() <= 1
            assert not line or (line.startswith(f"cannot read image {path}: ") and line.isprintable())
    assert refused > 30
    assert time.monotonic() - start < 60
    # what claims to be large and is not over the limit is given memory before it is found to be cut off
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024 < 1500


def test_a_good_image_among_all_that(tmp_path):
    for name, content in {**BOMBS, "good.png": saved("PNG")}.items():
        (tmp_path / name).write_bytes(content)
    assert len(find_images(tmp_path)) == len(BOMBS) + 1
    assert torch.isfinite(load_image(tmp_path / "good.png")).all()
    assert Photograph(tmp_path / "good.png").size == (24, 20)
