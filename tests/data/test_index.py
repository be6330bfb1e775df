"""The listing of a large folder is kept from run to run, and is always what listing it again would give."""

import os
import random
import shutil
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch

from aha.data import ImageFolder, Part, Scenes, find_images, identity, readable, workers_for
from aha.data import index as index_module
from aha.data.listing import Samples

TICK = 0.02  # s, more than one of the file system's clock


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Listings of any size and age are kept, in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_module, "WORTH", 1)
    monkeypatch.setattr(index_module, "SETTLED", -(10**18))
    return tmp_path / "cache" / "aha" / "index"


@pytest.fixture
def listed(monkeypatch):
    """The folders that were listed, by the names of the last two parts."""
    calls = []
    scan = os.scandir

    def scandir(path):
        calls.append("/".join(Path(path).parts[-2:]))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    return calls


def tree(root, *names, size=3):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * size)
    return root


def plainly(root):
    """What is below a folder without links, found another way."""
    found = [path for path in root.rglob("*.png") if path.is_file()]
    return sorted(found, key=lambda path: path.parts)


def test_only_changed_folders_are_listed_again(tmp_path, cache, listed):
    root = tree(tmp_path / "in", "a/1.png", "a/deep/2.png", "b/3.png", "c/4.txt")
    first = find_images(root)
    assert first == plainly(root)
    assert len(list(cache.iterdir())) == 1
    listed.clear()
    assert find_images(root) == first
    assert listed == []
    time.sleep(TICK)
    tree(root, "a/deep/5.png")
    again = find_images(root)
    assert listed == ["a/deep"]
    assert again == plainly(root)


def test_any_change_is_seen(tmp_path):
    root, rng = tree(tmp_path / "in", "a/0.png"), random.Random(0)
    folders = [root / name for name in ("a", "a/b", "a/b/c", "d", "d/a")]
    changes = 0
    for step in range(80):
        folder = rng.choice(folders)
        here = sorted(folder.iterdir()) if folder.is_dir() else []
        what = rng.choice(["add", "add", "remove", "rename", "replace", "drop", "swap"])
        if what == "add":
            tree(folder, f"{step}.png", size=step)
        elif not here:
            continue
        elif what == "drop" and folder != folders[0]:
            shutil.rmtree(folder)
        elif rng.choice(here).is_dir() or what == "drop":
            continue
        else:
            file = rng.choice([path for path in here if path.is_file()] or [None])
            if file is None:
                continue
            if what == "remove":
                file.unlink()
            elif what == "rename":
                file.rename(rng.choice([path for path in folders if path.is_dir()]) / f"{step}.png")
            elif what == "replace":
                tree(folder, f"{step}.tmp", size=step)
                (folder / f"{step}.tmp").rename(file)
            else:
                file.unlink()
                tree(root, str((file / "in.png").relative_to(root)))
        if not plainly(root):
            tree(root, "a/0.png")
        changes += 1
        data = ImageFolder(root, labels=False)
        assert [path for path, _ in data.samples] == plainly(root)
        kept = identity(data, content=False)
        os.environ["XDG_CACHE_HOME"] = str(tmp_path / "none")  # monkeypatch sets it back
        anew = ImageFolder(root, labels=False)
        assert identity(anew, content=False) == kept
        os.environ["XDG_CACHE_HOME"] = str(tmp_path / "cache")
        shutil.rmtree(tmp_path / "none")
        time.sleep(0.006)
    assert changes > 40


def test_links_are_followed_anew(tmp_path, listed):
    root = tree(tmp_path / "in", "a/1.png")
    (root / "away").symlink_to(tmp_path / "other")
    (root / "one.png").symlink_to(tmp_path / "target.png")
    names = lambda: [str(path.relative_to(root)) for path in find_images(root)]  # noqa: E731
    with pytest.warns(UserWarning, match="links lead out of it to 1 of its images; the first is .*one.png, in fact"):
        assert names() == ["a/1.png", "one.png"]
    tree(tmp_path / "other", "2.png", "3.png")  # now the link leads to a folder, and no folder of the tree has changed
    listed.clear()
    with pytest.warns(UserWarning, match="links lead out of it to 3 of its images; the first is .*away/2.png, in fact"):
        assert names() == ["a/1.png", "away/2.png", "away/3.png", "one.png"]
    assert "a" not in {Path(folder).name for folder in listed}


