"""A bundle used from Node.js: the README's programs, run as they stand, give edgeslm's own probabilities."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.bundle import open_bundle, write_bundle
from edgeslm.runtime.ort import OrtClassifier
from tests import onnx_models

if TYPE_CHECKING:
    from edgeslm.bundle import Bundle

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

README = Path(__file__).resolve().parents[1] / "README.md"
PACKAGES = ("onnxruntime-node@1.30.0", "@huggingface/tokenizers@0.2.0")
INSTALL_S = 240
DECISION = {
    "training_prior": [0.5, 0.5],
    "prior": [0.1, 0.9],
    "costs": [5.0, 1.0],
    "labels": ["failure", "normal"],
}
TEXTS = [
    "Win MONEY now!", "meeting at noon", "hello", "unknown words, that go on and on and on", "Héllo, nöön",
    "money " * 5000, "now",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    """A folder with the packages, kept from run to run."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node or npm here")
    folder = Path(request.config.cache.mkdir("node"))
    wanted = " ".join(PACKAGES)
    marker = folder / "installed.txt"
    if not marker.is_file() or marker.read_text() != wanted:
        try:
            done = subprocess.run(
                ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *PACKAGES],
                cwd=folder, capture_output=True, text=True, check=False, timeout=INSTALL_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm install took longer than {INSTALL_S} s")
        if done.returncode:
            pytest.skip(f"npm can't install: {done.stderr.strip()[-200:]}")
        marker.write_text(wanted)
    return folder


def program(title: str) -> str:
    """The JavaScript block of the README whose first line names it."""
    blocks = re.findall(r"```js\n(// .*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    found = [block for block in blocks if block.startswith(f"// {title}")]
    assert len(found) == 1, f"the README has no program {title}"
    return str(found[0])


def run(folder: Path, title: str, *arguments: str | Path, stdin: str = "") -> list[dict[str, Any]]:
    path = folder / title
    path.write_text(program(title), encoding="utf-8")
    done = subprocess.run(
        ["node", str(path), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def word_pieces() -> str:
    """tokenizer.json as encoders have it: WordPiece, lower case, with marks at both ends."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = {word: number for number, word in enumerate(onnx_models.WORDS)}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A hello", special_tokens=[("[CLS]", 2), ("hello", 9)]
    )
    return str(tokenizer.to_str())


def assert_alike(found: list[dict[str, Any]], classifier: OrtClassifier, expected: np.ndarray) -> None:
    posterior = classifier.decision.posterior(expected)
    labels = [classifier.labels[number] for number in classifier.decision.choose(posterior)]
    assert [answer["label"] for answer in found] == labels
    told = [[answer["probabilities"][label] for label in classifier.labels] for answer in found]
    np.testing.assert_allclose(told, posterior, atol=1e-4)


def test_texts(folder: Path, tmp_path: Path) -> None:
    files: dict[str, Any] = {"model.onnx": onnx_models.text_model(), "tokenizer.json": word_pieces()}
    decision = {
        "labels": list(onnx_models.LABELS), "training_prior": [0.2, 0.3, 0.5], "prior": [0.4, 0.4, 0.2],
        "costs": [1.0, 2.0, 1.0],
    }  # fmt: skip
    bundle = write_bundle(
        tmp_path / "b", files=files, manifest=onnx_models.manifest("text", decision=decision)
    )
    classifier = OrtClassifier(open_bundle(bundle.path), threads=1)
    found = run(folder, "classify.mjs", bundle.path, stdin="\n".join(TEXTS))
    assert_alike(found, classifier, classifier.predict_texts(TEXTS))


def sensors(path: Path) -> Bundle:
    files: dict[str, Any] = {"model.onnx": onnx_models.sensor_model()}
    return write_bundle(path, files=files, manifest=onnx_models.manifest("sensors", decision=DECISION))


def test_readings(folder: Path, tmp_path: Path) -> None:
    bundle = sensors(tmp_path / "b")
    center, scale = (np.asarray(onnx_models.NORMALIZATION[key]) for key in ("center", "scale"))
    windows = center + scale * np.random.default_rng(0).standard_normal((40, onnx_models.ROWS, 3))
    windows[3, 0, 0] = windows[4, 2, 1] = np.nan
    windows[5, :, 2] = np.nan
    with (tmp_path / "w.jsonl").open("w") as file:
        for window in windows:
            held = [[None if np.isnan(value) else value for value in row] for row in window]
            file.write(json.dumps(held) + "\n")
    classifier = OrtClassifier(open_bundle(bundle.path), threads=1)
    found = run(folder, "sensors.mjs", bundle.path, tmp_path / "w.jsonl")
    assert_alike(found, classifier, classifier.predict_readings(windows))
