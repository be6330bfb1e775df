"""Builds aha: the Python packages always, aha._C (CPU) and aha._C_cuda as AHA_BUILD says.

AHA_BUILD = auto   whatever this machine can build; what it cannot is a warning, never an error (the default)
            cpu    aha._C, or an error
            cuda   aha._C and aha._C_cuda, or an error
            none   pure Python
Also read: CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX. A GPU need not be present to build for one.
"""

import functools
import importlib.util
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0+PTX"
TORCH_TARGET = "0x020b000000000000"  # libtorch stable ABI 2.11
# the newest versions that manylinux_2_28 (PEP 600) allows: those of RHEL 8, and what torch itself needs
MANYLINUX = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24)}


@functools.cache  # the same line once
def warn(line: str) -> None:
    print(f"aha: warning: {line}", file=sys.stderr)


def compiler() -> str | None:
    """The C++ compiler setuptools will call, if it exists."""
    named = os.environ.get("CXX", "").split()
    candidates = named[:1] or ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def toolkits():
    """Folders that may hold a CUDA toolkit, most explicit first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    if shutil.which("nvcc"):
        # nvcc on PATH may be a wrapper or a link; a dry run names the folder it really belongs to
        dry = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        if top := re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE):
            yield Path(top[1].strip()).resolve()
    yield Path("/usr/local/cuda")


def library_folder(toolkit: Path) -> Path | None:
    folders = (toolkit / "lib64", toolkit / "targets/x86_64-linux/lib")
    return next((folder for folder in folders if (folder / "libcudart.so").exists()), None)


def find_toolkit() -> Path | None:
    """The first toolkit that can really compile and link, or None."""
    for toolkit in toolkits():
        parts = (toolkit / "bin/nvcc", toolkit / "include/cuda_runtime.h")
        if all(part.exists() for part in parts) and library_folder(toolkit):
            return toolkit
    return None


def toolkit_major(toolkit: Path) -> str:
    header = (toolkit / "include/cuda_runtime_api.h").read_text(errors="ignore")
    version = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header)
    return str(int(version[1]) // 1000) if version else "unknown"


def why_not_cpu() -> str | None:
    if compiler() is None:
        return "no C++ compiler was found; install g++ or clang++, or set CXX"
    if importlib.util.find_spec("torch") is None:
        return "the build cannot import torch; install torch, then use pip's --no-build-isolation"
    return None


def why_not_cuda() -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch"
    toolkit = find_toolkit()
    if toolkit is None:
        return "no folder holds bin/nvcc, include/cuda_runtime.h and lib64/libcudart.so; set CUDA_HOME to one"
    ours, theirs = toolkit_major(toolkit), torch.version.cuda.split(".")[0]
    if ours != theirs:
        return f"{toolkit} is CUDA {ours}, torch was built with CUDA {theirs}; set CUDA_HOME to a CUDA {theirs}"
    return None


def what_to_build() -> tuple[list[str], bool]:
    """Names of the extensions to build, and whether failing to build one is an error."""
    mode = os.environ.get("AHA_BUILD") or "auto"
    if mode not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"AHA_BUILD={mode} is not known; set it to auto, cpu, cuda or none")
    strict = mode in ("cpu", "cuda")
    names: list[str] = []
    # in this order: without aha._C there are no schemas for aha._C_cuda to implement
    for name, why_not in (("_C", why_not_cpu), ("_C_cuda", why_not_cuda)):
        if mode == "none" or (mode, name) == ("cpu", "_C_cuda"):
            break
        if reason := why_not():
            if strict:
                raise SystemExit(f"AHA_BUILD={mode} cannot build aha.{name}: {reason}")
            warn(f"aha.{name} is not built: {reason}")
            break
        names.append(name)
    return names, strict


def jobs(gib_per_job: int) -> int:
    """Compiler processes that fit in the cores and the memory of this machine or container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    return max(1, min(cores, memory // (gib_per_job << 30)))


def extension(name: str) -> Extension:
    """aha._C: the schemas and the CPU operators. aha._C_cuda: the CUDA operators of the same schemas."""
    import torch

    torch_folder = Path(torch.__file__).parent
    include_dirs, library_dirs = [ROOT / "csrc", torch_folder / "include"], [torch_folder / "lib"]
    define = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"
    flags = [
        "-fvisibility=hidden",
        # fuse multiply-adds where the machine can; the noise, which must not depend on it, spells out its own
        "-ffp-contract=fast",
        # assertions record __FILE__: keep the building machine out of the binary
        *(f"-ffile-prefix-map={path}={name}" for path, name in ((ROOT, "aha"), (include_dirs[1], "torch"))),
    ]
    sanitize = os.environ.get("AHA_SANITIZE")
    if sanitize:  # make sanitize; without clones, which the loader chooses before a sanitizer is ready
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g", "-DAHA_NO_CLONES"]
        flags += ["-fno-wrapv"]  # Python's own -fwrapv would define signed overflow, and hide it
    link_args = ["-Wl,--as-needed", "-Wl,--strip-all"] if sys.platform == "linux" else []
    if sanitize:
        link_args = ["-fsanitize=address,undefined"]
    compile_args = {"cxx": [define, "-O3", "-std=c++20", *flags]}
    if name == "_C":
        sources, libraries = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")], ["torch_cpu"]
    else:
        sources = [ROOT / "csrc/glibc_2_28.cpp", *ROOT.glob("csrc/cuda/*.cu")]
        libraries = ["torch_cpu", "torch_cuda", "cudart"]
        toolkit = find_toolkit()
        include_dirs.append(toolkit / "include")
        library_dirs.append(library_folder(toolkit))
        host_flags = [f"-Xcompiler={flag}" for flag in flags]
        compile_args["nvcc"] = [define, "-DUSE_CUDA", "-O3", "-std=c++20", *host_flags]
    return Extension(
        f"aha.{name}",
        sources=sorted(str(source.relative_to(ROOT)) for source in sources),
        depends=sorted(str(header.relative_to(ROOT)) for header in ROOT.glob("csrc/**/*.*h")),
        include_dirs=[str(folder) for folder in include_dirs],
        library_dirs=[str(folder) for folder in library_dirs],
        libraries=libraries,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        py_limited_api=True,
        language="c++",
    )


def builder(strict: bool):
    """The build_ext command; unless strict, a failure is a warning and what did build is installed."""
    import torch  # noqa: F401  sets up its logging, which is adjusted next

    logger = logging.getLogger("torch.utils.cpp_extension")
    # its import warns when no GPU is visible, which is no obstacle to building
    logger.setLevel(logging.ERROR)
    from torch.utils.cpp_extension import BuildExtension

    logger.setLevel(logging.NOTSET)

    def forgive(ext: Extension, error: Exception) -> None:
        ext.optional = True  # setuptools then does not ask for the file
        warn(f"{ext.name} is not built: {' '.join(str(error).split())[:300]}")

    class Build(BuildExtension):
        def build_extensions(self):
            planned = list(self.extensions)
            while self.extensions:
                try:
                    super().build_extensions()
                    break
                except Exception as error:
                    # raised before anything is compiled, for example for a host compiler this nvcc refuses
                    if strict:
                        raise
                    forgive(self.extensions.pop(), error)
            self.extensions[:] = planned  # the commands that follow expect what setup() was given

        def build_extension(self, ext):
            try:
                if any(other.optional for other in self.extensions):
                    raise RuntimeError("it needs aha._C")
                super().build_extension(ext)
            except Exception as error:
                if strict:
                    raise
                forgive(ext, error)

    return Build


def too_new(library: Path) -> list[str]:
    """The symbol versions that a Linux library asks for and manylinux_2_28 does not have, such as GLIBC_2.34."""
    asked = re.findall(rb"\0(GLIBC|GLIBCXX)_([\d.]+)(?=\0)", library.read_bytes())
    named = {(kind.decode(), version.decode()) for kind, version in asked}
    return sorted(f"{k}_{v}" for k, v in named if tuple(map(int, v.split("."))) > MANYLINUX[k])


class Wheel(bdist_wheel):
    """A wheel tagged manylinux_2_28 if all that is in it runs there, else for Linux machines as new as this one."""

    def get_tag(self):
        python, abi, machine = super().get_tag()
        libraries = sorted(Path(self.bdist_dir).rglob("*.so"))
        if not libraries or not machine.startswith("linux_") or platform.libc_ver()[0] != "glibc":
            return python, abi, machine
        newer = {library.name: versions for library in libraries if (versions := too_new(library))}
        for name, versions in newer.items():
            warn(f"{name} needs {', '.join(versions)}, so the wheel is for machines with those, not manylinux_2_28")
        return python, abi, machine if newer else machine.replace("linux", "manylinux_2_28", 1)


def main() -> None:
    names, strict = what_to_build()
    options = {}
    if names:
        # set before torch.utils.cpp_extension is imported: it reads them once
        if "_C_cuda" in names:
            os.environ["CUDA_HOME"] = str(find_toolkit())
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        os.environ.setdefault("MAX_JOBS", str(jobs(gib_per_job=4 if "_C_cuda" in names else 2)))
        # the ninja installed beside this Python, also when its environment is not activated
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        options = {
            "ext_modules": [extension(name) for name in names],
            "cmdclass": {"build_ext": builder(strict), "bdist_wheel": Wheel},
            "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
        }
    inner = [f"aha.kernels.{name}" for name in find_packages("kernels")]
    setup(
        packages=["aha", *find_packages(include=["aha.*"]), "aha.kernels", *inner],
        package_dir={"aha.kernels": "kernels"},
        **options,
    )


if __name__ == "__main__":
    main()
