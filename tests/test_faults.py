"""The harness itself: it sees every change, and kills where it says."""

import errno
import os

import pytest

from aha import files

from . import faults

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


def test_changes_are_seen(tmp_path):
    def work():
        files.write_atomically(tmp_path / "a" / "b", b"content")
        (tmp_path.parent / "elsewhere").write_bytes(b"not counted")
        (tmp_path / "a" / "b").unlink()

    seen = [change.split()[0] for change in faults.changes(work, tmp_path)]
    assert seen == ["mkdir", "open", "write", "fsync", "replace", "fsync", "unlink"]
    assert not (tmp_path / "a" / "b").exists()
    assert os.open.__name__ == "open"  # the parent's own functions are untouched


def test_a_write_that_is_killed_leaves_the_old_or_the_new_file(tmp_path):
    path = tmp_path / "file"

    def work():
        files.write_json(path, {"name": "new"})

    count, names = len(faults.changes(work, tmp_path)), set()
    for torn in (False, True):
        for number in range(count):
            files.write_json(path, {"name": "old"})
            faults.killed(work, tmp_path, number, torn)
            names.add(files.read_json(path, required=True)["name"])
    assert names == {"old", "new"}
    files.remove_partials(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_leaves_a_whole_file_and_one_line(tmp_path, reason):
    path = tmp_path / "file"

    def work():
        files.write_json(path, {"name": "new"})

    for number in range(len(faults.changes(work, tmp_path))):
        files.write_json(path, {"name": "old"})
        error = faults.refused(work, tmp_path, number, reason).error
        assert isinstance(error, OSError)
        assert str(path) in str(error)
        assert "\n" not in str(error)
        assert files.read_json(path, required=True)["name"] in ("old", "new")
        if reason != errno.EROFS:  # where nothing can be removed
            assert list(tmp_path.iterdir()) == [path]


def test_a_change_that_never_comes_is_said(tmp_path):
    with pytest.raises(AssertionError, match="never came"):
        faults.killed(lambda: None, tmp_path, 0)
