"""Benchmarks: every public operator, every backend, its rivals; `python -m bench.report` runs all of it."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class _Kernels(MetaPathFinder):
    """Finds aha.kernels in a checkout that nobody installed, where its folder is not in aha/."""

    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "aha.kernels":
            return None
        folder = ROOT / "kernels"
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])


sys.meta_path.append(_Kernels())  # last: it is asked where nothing is installed
