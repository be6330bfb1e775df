"""A folder belongs to one process at a time, and to nobody once that process has ended, however it ended."""

import errno
import os
import signal
import socket
import subprocess
import sys

import pytest

from aha import lock

HOLD = (
    "import sys, time; from aha import lock\nwith lock.held(sys.argv[1]):\n print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def other(tmp_path):
    """A process that holds ``tmp_path``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def without_locks(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)


def test_a_second_process_is_refused_and_told_by_whom(tmp_path, other):
    with pytest.raises(lock.FolderInUseError) as caught, lock.held(tmp_path):
        pass
    assert f"in use by process {other.pid} on {socket.gethostname()}: wait for it" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("locks", [True, False])
def test_a_killed_process_holds_nothing(tmp_path, other, locks, monkeypatch):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / lock.NAME).is_file()  # nobody cleaned up
    if not locks:
        without_locks(monkeypatch)
    with lock.held(tmp_path):
        assert (tmp_path / lock.NAME).read_text() == f"{socket.gethostname()} {os.getpid()}\n"
    assert not (tmp_path / lock.NAME).exists()


def test_without_locks_the_file_is_one(tmp_path, other, monkeypatch):
    without_locks(monkeypatch)
    with pytest.raises(lock.FolderInUseError, match=f"process {other.pid}"), lock.held(tmp_path):
        pass


def test_without_locks_a_new_folder_is_taken(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    for _ in range(2):
        with lock.held(tmp_path / "new"):
            assert lock._holder(tmp_path / "new" / lock.NAME) == (socket.gethostname(), os.getpid())
            with pytest.raises(lock.FolderInUseError), lock.held(tmp_path / "new"):
                pass
    assert not [*(tmp_path / "new").iterdir()]


def test_a_process_of_another_host_is_not_taken_for_dead(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    (tmp_path / lock.NAME).write_text("elsewhere 4\n")
    refusal = pytest.raises(lock.FolderInUseError, match=r"process 4 on elsewhere.*if it has ended, remove ")
    with refusal, lock.held(tmp_path):
        pass


def test_within_a_process_and_again(tmp_path):
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        with lock.held(folder):
            with pytest.raises(lock.FolderInUseError, match=f"process {os.getpid()}"), lock.held(folder):
                pass
            with lock.held(tmp_path):  # another folder
                pass


def test_a_child_that_outlives_its_parent_holds_nothing(tmp_path):
    """As the workers of a data loader, which notice seconds later that their parent was killed."""
    code = (
        "import os, sys, time; from aha import lock\n"
        "with lock.held(sys.argv[1]):\n"
        " child = os.fork()\n"
        " if child == 0: print(os.getpid(), flush=True); time.sleep(30); os._exit(0)\n"
        " os.kill(os.getpid(), 9)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.wait()
    try:
        with lock.held(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    refusal = pytest.raises(OSError, match=r"file/\.lock cannot be written, part of its path is a file")
    with refusal as caught, lock.held(tmp_path / "file"):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("locks", [True, False])
def test_a_full_disk_leaves_no_lock_behind(tmp_path, locks, monkeypatch):
    if not locks:
        without_locks(monkeypatch)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(lock.os, "write", refuse)
        with pytest.raises(OSError, match="the disk is full"), lock.held(tmp_path):
            pass
    assert not list(tmp_path.iterdir())
    with lock.held(tmp_path):
        pass
