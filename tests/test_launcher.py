import pytest

from aha import processes
from aha.data import Scenes, workers_for
from aha.launcher import told


@pytest.mark.parametrize("text", ["x", "", "0", "-1", "1.5", "²", "9" * 5000])
def test_what_is_no_number_of_processes_is_said(text, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(ValueError, match=r"^WORLD_SIZE='.{0,60}': set it to an integer ≥ 1") as caught:
        processes.join()
    assert "\n" not in str(caught.value)


def test_a_rank_may_be_0_and_no_text(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert told("RANK", 0, 0) == 0
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK='first': set it to an integer ≥ 0"):
        processes.join()


def test_a_number_that_is_not_set(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert told("LOCAL_WORLD_SIZE") == 1


@pytest.mark.parametrize("asked", ["x", -1, 1.5, True])
def test_workers_that_are_no_number(asked):
    with pytest.raises(ValueError, match=r"workers=.*: give an integer ≥ 0"):
        workers_for(Scenes("val", 2), asked)
