"""Packing against plain concatenation, and what of a conversation counts."""

from __future__ import annotations

import errno
import json
import re
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import DataError, EdgeslmError, ModelError
from edgeslm.progress import Quiet
from edgeslm.runtime.template import render_chat
from edgeslm.stages import packing
from edgeslm.stages.data import Document
from edgeslm.stages.packing import IGNORED, TokenBlocks, assistant_spans, collate_blocks, pack
from tests.models import CHATML, CORPUS, GEMMA_CHAT, LLAMA3_CHAT, MISTRAL_CHAT, PHI3_CHAT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    Render = Callable[[Sequence[Mapping[str, str]], bool], str]

pytestmark = pytest.mark.workstation

DROPS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen3's: the last turn is rendered otherwise than those before it."""
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Two. And + 1?"},
    {"role": "assistant", "content": "Three,\nas before: Two."},
)


def make_tokenizer(*, bos: bool = False, template: str | None = CHATML, metaspace: bool = False) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    raw = Tokenizer(models.BPE())
    if metaspace:
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet: list[str] = []
    else:
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [CORPUS], trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|endoftext|>", bos_token="<s>" if bos else None
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def stream(blocks: TokenBlocks) -> tuple[list[int], list[int]]:
    """All ids and all labels, end to end."""
    items = [blocks[index] for index in range(len(blocks))]
    return tuple(np.concatenate([item[key] for item in items]).tolist() for key in ("input_ids", "labels"))  # type: ignore[return-value]


