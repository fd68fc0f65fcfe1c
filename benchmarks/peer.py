"""llama.cpp's own tools, built from the sources inside llama-cpp-python's sdist: the version that edgeslm runs on.

The first use downloads and compiles (20 minutes on two cores); later ones take what is in the cache.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

TOOLS = ("llama-bench", "llama-quantize", "llama-imatrix", "llama-perplexity", "llama-tokenize")
CACHE = Path.home() / ".cache" / "edgeslm" / "peers"
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
"""GCC drops the tile configuration of ggml's AMX kernels, and the tools crash (ggml-org/llama.cpp#26954)."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tools", type=Path, help="directory with llama.cpp's tools; built when left out")
    parser.add_argument("--sources", type=Path, help="llama.cpp's sources, where --tools is given")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where built tools are kept")


def locate(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Directories of the tools and of llama.cpp's sources (with convert_hf_to_gguf.py)."""
    if arguments.tools is None:
        return build_tools(cache=arguments.cache), fetch_sources(arguments.cache)
    nearby = [
        folder for folder in arguments.tools.resolve().parents if (folder / "convert_hf_to_gguf.py").exists()
    ]
    return arguments.tools, arguments.sources or (nearby or [fetch_sources(arguments.cache)])[0]


def build_tools(names: Sequence[str] = TOOLS, *, cache: Path = CACHE) -> Path:
    """The directory with the tools `names`, compiled unless they are there."""
    sources = fetch_sources(cache)
    build = sources.parent / "build"
    if all((build / "bin" / name).exists() for name in names):
        return build / "bin"
    if shutil.which("cmake") is None:
        raise SystemExit("cmake is missing: apt install cmake g++, or pip install cmake")
    options = [*CMAKE_OPTIONS]
    if _has_amx():
        options += [f"-DCMAKE_C_FLAGS={NO_AMX}", f"-DCMAKE_CXX_FLAGS={NO_AMX}"]
    print(f"building {', '.join(names)} in {build}", file=sys.stderr)
    _run(["cmake", "-S", str(sources), "-B", str(build), *options])
    _run(["cmake", "--build", str(build), "--parallel", "--target", *names])
    return build / "bin"


def fetch_sources(cache: Path = CACHE) -> Path:
    """llama.cpp's source tree, out of the sdist of the llama-cpp-python that is installed."""
    try:
        release = version("llama-cpp-python")
    except PackageNotFoundError:
        raise SystemExit("llama-cpp-python is not installed: pip install 'edgeslm[gguf]'") from None
    home = cache / f"llama-cpp-python-{release}"
    sources = home / "vendor" / "llama.cpp"
    if sources.exists():
        return sources
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        print(f"downloading the sources of llama-cpp-python {release}", file=sys.stderr)
        _run([
            sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python",
            "--dest", folder, f"llama-cpp-python=={release}",
        ])  # fmt: skip
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        unpacked = next(path for path in Path(folder).iterdir() if path.is_dir())
        unpacked.rename(home)
    return sources


def _has_amx() -> bool:
    """Whether the compiler would be told to use Intel's matrix extensions on this machine."""
    try:
        return "amx_int8" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _run(command: Sequence[str]) -> None:
    """Run a command; its output is shown only when it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
