"""The model card of a bundle: its README.md, out of the manifest's facts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm import wording

if TYPE_CHECKING:
    from collections.abc import Mapping


def model_card(manifest: Mapping[str, Any]) -> str:
    """Markdown that says what the bundle is, what it lost and how it is run; equal facts, equal bytes."""
    model, plan, quality = manifest["model"], manifest["quantization"], manifest.get("quality") or {}
    facts = [
        ("Made of", f"`{model['source']}` (sha256 {model['source_sha256'][:16]}...)"),
        ("Licence", model.get("licence") or "not stated by the source"),
        ("Licence of the data", (manifest.get("data") or {}).get("licence") or "not stated by the recipe"),
        ("Architecture", f"{model['architecture']}, {wording.parameters(model['parameters'])} parameters"),
        ("Made by", ", ".join([*wording.stage_names(manifest.get("ancestry")), "quantize"])),
        ("Types", f"{plan['scheme']}, {plan['bits_per_weight']:.2f} bits per weight"),
        *(_classifier_facts(manifest) if "decision" in manifest else _language_facts(manifest)),
    ]
    if quality.get("schema") == "edgeslm.task-quality/1":
        facts += [
            ("Measured on", wording.count(quality["protocol"]["examples"], "held-out example")),
            ("Accuracy", wording.interval(quality["accuracy"], as_percent=True)),
            ("Macro F1", wording.interval(quality["macro"]["f1"], as_percent=True)),
            ("Log-loss", f"{wording.interval(quality['log_loss'])} nats"),
        ]
    elif quality:
        kl = quality.get("kl_nats") or {}
        facts += [
            (
                "Measured on",
                wording.count(quality["protocol"]["scored_tokens"], "token") + " of held-out text",
            ),
            ("Perplexity", wording.interval(quality["perplexity"])),
            ("KL divergence", f"{wording.interval(kl.get('mean'))} nats"),
            ("Top-1 agreement", wording.interval(quality.get("top1_agreement"), as_percent=True)),
        ]
    lines = [
        f"# {manifest['name']}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts),
    ]
    if fallbacks := wording.fallback_lines(plan.get("fallbacks") or ()):
        lines += [
            "",
            "Types that the model's shapes did not allow:",
            "",
            *(f"- {line}" for line in fallbacks),
        ]
    return "\n".join([*lines, "", *_how_to_run(manifest)]) + "\n"


def _language_facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, plan = manifest["model"], manifest["quantization"]
    return [
        ("Context", wording.count(model.get("context_length"), "token")),
        ("Importance matrix", "yes" if plan.get("importance") else "no"),
    ]


def _classifier_facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    decision, read = manifest["decision"], manifest["model"]["preprocessing"]
    rates = zip(decision["labels"], decision["prior"], strict=True)
    facts = [("Classes and base rates", ", ".join(f"{name} {rate:.3g}" for name, rate in rates))]
    if read["kind"] == "text":
        return [*facts, ("Reads", f"texts of up to {read['max_tokens']} tokens")]
    return [*facts, ("Reads", f"windows of {read['rows']} rows of {', '.join(read['channels'])}")]


def _how_to_run(manifest: Mapping[str, Any]) -> list[str]:
    if "decision" in manifest:
        return [
            "Inputs, outputs and preprocessing are in `manifest.json`.  Measure it on labelled data of your own:",
            "",
            "```sh",
            "pip install 'edgeslm[onnx]'",
            "edgeslm inspect . --verify",
            "edgeslm eval . --text labelled.tsv",
            "edgeslm classify . mails.tsv"
            if manifest["task"] == "text-classification"
            else "edgeslm predict . readings.csv",
            "```",
        ]
    is_gguf = manifest["format"] == "gguf"
    return [
        "Run it with any llama.cpp, or with edgeslm:" if is_gguf else "Run it with edgeslm:",
        "",
        "```sh",
        f"pip install 'edgeslm[{manifest['format']}]'",
        "edgeslm inspect . --verify",
        "edgeslm chat .",
        "```",
    ]