def learned(blocks: TokenBlocks, tokenizer: Any) -> list[str]:
    """The text of each run of counted tokens."""
    ids, labels = stream(blocks)
    runs: list[list[int]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        if label == IGNORED:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


# --- plain text ---


def test_the_progress_counts_the_bytes_of_the_text(tmp_path: Path, tokenizer: Any) -> None:
    seen: list[Any] = []

    class Watch(Quiet):
        @contextmanager
        def task(self, name: str, total: float, unit: str = "") -> Iterator[Any]:
            seen.append((name, total, unit))
            yield seen.append

    texts = ["the lazy dog\n" * 30_000, "naïve café", "the end"]
    size = len("".join(texts).encode())
    pack(
        [Document(text=text) for text in texts],
        tokenizer,
        32,
        tmp_path / "out",
        text_bytes=size,
        progress=Watch(),
    )
    assert seen[0] == ("tokenizing", size, "bytes")
    assert len(seen) > 2
    assert sum(seen[1:]) == size


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("context", [8, 61])
def test_blocks_are_the_documents_end_to_end(tmp_path: Path, context: int, bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos)
    texts = [line for line in CORPUS.splitlines()[:9] if line] + ["a", "<|im_end|> is no mark here"]
    blocks = pack([Document(text=text) for text in texts], tokenizer, context, tmp_path / "out")

    whole: list[int] = []
    counts: list[bool] = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        whole += [*([3] if bos else []), *ids, 0]
        counts += [*([False] if bos else []), *([True] * len(ids)), True]
    size = -(-len(whole) // context) * context
    labels = np.full(size, IGNORED)
    labels[: len(whole)] = np.where(counts, whole, IGNORED)
    labels[::context] = IGNORED
    found_ids, found_labels = stream(blocks)
    assert found_ids == whole + [0] * (size - len(whole))
    assert found_labels == labels.tolist()
    assert (len(blocks), blocks.documents) == (size // context, len(texts))
    assert blocks.counted_tokens == int((labels != IGNORED).sum())


def test_batches_change_nothing(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Document(text=line) for line in CORPUS.splitlines() if line]
    found.insert(5, Document(messages=TALK))
    found.insert(9, Document(text="1+1=2", prompt="1+1="))
    one = stream(pack(found, tokenizer, 32, tmp_path / "one", completion_only=True))
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 150)
    assert stream(pack(found, tokenizer, 32, tmp_path / "many", completion_only=True)) == one


def test_a_long_document_is_cut_where_its_tokens_stay(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stream(pack([Document(text=CORPUS)], tokenizer, 64, tmp_path / "one"))
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 400)
    blocks = pack([Document(text=CORPUS)], tokenizer, 64, tmp_path / "many")
    assert stream(blocks) == whole
    assert blocks.documents == 1


def test_a_long_line_is_cut_all_the_same(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 50)
    for text in ("x" * 501, "x\n \n" * 30, "\n" * 200):
        blocks = pack([Document(text=text)], tokenizer, 64, tmp_path / "out")
        assert tokenizer.decode(stream(blocks)[0], skip_special_tokens=True) == text


def test_the_rest_is_filled_with_end_tokens_that_do_not_count(tmp_path: Path, tokenizer: Any) -> None:
    blocks = pack([Document(text="a b")], tokenizer, 8, tmp_path / "out")
    item = blocks[0]
    ids = tokenizer.encode("a b")
    assert item["input_ids"].tolist() == [*ids, *[0] * (8 - len(ids))]
    assert item["labels"].tolist() == [IGNORED, *ids[1:], 0, *[IGNORED] * (7 - len(ids))]
    assert item["labels"].dtype == np.int64


def test_a_last_block_with_nothing_to_predict_is_left_out(tmp_path: Path, tokenizer: Any) -> None:
    ids = tokenizer.encode("a b")
    assert len(pack([Document(text="a b")], tokenizer, len(ids), tmp_path / "out")) == 1


def test_batches_of_blocks(tmp_path: Path, tokenizer: Any) -> None:
    import torch

    blocks = pack([Document(text=CORPUS[:300])], tokenizer, 16, tmp_path / "out")
    batch = collate_blocks([blocks[0], blocks[1]])
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "input_ids": ((2, 16), torch.int64),
        "labels": ((2, 16), torch.int64),
    }


def test_blocks_are_found_again(tmp_path: Path, tokenizer: Any) -> None:
    blocks = pack([Document(text=CORPUS)], tokenizer, 64, tmp_path / "out")
    again = TokenBlocks.open(tmp_path / "out")
    assert again == blocks
    assert stream(again) == stream(blocks)
    assert again.summary() == {
        "examples": len(blocks),
        "documents": 1,
        "tokens": 64 * len(blocks),
        "counted_tokens": blocks.counted_tokens,
    }
    with pytest.raises(DataError, match="no packed blocks"):
        TokenBlocks.open(tmp_path)


# --- completions ---


@pytest.mark.parametrize("metaspace", [False, True])
def test_only_completions_count(tmp_path: Path, metaspace: bool) -> None:
    tokenizer = make_tokenizer(metaspace=metaspace)
    found = [Document(text="the man and the woman", prompt="the man "), Document(text="that inner line")]
    blocks = pack(found, tokenizer, 64, tmp_path / "out", completion_only=True)
    runs = [re.sub(r"<\|endoftext\|> ?", "|", text).strip() for text in learned(blocks, tokenizer)]
    assert runs == ["and the woman|that inner line|"]
    assert len(learned(pack(found, tokenizer, 64, tmp_path / "all"), tokenizer)) == 1


def test_a_token_that_is_partly_completion_counts(tmp_path: Path, tokenizer: Any) -> None:
    found = [Document(text="in the end", prompt="in ")]
    blocks = pack(found, tokenizer, 64, tmp_path / "out", completion_only=True)
    assert learned(blocks, tokenizer) == [" the end<|endoftext|>"]


# --- conversations ---


def renderer(template: str) -> Render:
    return lambda messages, prompt: render_chat(template, messages, "<s>", "</s>", prompt)


@pytest.mark.parametrize(
    ("template", "mark"),
    [(CHATML, "<|im_end|>\n"), (LLAMA3_CHAT, "<|eot_id|>"), (GEMMA_CHAT, "<end_of_turn>\n"), (PHI3_CHAT, "<|end|>\n"),
     (DROPS_THOUGHTS, "<|im_end|>\n"), (NO_SYSTEM, "</s>"), (MISTRAL_CHAT, "</s>")],
)  # fmt: skip
@pytest.mark.parametrize("system", [False, True])
def test_assistant_s_turns_with_their_end_marks(template: str, mark: str, system: bool) -> None:
    if template == MISTRAL_CHAT and system:
        pytest.skip("it renders a system message as an assistant's")
    text, spans = assistant_spans(TALK if system else TALK[1:], renderer(template))
    turns = [text[start:end] for start, end in spans]
    thought = "<think>\n\n</think>\n\n" if template == DROPS_THOUGHTS else ""
    assert turns == [f"Two.{mark}", f"{thought}Three,\nas before: Two.{mark}"]
    kept = text
    for start, end in reversed(spans):
        kept = kept[:start] + kept[end:]
    assert "Two. And + 1?" in kept
    assert "Three" not in kept


def test_turns_that_are_given_are_no_turns_to_learn() -> None:
    text, spans = assistant_spans(TALK, renderer(CHATML), given=4)
    assert [text[start:end] for start, end in spans] == ["Three,\nas before: Two.<|im_end|>\n"]
    text, spans = assistant_spans(TALK, renderer(NO_SYSTEM), given=4)
    assert [text[start:end] for start, end in spans] == ["Three,\nas before: Two.</s>"]


def test_a_conversation_that_the_assistant_begins() -> None:
    text, spans = assistant_spans(TALK[2:4], renderer(CHATML))
    assert [text[start:end] for start, end in spans] == ["Two.<|im_end|>\n"]


def test_a_template_that_hides_turns() -> None:
    hides = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="does not show an assistant's turn: 'Two"):
        assistant_spans(TALK, renderer(hides))


