"""`aha info` answers on any machine: every section, no exception, plain text into a pipe."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aha import info
from aha.kernels import dispatch, native

SECTIONS = [
    "versions",
    "cpu",
    "gpus",
    "libraries",
    "cuda toolkit",
    "backends",
    "extras",
    "weights",
    "environment",
]


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=60
    )


def test_plain_text_in_a_process_of_its_own():
    done = run("from aha import info; info.main()", AHA_REAL_DATA="somewhere", AHA_DISABLE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout  # no colours into a pipe
    headings = [line for line in done.stdout.splitlines() if line and not line.startswith(" ")]
    assert headings == SECTIONS
    assert re.search(r"AHA_REAL_DATA +somewhere", done.stdout)
    assert re.search(r"aha\._C +disabled by AHA_DISABLE_NATIVE", done.stdout)
    assert re.search(r"reference +ready ← auto", done.stdout)
    assert "error:" not in done.stdout


def test_collect_is_json():
    done = run("from aha import info; info.main(json=True)", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == SECTIONS
    assert {"aha", "python", "torch", "timm", "numpy"} <= set(found["versions"])
    assert {f"{operator} (cpu)" for operator in dispatch.BACKENDS} <= set(found["backends"])
    for rows in found["backends"].values():
        assert sum(text.endswith(" auto") for text in rows.values()) == 1


def test_every_operator_has_an_example():
    import torch

    assert set(info._examples(torch.device("cpu"))) == set(dispatch.BACKENDS)


def test_a_failing_probe_is_a_line(monkeypatch):
    def broken(*_):
        raise OSError("the driver\nis gone")

    monkeypatch.setattr(info, "_cpu", broken)
    monkeypatch.setattr(native, "load", broken)
    monkeypatch.setattr(dispatch, "explain", broken)
    text = info.report()
    assert "error: OSError: the driver is gone" in text
    assert "versions" in text


def test_missing_extra_names_the_command(monkeypatch):
    find = info.importlib.util.find_spec
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None if name == "jinja2" else find(name))
    found = info.collect()["extras"]
    assert found["report"] == "not installed: jinja2; pip install aha-attribution[report]"


def test_extras_are_those_of_the_project():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(info.EXTRAS) == set(project["optional-dependencies"]) - {"test", "dev"}


def test_no_secret_is_printed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in info.report()


def test_architectures_of_a_cuda_library(tmp_path):
    def entry(kind, architecture, size):
        head = kind.to_bytes(2, "little") + bytes(2) + (64).to_bytes(4, "little") + size.to_bytes(8, "little")
        return head + bytes(12) + architecture.to_bytes(4, "little") + bytes(32) + bytes(size)

    entries = entry(2, 90, 40) + entry(1, 100, 8)
    header = info.FAT_BINARY + bytes([1, 0, 16, 0]) + len(entries).to_bytes(8, "little")
    library = tmp_path / "library.so"
    library.write_bytes(bytes(100) + header + entries + bytes(7) + info.FAT_BINARY + bytes([1, 0, 16, 0]) + bytes(40))
    assert info.architectures(library) == ["sm_90", "compute_100"]
    library.write_bytes(bytes(100) + info.FAT_BINARY)
    with pytest.raises(Exception):  # noqa: B017, PT011 - cut short: report shows whatever it raises
        info.architectures(library)


def test_unusable_toolkit_says_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    line = info.collect()["cuda toolkit"]["CUDA_HOME"]
    assert line == f"{tmp_path}: incomplete: no include/cuda_runtime.h, lib64/libcudart.so"
