"""The wheel holds what it should, and what is in it is found after an installation."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import pytest

from edgeslm import __version__
from edgeslm.device import list_devices
from edgeslm.schema import shipped_folder

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEVICE_HALF = {"click", "jinja2", "numpy", "psutil", "rich"}
MOST_BYTES = 60_000_000
"""What an installation of the device half may take, without engines and what they bring themselves."""


PRIVATE = ("recipes/data/mails.tsv", "recipes/mine.toml", "devices/my.toml")
"""Put beside what the package ships: texts to learn from, a recipe, a probed device."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("hatchling") is None or find_spec("pip") is None:
        pytest.skip("hatchling or pip is not installed")
    out = tmp_path_factory.mktemp("wheel")
    tree = tmp_path_factory.mktemp("tree")
    for name in ("edgeslm", "recipes", "devices"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in PRIVATE:
        (tree / name).write_text("a user's own")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet",
               "--disable-pip-version-check", "--wheel-dir", str(out), str(tree)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_members(wheel: Path) -> None:
    """Every file of the package and both data folders, nothing of the tests, and nothing of a user's own."""
    assert wheel.name == f"edgeslm-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        members = set(archive.namelist())
    source = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "edgeslm").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    data = {
        f"edgeslm/{path.relative_to(ROOT).as_posix()}"
        for folder in ("recipes", "devices")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".tsv" and "__pycache__" not in path.parts
    }
    assert source | data <= members
    extra = members - source - data
    assert all(name.startswith(f"edgeslm-{__version__}.dist-info/") for name in extra), extra
    assert not {f"edgeslm/{name}" for name in PRIVATE} & members
    assert "edgeslm/py.typed" in members
    assert "edgeslm/recipes/data/chat.jsonl" in members


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"edgeslm-{__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert "edgeslm = edgeslm.cli:main" in scripts
    assert "Requires-Python: >=3.11" in metadata
    plain = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.M)
    assert {name.lower() for name in plain} == DEVICE_HALF, "nothing else without an extra"


def test_data_is_found_in_an_installation(wheel: Path, tmp_path: Path) -> None:
    """From an unpacked wheel, far from the source tree: profiles, recipes and the template."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import json, edgeslm\n"
        "from edgeslm.device import list_devices, load_device\n"
        "from edgeslm.recipe import load_recipe, recipe_template\n"
        "from edgeslm.schema import shipped_folder\n"
        "recipes = [load_recipe(p).name for p in sorted(shipped_folder('recipes').glob('*.toml'))]\n"
        "print(json.dumps([edgeslm.__file__, list_devices(), recipes, recipe_template('a/b', 'rpi5-8gb')]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    where, devices, recipes, template = json.loads(done.stdout)
    assert where.startswith(str(tmp_path))
    assert devices == list_devices()
    assert "smollm2-135m-quickstart" in recipes
    assert 'device = "rpi5-8gb"' in template


@pytest.mark.slow
def test_the_device_half_is_small(wheel: Path, tmp_path: Path) -> None:
    """What pip adds to a fresh environment, bytecode and all; NumPy apart, which both engines require themselves."""
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    found = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    site = Path(found.strip())
    before = sizes(site)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
               "--constraint", str(ROOT / "constraints.txt"), str(wheel)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "No matching distribution" in done.stderr:
        pytest.skip(f"pip finds no packages here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    added = {name: size - before.get(name, 0) for name, size in sizes(site).items()}
    whole = sum(added.values())
    numpy = sum(size for name, size in added.items() if name.startswith("numpy"))
    print(f"device half: {whole / 1e6:.1f} MB, of which NumPy {numpy / 1e6:.1f} MB")  # noqa: T201
    assert numpy > 10e6, "the walk saw what was installed"
    assert whole - numpy < MOST_BYTES, sorted(added.items(), key=lambda item: -item[1])[:10]
    for heavy in ("tokenizers", "huggingface_hub", "onnxruntime", "llama_cpp", "torch"):
        assert heavy not in added
    code = "import edgeslm, edgeslm.runtime.server, edgeslm.bench.report"
    subprocess.run([str(python), "-c", code], check=True, cwd=tmp_path)


def sizes(site: Path) -> dict[str, int]:
    """Bytes of each package of a site-packages folder."""
    found: dict[str, int] = {}
    for path in site.rglob("*"):
        if path.is_file():
            top = path.relative_to(site).parts[0]
            found[top] = found.get(top, 0) + path.stat().st_size
    return found


def test_data_is_found_in_the_source_tree() -> None:
    assert shipped_folder("devices") == ROOT / "devices"
    assert shipped_folder("recipes") == ROOT / "recipes"


def test_version_is_said_once_and_the_same() -> None:
    assert PROJECT["version"] == __version__


def test_constraints_pin_every_direct_dependency() -> None:
    """And each pin is one that pyproject.toml allows."""
    packaging = pytest.importorskip("packaging.requirements")
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert version, f"{line!r} pins nothing"
            pins[name.replace("_", "-").lower()] = version
    extras = PROJECT["optional-dependencies"].values()
    wanted = [packaging.Requirement(line) for lines in (PROJECT["dependencies"], *extras) for line in lines]
    needed = {one.name.replace("_", "-").lower(): one for one in wanted if one.name != "edgeslm"}
    assert set(needed) == set(pins)
    for name, requirement in needed.items():
        assert requirement.specifier.contains(pins[name]), requirement


def test_the_device_half_needs_no_torch() -> None:
    for extra in ("gguf", "test", "demo"):
        for line in PROJECT["optional-dependencies"][extra]:
            assert not re.match(r"torch|transformers|accelerate|peft|edgeslm\[workstation", line)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    if which("make") is None:
        pytest.skip("make is not installed")
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


def test_make_demo_is_one_build_of_the_quickstart() -> None:
    done = make("--dry-run", "demo")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(
        "edgeslm build recipes/quickstart.toml --out build/quickstart"
    )
    assert "-c constraints.txt" in done.stdout or (ROOT / ".venv" / ".demo").exists()


@pytest.mark.parametrize("target", ["test", "test-slow", "test-device", "lint", "types", "clean"])
def test_make_targets(target: str) -> None:
    assert make("--dry-run", target).returncode == 0


def test_slow_tests_bring_their_data_and_do_not_depend_on_them() -> None:
    rule = make("--dry-run", "--always-make", "test-slow").stdout.replace("\\\n", "")
    line = next(line for line in rule.splitlines() if "river==" in line)
    assert "--no-deps" in line
    assert "|| echo" in line


def test_make_explains_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make(f"PYTHON={old}", f"{tmp_path}/env/.made")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stdout
    assert not (tmp_path / "env").exists()


def test_ci_script_is_valid_bash() -> None:
    script = ROOT / ".ci" / "run"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert script.stat().st_mode & 0o100
