"""The one check of arguments that public functions share: what an annotation says, in one line."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from aha.checks import check_arguments, checked, checked_fields


def function(
    images: Tensor,
    count: int = 1,
    share: float | None = None,
    pair: tuple[int, float] = (1, 0.5),
    names: Sequence[str] = (),
    path: str | Path = "x",
    flag: bool = False,
    *more: int,
) -> None:
    """Something to call."""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", torch.zeros(2)),
        ("count", np.int64(3)),
        ("share", None),
        ("share", 2),
        ("share", np.float32(0.5)),
        ("pair", [3, 0.5]),
        ("names", ["a"]),
        ("path", Path("x")),
        ("more", (1, 2)),
    ],
)
def test_what_an_annotation_accepts(name, value):
    check_arguments(function, {name: value})


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("images", np.zeros(2), "images=array([0., 0.]): give a dense tensor of real numbers"),
        ("images", torch.zeros(2, device="meta"), "images=float32 of shape (2,) on meta, without values: give a dense"),
        ("images", torch.zeros(1).expand(10**6, 10**6), "shape (1000000, 1000000): give a dense tensor"),
        ("count", torch.tensor(3), "count=int64 of shape (): give an integer"),
        ("count", True, "count=True: give an integer"),
        ("count", 1.0, "count=1.0: give an integer"),
        ("count", 2**64, "count=18446744073709551616: give an integer"),
        ("share", float("nan"), "share=nan: give a finite number or None"),
        ("share", 10**400, "give a finite number or None"),
        ("pair", (1,), "pair=(1,): give (an integer, a finite number)"),
        ("names", "abc", "names='abc': give a list, each of it a text"),
        ("path", 3, "path=3: give a text or a Path"),
        ("path", "\0", "give a text or a Path"),
        ("flag", 1, "flag=1: give True or False"),
        ("more", ("x",), "more=('x',): give a list, each of it an integer"),
    ],
)
def test_what_it_refuses(name, value, line):
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        check_arguments(function, {name: value})
    assert "\n" not in str(caught.value)


def test_what_fails_inside_is_laid_to_the_argument_that_does_not_fit():
    @checked
    def scaled(images: Tensor, by: float = 1.0) -> Tensor:
        if by == 0:
            raise ValueError("by=0: give another number")
        return images.relu() * by

    assert scaled(torch.ones(2), by=2).sum() == 4
    with pytest.raises(ValueError, match=r"^images=\[1\]: give a dense tensor") as caught:
        scaled([1])
    assert isinstance(caught.value.__cause__, AttributeError)
    with pytest.raises(ValueError, match=r"^by=0: give another number$"):  # the function's own line comes first
        scaled(None, by=0)
    with pytest.raises(TypeError, match="missing"):
        scaled()


def test_what_fails_for_another_reason_stays_as_it_is():
    @checked
    def broken(count: int = 1) -> None:
        raise RuntimeError("of the device")

    with pytest.raises(RuntimeError, match="of the device"):
        broken()


def test_more_memory_than_there_is():
    @checked
    def large(count: int) -> Tensor:
        return torch.empty(count)

    with pytest.raises(ValueError, match=r"^large takes more memory than there is: give less at a time$"):
        large(2**60)


def test_fields_are_checked_beside_what_the_class_checks():
    @dataclass
    class Settings:
        count: int = 1
        share: float = 0.5

        @checked_fields
        def __post_init__(self) -> None:
            if self.count < 1:
                raise ValueError("count: give 1 or more")

    Settings()
    with pytest.raises(ValueError, match=r"^count: give 1 or more$"):
        Settings(0)
    with pytest.raises(ValueError, match=r"^count='x': give an integer$"):
        Settings("x")
    with pytest.raises(ValueError, match=r"^share=nan: give a finite number$"):
        Settings(share=float("nan"))
