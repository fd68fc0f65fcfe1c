"""The house: who may import whom, what the device half may load, and how long files and functions are."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "edgeslm"

FILES = {"gguf_file", "safetensors_file", "onnx_file"}
LEAVES = {"errors", "progress", "wording"}

# Module or folder -> what it may import from edgeslm.  A folder stands for all of its modules.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {"bundle", "errors", "recipe"},
    "__main__": {"cli"},
    "errors": set(),
    "progress": set(),
    "wording": set(),
    "gguf_file": {"errors"},
    "safetensors_file": {"errors"},
    "onnx_file": {"errors"},
    "operators": {"errors", "onnx_file"},
    "schema": {"errors"},
    "atomic": {"errors"},
    "footprint": {"gguf_file"},
    "bundle": {"errors", "progress", "atomic", *FILES},
    "specs": set(),
    "recipe_tables": {"schema", "specs"},
    "consistency": {"errors", "recipe", "recipe_tables", "specs"},
    "recipe": {"errors", "schema", "specs", "recipe_tables", "consistency"},
    "linux_host": set(),
    "device": {"errors", "schema", "linux_host"},
    "workload": {"errors", "bundle", "footprint", *FILES, "stages"},
    "prediction": {"errors", "device", "footprint", "workload"},
    "probing": {"errors", "device"},
    "console_fit": {"wording", "layout"},
    "device_commands": {"options", "console_fit", "prediction", "probing"},
    "doctor": {"errors", "device", "versions"},
    "traps": {"operators", *FILES},
    "inspection": {"errors", "bundle", "footprint", "traps", "operators", *FILES, "stages.checkpoint"},
    "stages": {
        "errors", "progress", "atomic", "versions", "specs", "recipe", "device", "bundle", "readings", *FILES, "stages",
    },
    "runtime": {"errors", "progress", "bundle", "gguf_file", "onnx_file", "operators", "readings", "runtime"},
    "bench": {
        "errors", "progress", "atomic", "wording", "wording_learning", "wording_power", "device", "versions", "bundle",
        *FILES, "runtime", "bench",
    },
    "gate": {"errors", "wording", "specs"},
    "wording_learning": {"wording"},
    "wording_power": {"wording"},
    "console_power": {"wording", "wording_power", "layout"},
    "layout": set(),
    "console_learning": {"wording", "wording_learning", "layout"},
    "console": {"errors", "wording", "layout", "console_learning", "console_variants", "console_power"},
    "card": {"wording"},
    "work": {"errors", "progress", "atomic", "bundle"},
    "measuring": {
        *LEAVES, "specs", "recipe", "device", "bundle", "footprint", "gguf_file", "stages", "runtime", "bench",
    },
    "foresight": {"specs", "recipe", "versions", "work", "stages"},
    "learning": {*LEAVES, "foresight", "atomic", "specs", "recipe", "versions", "work", "measuring", "stages"},
    "language": {
        "wording", "specs", "recipe", "device", "versions", "bundle", *FILES, "work", "measuring", "learning", "stages",
        "runtime", "bench",
    },
    "watching": {"progress", "bundle", "stages", "runtime", "bench"},
    "classifying": {
        "watching", "progress", "specs", "recipe", "device", "versions", "bundle", "work", "learning", "stages",
        "runtime", "bench",
    },
    "assembly": {"bundle", "card", "classifying", "language", "learning", "recipe", "versions"},
    "quantizing": {
        "errors", "progress", "specs", "recipe", "consistency", "bundle", "work", "measuring", "learning",
        "language", "classifying", "assembly", "gate", "stages",
    },
    "variants": {"errors", "atomic", "bundle", "specs", "recipe", "work", "bench"},
    "console_variants": {"wording", "layout"},
    "pipeline": {
        *LEAVES, "atomic", "variants", "specs", "recipe", "device", "versions", "bundle", *FILES, "inspection",
        "gate", "operators",
        "assembly", "work", "measuring", "learning", "language", "classifying", "stages", "runtime", "bench",
    },
    "options": {"progress"},
    "chat_commands": {"options", "runtime", "fleet_commands"},
    "serve_commands": {"__init__", "options", "bundle", "runtime"},
    "readings": set(),
    "console_predict": {"wording"},
    "console_fleet": {"wording", "layout"},
    "fleet": {
        "__init__", "errors", "progress", "wording", "device", "doctor", "bundle", "onnx_file", "operators",
        "bench.report", "fleet",
    },
    "cross_compile": {"errors", "progress", "atomic"},
    "wheelhouse": {"__init__", "errors", "progress", "atomic", "bundle", "device", "linux_host", "cross_compile"},
    "wheelhouse_commands": {"options", "layout", "wording", "wheelhouse"},
    "fleet_commands": {"options", "errors", "console_fleet", "fleet"},
    "predict_commands": {"options", "console_predict", "runtime"},
    "setup_commands": {"options", "console", "device", "doctor", "recipe"},
    "versions": {"__init__"},
    "table_options": {"specs", "recipe_tables", "schema"},
    "training_commands": {"options", "table_options", "specs", "recipe", "recipe_tables", "learning", "console"},
    "quantize_commands": {"options", "table_options", "specs", "quantizing", "console"},
    "cli": {
        "options", *LEAVES, *FILES, "bundle", "recipe", "device", "doctor", "inspection", "pipeline", "gate",
        "console", "stages", "runtime", "bench", "fleet_commands",
    },
}  # fmt: skip

# (importer, imported): only inside a function, so that loading the importer stays cheap and free of torch.
ONLY_LAZILY = {
    ("inspection", "stages"), ("quantizing", "stages"), ("workload", "stages"),
    ("device_commands", "console_fit"), ("device_commands", "prediction"), ("device_commands", "probing"),
    ("pipeline", "stages"), ("pipeline", "runtime"), ("pipeline", "bench"),
    ("variants", "bench"),
    ("measuring", "stages"), ("measuring", "runtime"), ("measuring", "bench"), ("learning", "stages"),
    ("foresight", "stages"),
    *((name, half) for name in ("language", "classifying", "watching") for half in ("stages", "runtime", "bench")),
    ("options", "progress"), ("training_commands", "learning"), ("training_commands", "console"),
    ("quantize_commands", "quantizing"), ("quantize_commands", "console"),
    ("fleet_commands", "fleet"), ("fleet_commands", "console_fleet"), ("chat_commands", "fleet_commands"),
    ("wheelhouse_commands", "wheelhouse"), ("wheelhouse_commands", "layout"), ("wheelhouse_commands", "wording"),
    ("predict_commands", "runtime"), ("predict_commands", "console_predict"),
    *(("cli", name) for name in MAY_IMPORT["cli"] - {"options"}),
}  # fmt: skip

WORKSTATION_LIBRARIES = {"torch", "transformers", "optimum", "onnx", "accelerate", "peft", "datasets"}

TORCH_MODULES = {f"edgeslm.stages.{name}" for name in ("losses", "networks", "sensor_net", "students")}
"""Networks and losses: torch at the top, and so loaded only inside functions of others."""

FILE_LINES = 400
FUNCTION_LINES = 60
LONG_FILES: dict[str, str] = {}
"""File -> why it can't be shorter."""
VISIBLE_ALGORITHMS: dict[str, str] = {}
"""file:function -> the one algorithm that it shows."""


