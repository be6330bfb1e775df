"""What a build decides, what its wheels hold, and that they import where nothing can be compiled."""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import aha

ROOT = Path(__file__).parents[1]
SETUP = (sys.executable, "setup.py")
PIP = (sys.executable, "-m", "pip")
MANGLED = re.compile(r"\b_Z\w*?\d*(c10|2at|5torch)")

# both results and errors pass through what glibc_2_28.cpp defines: log and exp of float64, the text of an error
SMOKE = """
scores = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
outputs = [aha.kernels.soft_topk_masks(scores, [0.3, 0.6], 0.1, backend=name) for name in ("cpu", "reference")]
gradients = [torch.autograd.grad(out.square().sum(), scores)[0] for out in outputs]
fits = torch.allclose(*outputs) and torch.allclose(*gradients)
try:
    torch.ops.aha.gumbel_sinkhorn(scores, scores[0, 0], torch.tensor(0), None, None, 0, 0.0, None)
except RuntimeError as error:
    print("fits" if fits else outputs, str(error).split(", ")[-1], sep=", ")
"""


def run(command, *, check=True, cwd=ROOT, **environment):
    """Run a command with these environment variables set."""
    env = {**os.environ, **environment}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def setup():
    """setup.py as a module: its functions, nothing run."""
    spec = importlib.util.spec_from_file_location("aha_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files git knows or would add: no build product, nothing ignored."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = run(["git", "ls-files", "-co", "--exclude-standard", "-z"], check=False)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # git still lists a file that was deleted and not committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def build_wheel(checkout, into, **environment):
    """Build a wheel, and return it with all that the build printed."""
    shutil.rmtree(checkout / "build", ignore_errors=True)
    options = ["-v", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", into]
    done = run([*PIP, "wheel", ".", *options], cwd=checkout, **environment)
    (wheel,) = into.glob("*.whl")
    return wheel, done.stdout + done.stderr


def install(wheel, into):
    """Install a wheel without its dependencies into a folder of its own, and return the folder."""
    run([*PIP, "install", "--no-deps", "--no-index", "--target", into, wheel])
    return into


def python(site, code):
    """What Python prints when it imports aha from the folder ``site``, with no compiler on PATH."""
    code = f"""
import sys; sys.path.insert(0, {str(site)!r})
import torch, aha.kernels
assert all(m.__file__.startswith({str(site)!r}) for m in (aha, aha.kernels)), aha.kernels.__file__
{code}
"""
    return run([sys.executable, "-c", code], cwd=site, PATH="").stdout.strip()


def check_layout(names):
    assert {"aha/__init__.py", "aha/_version.py", "aha/kernels/__init__.py", "aha/kernels/native.py"} <= names
    folders = {name.split("/")[0] for name in names}
    assert folders == {"aha", f"aha_attribution-{aha.__version__}.dist-info"}
    assert not any(name.endswith((".cpp", ".cu", ".h")) for name in names)


def check_library(library):
    """It asks only for the C functions of libtorch's stable ABI and records nothing of this machine."""
    binary = library.read_bytes()
    assert str(ROOT).encode() not in binary
    assert str(Path(torch.__file__).parent).encode() not in binary
    if not (shutil.which("nm") and shutil.which("readelf")):
        pytest.skip("needs nm and readelf")
    undefined = run(["nm", "-D", "--undefined-only", library]).stdout
    assert "torch_library_impl" in undefined
    assert MANGLED.findall(undefined) == []
    dynamic = run(["readelf", "-d", library]).stdout
    assert not re.search("RPATH|RUNPATH", dynamic)
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", dynamic))
    assert needed <= {"libtorch_cpu", "libtorch_cuda", "libcudart", "libstdc++", "libgcc_s", "libm", "libc"}


def check_platform(wheel, brought):
    """Beside the libraries that torch brings, it asks only for what every Linux from glibc 2.28 on has."""
    assert wheel.name.endswith(f"-manylinux_2_28_{platform.machine()}.whl")
    if importlib.util.find_spec("auditwheel") is None:
        pytest.skip("needs auditwheel")
    shown = json.loads(run([sys.executable, "-m", "auditwheel", "show", "--json", wheel]).stdout)
    oldest = re.match(r"manylinux_2_(\d+)_", shown["sym_tag"])
    assert oldest and int(oldest[1]) <= 28
    assert {name.split(".so")[0] for name in shown["external_libs"]} == brought


def test_mangled_symbols_are_recognised():
    for symbol in ("_ZN3c104HalfC1Ef", "_ZN2at6Tensor3addE", "_ZNK5torch7LibraryE", "_ZTIN3c105ErrorE"):
        assert MANGLED.search(f"                 U {symbol}\n")
    assert not MANGLED.search("U aoti_torch_get_size\n U torch_call_dispatcher\n U _ZdlPvm@CXXABI_1.3.9\n")


@pytest.mark.slow
def test_pure_wheel(checkout, tmp_path):
    wheel, _ = build_wheel(checkout, tmp_path, AHA_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    check_layout(names)
    assert not any(name.endswith(".so") for name in names)
    code = """
x, r = torch.rand(2, 1, 3, 4, 4)
ranks, counts = torch.arange(16).view(1, 4, 4).int(), torch.tensor([0, 5, 16]).int()
table = aha.kernels.explain("perturb_by_rank", x, r, ranks, counts)
print([row.backend for row in table if row.chosen], [row.reason for row in table if row.backend == "cpu"])
aha.kernels.perturb_by_rank(x, r, ranks, counts)
"""
    assert python(install(wheel, tmp_path / "site"), code).startswith("['reference'] ['not built: ")


@pytest.mark.slow
def test_cpu_wheel(setup, checkout, tmp_path):
    if reason := setup.why_not_cpu():
        pytest.skip(reason)
    wheel, _ = build_wheel(checkout, tmp_path, AHA_BUILD="cpu")
    assert "-cp310-abi3-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    check_layout(names)
    assert [name for name in names if name.endswith(".so")] == ["aha/_C.abi3.so"]
    site = install(wheel, tmp_path / "site")
    library = site / "aha/_C.abi3.so"
    code = "native = aha.kernels.native; print(native.load('_C'), native.path('_C'))"
    assert python(site, code) == f"None {library}"
    assert python(site, SMOKE) == "fits, gumbel_sinkhorn: n_iters is 0; it must be at least 1 and below 2^31 - 1"
    check_library(library)
    check_platform(wheel, {"libtorch_cpu"})


def test_what_is_too_new_for_manylinux_2_28_is_found(setup, tmp_path):
    library = tmp_path / "some.so"
    library.write_bytes(b"\0GLIBC_2.2.5\0GLIBC_2.28\0GLIBCXX_3.4.24\0GLIBCXX_3.4\0exp\0CXXABI_1.3.9\0")
    assert setup.too_new(library) == []
    library.write_bytes(library.read_bytes() + b"GLIBC_2.34\0GLIBCXX_3.4.29\0GLIBC_3.0\0")
    assert setup.too_new(library) == ["GLIBCXX_3.4.29", "GLIBC_2.34", "GLIBC_3.0"]


@pytest.mark.skipif(platform.system() != "Linux", reason="needs a Linux library")
def test_what_a_library_needs_is_read_as_the_linker_reads_it(setup, monkeypatch):
    if not shutil.which("objdump"):
        pytest.skip("needs objdump")
    library = Path(torch.__file__).parent / "lib/libtorch_python.so"
    needed = re.findall(r"\b0x\w+ 0x\w+ \d+ (GLIBC(?:XX)?_[\d.]+)", run(["objdump", "-p", library]).stdout)
    assert needed
    monkeypatch.setattr(setup, "MANYLINUX", {"GLIBC": (0,), "GLIBCXX": (0,)})
    assert set(setup.too_new(library)) == set(needed)


@pytest.mark.slow
def test_cuda_extension_compiles_and_links(setup, checkout, tmp_path):
    if reason := setup.why_not_cpu() or setup.why_not_cuda():
        pytest.skip(reason)
    wheel, _ = build_wheel(checkout, tmp_path, AHA_BUILD="cuda", TORCH_CUDA_ARCH_LIST="9.0")
    with zipfile.ZipFile(wheel) as archive:
        library = Path(archive.extract("aha/_C_cuda.abi3.so", tmp_path))
    check_library(library)
    check_platform(wheel, {"libtorch_cpu", "libtorch_cuda", "libcudart"})


@pytest.mark.parametrize("value", ["gpu", "CPU", "1"])
def test_bad_aha_build_is_one_clear_line(value):
    done = run([*SETUP, "--version"], check=False, AHA_BUILD=value)
    assert done.returncode != 0
    assert done.stderr.strip() == f"AHA_BUILD={value} is not known; set it to auto, cpu, cuda or none"


def test_auto_without_a_compiler_is_a_warning_and_a_pure_wheel(checkout, tmp_path):
    wheel, output = build_wheel(checkout, tmp_path, AHA_BUILD="auto", PATH="", CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "warning: aha._C is not built: no C++ compiler was found" in output


def test_cpu_without_a_compiler_is_one_clear_line():
    done = run([*SETUP, "--version"], check=False, AHA_BUILD="cpu", PATH="", CXX="no-such-compiler")
    assert done.returncode != 0
    assert done.stderr.startswith("AHA_BUILD=cpu cannot build aha._C: no C++ compiler was found")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("works", ["never", "until it compiles"])
def test_a_failing_compiler_is_an_error_only_when_compiling_was_asked_for(checkout, tmp_path, works):
    broken = tmp_path / "c++"
    until = 'case "$1" in --version|-v|-dump*) exec c++ "$@";; esac\n' if works != "never" else ""
    broken.write_text(f"#!/bin/sh\n{until}echo broken >&2; exit 1\n")
    broken.chmod(0o755)
    environment = {"CXX": str(broken), "CC": str(broken)}
    wheel, output = build_wheel(checkout, tmp_path / "wheel", AHA_BUILD="auto", **environment)
    assert "warning: aha._C is not built: " in output
    names = set(zipfile.ZipFile(wheel).namelist())
    check_layout(names)
    assert not any(name.endswith(".so") for name in names)
    done = run([*SETUP, "build_ext"], check=False, cwd=checkout, AHA_BUILD="cpu", **environment)
    assert done.returncode != 0


def test_a_toolkit_is_trusted_only_when_it_can_compile_and_link(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "toolkits", lambda: iter([tmp_path]))
    for file in ("bin/nvcc", "include/cuda_runtime.h", "targets/x86_64-linux/lib/libcudart.so"):
        assert setup.find_toolkit() is None
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert setup.find_toolkit() == tmp_path


def test_compiler_processes_fit_in_memory(setup):
    assert 1 <= setup.jobs(gib_per_job=2) <= (os.cpu_count() or 1)
    assert setup.jobs(gib_per_job=1 << 20) == 1


def test_importing_the_kernels_costs_a_torch_import_and_nothing_more():
    code = """
import sys, torch
before = set(sys.modules)
import aha.kernels
print(sorted({name.split(".")[0] for name in set(sys.modules) - before}), "torch._dynamo" in sys.modules)
"""
    assert run([sys.executable, "-c", code]).stdout.strip() == "['aha'] False"


def test_one_version():
    assert run([*SETUP, "--version"], AHA_BUILD="none").stdout.split()[-1] == aha.__version__