def test_only_assistant_s_turns_count(tmp_path: Path, tokenizer: Any) -> None:
    blocks = pack([Document(messages=TALK)] * 2, tokenizer, 512, tmp_path / "out", completion_only=True)
    turns = ["Two.<|im_end|>\n", "Three,\nas before: Two.<|im_end|>\n"]
    assert learned(blocks, tokenizer) == [turns[0], turns[1] + "<|endoftext|>"] * 2
    whole = tokenizer.decode(stream(pack([Document(messages=TALK)], tokenizer, 512, tmp_path / "all"))[0])
    assert re.sub(r"(<\|endoftext\|>)+$", "", whole) == tokenizer.apply_chat_template(TALK, tokenize=False)


def test_no_end_token_after_a_conversation_that_has_it(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=CHATML)
    tokenizer.eos_token = "<|im_end|>"
    blocks = pack([Document(messages=TALK)] * 3, tokenizer, 8, tmp_path / "out")
    one = tokenizer.encode(tokenizer.apply_chat_template(TALK, tokenize=False))
    assert stream(blocks)[0][: 3 * len(one)] == one * 3
    assert blocks.documents == 3


def test_no_second_begin_token_where_the_template_has_one(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos=True, template="{{ bos_token }}" + CHATML)
    ids, _ = stream(pack([Document(messages=TALK)], tokenizer, 256, tmp_path / "out"))
    assert ids.count(3) == 1
    assert ids[0] == 3


def test_one_s_own_renderer(tmp_path: Path, tokenizer: Any) -> None:
    seen = []

    def chat(template: str, messages: Any, bos: str, eos: str, prompt: bool) -> str:
        seen.append((template, bos, eos))
        return render_chat(template, messages, bos, eos, prompt)

    own = pack([Document(messages=TALK)], tokenizer, 64, tmp_path / "own", completion_only=True, chat=chat)
    assert set(seen) == {(CHATML, "", "<|endoftext|>")}
    theirs = pack([Document(messages=TALK)], tokenizer, 64, tmp_path / "theirs", completion_only=True)
    assert stream(own) == stream(theirs)


# --- what is refused ---


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "hold no tokens"),
        ([Document(text="")], "hold no tokens"),
        ([Document(text="x", prompt="x")], "hold nothing to learn"),
        ([Document(messages=TALK[:2])], "hold nothing to learn"),
    ],
)
def test_nothing_to_learn(tmp_path: Path, tokenizer: Any, found: list[Document], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pack(found, tokenizer, 16, tmp_path / "out", completion_only=True)
    assert not list(tmp_path.iterdir())


def test_a_model_without_chat_template(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no chat template"):
        pack([Document(messages=TALK)], make_tokenizer(template=None), 16, tmp_path / "out")
    with pytest.raises(ModelError, match="refuses a conversation"):
        pack([Document(messages=TALK)], make_tokenizer(template="{{ 1 / 0 }}"), 16, tmp_path / "out")


def test_a_tokenizer_without_end_token(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS"):
        pack([Document(text="x")], tokenizer, 16, tmp_path / "out")


def test_a_full_disk(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing.ArrayWriter, "append", full)
    with pytest.raises(EdgeslmError, match=r"can't write .*out: No space left.*free some space"):
        pack([Document(text=CORPUS)], tokenizer, 16, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_damaged_facts(tmp_path: Path, tokenizer: Any) -> None:
    pack([Document(text="a b c")], tokenizer, 16, tmp_path / "out")
    (tmp_path / "out" / "blocks.json").write_text(json.dumps({"blocks": 3}))
    with pytest.raises(DataError, match="no packed blocks"):
        TokenBlocks.open(tmp_path / "out")


def test_memory_does_not_grow_with_the_documents(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 2**13)
    lines = [line for line in CORPUS.splitlines() if line]

    def peak_bytes(count: int) -> int:
        found = (Document(text=lines[at % len(lines)] + str(at)) for at in range(count))
        tracemalloc.start()
        blocks = pack(found, tokenizer, 128, tmp_path / "out")
        for index in range(len(blocks)):
            blocks[index]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak_bytes(100)
    assert peak_bytes(5000) < peak_bytes(500) + 2**18