class Import(NamedTuple):
    path: Path
    line: int
    module: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit(module: str) -> str:
    """edgeslm.stages.ggml -> stages; edgeslm.cli -> cli; edgeslm -> __init__."""
    return module.split(".")[1] if "." in module else "__init__"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[Import]:
    """Every import of a file, those inside functions too."""
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend(Import(path, child.lineno, alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: relative import"
                assert child.module is not None
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    is_module = child.module.startswith("edgeslm") and exists(whole)
                    found.append(Import(path, child.lineno, whole if is_module else child.module, lazy))
            typing_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, lazy or inside or typing_only)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def exists(module: str) -> bool:
    where = ROOT / Path(*module.split("."))
    return where.with_suffix(".py").is_file() or (where / "__init__.py").is_file()


def all_imports() -> list[Import]:
    return [one for path in modules() for one in imports(path)]


def test_the_walk_sees_function_local_imports() -> None:
    """The oracle of this file: cli imports pipeline only inside its functions."""
    found = imports(PACKAGE / "cli.py")
    assert any(one.module == "edgeslm.pipeline" and one.lazy for one in found) or not exists(
        "edgeslm.pipeline"
    )
    assert any(one.module == "click" and not one.lazy for one in found)
    assert any(one.module == "edgeslm.inspection" and one.lazy for one in found)


def test_every_module_is_in_the_table() -> None:
    units = {unit(module_of(path)) for path in modules()}
    assert units <= set(MAY_IMPORT), f"add to the table, with an argument: {units - set(MAY_IMPORT)}"


def test_imports_follow_the_table() -> None:
    wrong = []
    for one in all_imports():
        if not one.module.startswith("edgeslm."):
            continue
        allowed = MAY_IMPORT[unit(module_of(one.path))]
        if unit(one.module) not in allowed and one.module.removeprefix("edgeslm.") not in allowed:
            wrong.append(str(one))
    assert not wrong, "\n".join(wrong)


def test_heavy_imports_are_lazy() -> None:
    wrong = [
        str(one)
        for one in all_imports()
        if (unit(module_of(one.path)), unit(one.module)) in ONLY_LAZILY
        and one.module.startswith("edgeslm.")
        and not one.lazy
    ]
    assert not wrong, "\n".join(wrong)


def test_only_stages_import_workstation_libraries() -> None:
    """Not even lazily elsewhere; and in stages only lazily, so that plain look-ups stay fast."""
    wrong = [
        str(one)
        for one in all_imports()
        if one.module.split(".")[0] in WORKSTATION_LIBRARIES
        and not (unit(module_of(one.path)) == "stages" and (one.lazy or module_of(one.path) in TORCH_MODULES))
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_of_torch_are_imported_lazily() -> None:
    wrong = [
        str(one)
        for one in all_imports()
        if one.module in TORCH_MODULES and not one.lazy and module_of(one.path) not in TORCH_MODULES
    ]
    assert not wrong, "\n".join(wrong)


def load(*names: str) -> set[str]:
    """Top-level modules in a fresh interpreter after importing `names`."""
    code = "import json, sys\n" + "".join(f"import {name}\n" for name in names)
    code += "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_device_half_loads_without_workstation_libraries() -> None:
    names = [
        module_of(path)
        for path in modules()
        if unit(module_of(path)) != "stages" and path.stem not in ("__main__",)
    ]
    assert "edgeslm.device" in names
    assert "edgeslm.runtime.runner" in names
    assert not load(*names) & WORKSTATION_LIBRARIES


def test_each_device_module_loads_alone() -> None:
    """One at a time in one interpreter, in both orders: no module leans on another being loaded first."""
    names = [module_of(path) for path in modules() if unit(module_of(path)) in ("runtime", "bench")]
    for order in (names, names[::-1]):
        assert not load(*order) & WORKSTATION_LIBRARIES


HELP = """
import json, resource, sys
sys.argv = ["edgeslm", "--help"]
try:
    from edgeslm.cli import main
    main()
except SystemExit as ended:
    assert not ended.code
used = resource.getrusage(resource.RUSAGE_SELF)
sys.stderr.write(json.dumps({"cpu_s": used.ru_utime + used.ru_stime, "modules": sorted(sys.modules)}))
"""


def test_help_is_light(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, cwd=ROOT, check=True)
    told = json.loads(done.stderr)
    with capsys.disabled():
        sys.stdout.write(f"\n--help: {told['cpu_s']:.3f} s of CPU, {len(told['modules'])} modules\n")
    assert "Usage:" in done.stdout
    heavy = {"numpy", "rich", "jinja2", "psutil", "tokenizers", "llama_cpp"} | WORKSTATION_LIBRARIES
    assert not heavy & set(told["modules"])
    own = {name for name in told["modules"] if name.startswith("edgeslm")}
    assert own <= {"edgeslm", "edgeslm.cli", "edgeslm.options", "edgeslm.errors"}


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in modules()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > FILE_LINES
    }
    assert not set(long) - set(LONG_FILES), long
    assert set(LONG_FILES) <= set(long), "no longer long: take it off the list"


def test_functions_are_short() -> None:
    long = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert not set(long) - set(VISIBLE_ALGORITHMS), long
    assert set(VISIBLE_ALGORITHMS) <= set(long), "no longer long: take it off the list"


def test_nothing_is_left_undone() -> None:
    words = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    wrong = []
    for folder in ("edgeslm", "tests", "benchmarks", "recipes", "devices"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".toml", ".sh"):
                assert path.stem not in ("utils", "helpers", "common", "misc"), path
                for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                    if words.search(line):
                        wrong.append(f"{path.relative_to(ROOT)}:{number}")
    assert not wrong, wrong


def test_no_module_reads_the_environment_or_keeps_global_state() -> None:
    wrong = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Global):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: global")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, wrong


@pytest.mark.parametrize("path", [path for path in modules() if path.stem != "__main__"], ids=module_of)
def test_modules_say_what_they_are(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