def test_sizes_are_kept_with_the_folder(tmp_path, cache, monkeypatch):
    root = tree(tmp_path / "in", "a/1.png", "a/3.png", "b/2.png", "b/4.png")
    before = identity(ImageFolder(root, 8), content=False)
    stat = os.stat
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path, *args, **more: asked.append(str(path)) or stat(path, *args, **more))
        assert identity(ImageFolder(root, 8), content=False) == before
    assert not [path for path in asked if path.endswith(".png")]
    kept = [file.read_bytes() for file in cache.iterdir()]
    find_images(root)  # finds all it needs, and neither forgets what the other keeps
    assert [file.read_bytes() for file in cache.iterdir()] == kept
    time.sleep(TICK)
    (root / "a" / "1.png").write_bytes(b"longer")  # in place: nothing about the folder tells, only the content does
    assert identity(ImageFolder(root, 8), content=False) == before
    tree(root, "a/0.tmp", size=6)
    (root / "a" / "0.tmp").rename(root / "a" / "1.png")
    assert identity(ImageFolder(root, 8), content=False) != before
    monkeypatch.setattr(index_module, "WORTH", 10_000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    before = identity(ImageFolder(root, 8), content=False)
    (root / "a" / "1.png").write_bytes(b"in place")
    assert identity(ImageFolder(root, 8), content=False) != before  # of few images nothing is kept
    assert not (tmp_path / "none").exists()


def test_what_has_just_changed_is_not_kept(tmp_path, monkeypatch, listed):
    monkeypatch.setattr(index_module, "SETTLED", 2_000_000_000)
    root = tree(tmp_path / "in", "a/1.png")
    find_images(root)
    listed.clear()
    find_images(root)
    assert len(listed) == 2
    # times set back do not hide it
    for folder in (root / "a", root):
        os.utime(folder, (0, 0))
    find_images(root)
    listed.clear()
    again = find_images(root)
    assert len(listed) == 2
    assert again == plainly(root)


def test_a_damaged_cache_is_made_again(tmp_path, cache, listed):
    root = tree(tmp_path / "in", *(f"{folder}/{number}.png" for folder in "abc" for number in range(5)))
    expected = find_images(root)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    rng = random.Random(1)
    damaged = [b"", b"\n", whole[:-1], whole[:40], whole + b" ", b"[]", whole.replace(b"index 1", b"index 0")]
    for _ in range(60):
        at = rng.randrange(len(whole))
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
    for content in damaged:
        file.write_bytes(content)
        listed.clear()
        assert find_images(root) == expected
        assert len(listed) == 4
        assert file.read_bytes() == whole
    file.unlink()
    file.mkdir()
    assert find_images(root) == expected


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    root = tree(tmp_path / "in", "a/1.png")
    (tmp_path / "file").write_text("")
    for home in (tmp_path / "file", Path("/proc/nowhere"), Path("relative")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        monkeypatch.setenv("HOME", str(home))
        assert find_images(root) == plainly(root)
    assert not Path("relative").exists()


def test_names_of_any_bytes(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    names = [b"a\xff.png", b"new\nline.png", "café.png".encode(), b" .png", b'"\\.png']
    for name in names:
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).write_bytes(b"")
    found = [find_images(root) for _ in range(2)]
    assert found[0] == found[1]
    assert {os.fsencode(path.name) for path in found[0]} == set(names)
    data = ImageFolder(root)
    assert [path for path, _ in data.samples] == found[0]
    assert identity(data) == identity(ImageFolder(root))


def test_folders_deeper_than_the_stack(tmp_path):
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(sys.getrecursionlimit() + 100):
            os.mkdir("d")
            os.chdir("d")
        Path("a.png").touch()
    finally:
        os.chdir(here)
    (found,) = find_images(tmp_path)
    assert found.parts[-2:] == ("d", "a.png")
    found.unlink()
    for folder in found.parents[: sys.getrecursionlimit() + 100]:  # nor would pytest get rid of them
        folder.rmdir()


def test_samples_are_a_list_of_pairs_and_small(tmp_path):
    pairs = [(Path("/x/a") / f"{i}.png", i % 7 - 1) for i in range(50)] + [(Path("b.png"), 3), (Path("/x/a/c"), 0)]
    samples = Samples.of(pairs)
    assert samples == pairs
    assert list(samples) == [samples[i] for i in range(52)] == pairs
    assert (samples[-1], samples[10:12], len(samples)) == (pairs[-1], pairs[10:12], 52)
    assert samples != pairs[:-1]
    with pytest.raises(IndexError):
        samples[52]
    numbers = {label: label + 10 for label in range(6)}
    assert samples.relabelled(numbers) == [(path, numbers.get(label, -1)) for path, label in pairs]
    assert Samples([], []) == []
    tracemalloc.start()
    many = Samples([("/x", "/".join(f"n01440764_{i}.JPEG" for i in range(100_000)))], range(100_000))
    assert tracemalloc.get_traced_memory()[0] / len(many) < 64  # bytes; a pair in a list takes 500
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("cores", "processes", "expected"),
    [(1, 1, 0), (2, 1, 0), (3, 1, 2), (8, 1, 7), (64, 1, 8), (64, 8, 7), (16, 8, 0), (2, 8, 0)],
)
def test_workers_keep_decoding_off_the_training_process(tmp_path, monkeypatch, cores, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    data = ImageFolder(tree(tmp_path / "in", "a/1.png"))
    assert workers_for(data) == workers_for(readable(Part(data, [0]))) == expected
    assert workers_for(torch.utils.data.Subset(data, [0])) == expected
    assert workers_for(data, 0) == 0
    assert workers_for(Scenes("val", size=3)) == workers_for([1]) == 0
