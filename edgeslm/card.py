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
        ("Architecture", f"{model['architecture']}, {wording.parameters(model['parameters'])} parameters"),
        ("Context", wording.count(model.get("context_length"), "token")),
        ("Types", f"{plan['scheme']}, {plan['bits_per_weight']:.2f} bits per weight"),
        ("Importance matrix", "yes" if plan.get("importance") else "no"),
    ]
    if quality:
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
    if fallbacks := wording.fallback_lines(plan["fallbacks"]):
        lines += [
            "",
            "Types that the model's shapes did not allow:",
            "",
            *(f"- {line}" for line in fallbacks),
        ]
    lines += [
        "",
        "Run it with any llama.cpp, or with edgeslm:",
        "",
        "```sh",
        "pip install 'edgeslm[gguf]'",
        "edgeslm inspect . --verify",
        "edgeslm chat .",
        "```",
    ]
    return "\n".join(lines) + "\n"
