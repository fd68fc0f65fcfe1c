"""Results side by side as JSON, Markdown and one self-contained HTML page.

A report document (records.py) becomes sections of blocks (summary.py, findings.py, provenance.py), and each
template renders the same blocks: what the page says, the Markdown says too, plots aside.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from edgeslm import wording
from edgeslm.atomic import atomic_write
from edgeslm.bench import deciding, endurance, findings, learned, pareto, provenance, summary
from edgeslm.bench.blocks import Section, at
from edgeslm.bench.records import load_results, report_document
from edgeslm.bench.shapes import SCHEMA
from edgeslm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from edgeslm.bench.blocks import Entry

__all__ = ["load_results", "render_html", "render_json", "render_markdown", "report_document", "write_report"]

SECTIONS = (
    ("summary", "Summary", summary.summary),
    ("choosing", "What is worth its cost", pareto.trade_offs),
    ("deciding", "How well it decides", deciding.deciding),
    ("quality", "Quality before and after", findings.quality),
    ("data", "Data", learned.data),
    ("training", "Training", learned.training),
    ("pruning", "Pruning", learned.pruning),
    ("size", "Size", findings.size),
    ("speed", "Speed", findings.speed),
    ("power", "Power, heat and endurance", endurance.power_and_heat),
    ("memory", "Memory", findings.memory),
    ("machine", "Machine", provenance.machine),
    ("origin", "What was built from what", provenance.origin),
    ("reproduce", "How to reproduce", provenance.reproduce),
)
"""In reading order."""


def write_report(results: Iterable[Path], out: Path) -> dict[str, Any]:
    """Write the report on `results` to a directory, or to one file that ends in .html, .md or .json.

    Returns {schema, html, markdown, json}: the paths written, null for what was not asked for.
    Raises DataError naming a file that is no record.
    """
    document = report_document(load_results(results))
    formats = {
        "html": ("report.html", render_html),
        "markdown": ("report.md", render_markdown),
        "json": ("report.json", render_json),
    }
    single = {".html": "html", ".md": "markdown", ".json": "json"}.get(out.suffix)
    if single is None and out.exists() and not out.is_dir():
        raise DataError(
            f"{out}: a file, not a directory",
            hint="name a directory, or a file that ends in .html, .md or .json",
        )
    (out if single is None else out.parent).mkdir(parents=True, exist_ok=True)
    written: dict[str, Any] = {"schema": SCHEMA, **dict.fromkeys(formats)}
    for key, (name, render) in formats.items():
        if single in (None, key):
            path = out / name if single is None else out
            atomic_write(path, render(document))
            written[key] = str(path)
    return written


def render_json(document: Mapping[str, Any]) -> str:
    """The document itself."""
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def render_html(document: Mapping[str, Any]) -> str:
    """One page with its style and its plots inside; jinja escapes every text of a record."""
    return _render("report.html.j2", document)


def render_markdown(document: Mapping[str, Any]) -> str:
    """The same sections for a pull request: tables and lists, no HTML, no plots."""
    return _render("report.md.j2", document)


def _render(template: str, document: Mapping[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=template.endswith(".html.j2"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters.update(md=markdown_text, fence=fence)
    source = files("edgeslm.bench").joinpath("templates", template).read_text(encoding="utf-8")
    shared, labels = short_names([entry["label"] for entry in document["results"]])
    entries = [entry | {"label": label} for entry, label in zip(document["results"], labels, strict=True)]
    made = [Section(name=name, title=title, blocks=make(entries)) for name, title, make in SECTIONS]
    return environment.from_string(source).render(
        title=_title(entries, shared),
        subtitle=_subtitle(entries),
        verdicts=summary.verdicts(entries),
        sections=[section for section in made if section.blocks],
    )


def _title(entries: Sequence[Entry], shared: str) -> str:
    if len(entries) == 1:
        return str(entries[0]["label"])
    return (
        f"{shared}: {len(entries)} results side by side" if shared else f"{len(entries)} results side by side"
    )


def short_names(labels: Sequence[str]) -> tuple[str, list[str]]:
    """What all labels begin with, up to a hyphen, and the rest of each: (a, [q4, q8]) of a-q4 and a-q8."""
    words = [label.split("-") for label in labels]
    count = 0
    while len(labels) > 1 and all(len(each) > count + 1 for each in words):
        if len({each[count] for each in words}) > 1:
            break
        count += 1
    return "-".join(words[0][:count]) if words else "", ["-".join(each[count:]) for each in words]


def _subtitle(entries: Sequence[Entry]) -> str:
    """The model and scheme of one result, the names of several."""
    if len(entries) != 1:
        return ", ".join(entry["label"] for entry in entries)
    entry = entries[0]
    parameters, source = at(entry, "artifact", "parameters"), at(entry, "model", "source")
    parts = (
        at(entry, "quantization", "scheme"),
        at(entry, "model", "architecture") or at(entry, "artifact", "architecture"),
        f"{wording.parameters(parameters)} parameters" if parameters else None,
        f"made from {source}" if source else None,
    )
    return ", ".join(part for part in parts if part)


def markdown_text(text: str) -> str:
    """Text that stays itself in GitHub's Markdown: one line, no HTML, no cell ends, links or emphasis."""
    line = " ".join(str(text).split())
    line = re.sub(r"([\\`*<|~]|(?<!\w)_|_(?!\w)|\](?=[(\[:]))", r"\\\1", line)
    return re.sub(r"^([>#+-]|\d+[.)](?=\s))", r"\\\1", line)  # no quote, heading or list


def fence(text: str) -> str:
    """A fence of backticks longer than any in `text`."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
