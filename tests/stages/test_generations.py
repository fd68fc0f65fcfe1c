"""Text that models write: prompts, ends and padding against texts continued one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from edgeslm.progress import Quiet  # noqa: E402
from edgeslm.stages import generations  # noqa: E402
from edgeslm.stages.checkpoint import model_directory  # noqa: E402
from tests.models import CORPUS, write_hf_model  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation

GREEDY = {"do_sample": False}
V = 10**6
"""More than there are: every token may be written."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("models") / "teacher"
    return model_directory(write_hf_model(path, "llama", tokenizer="smollm"), "teacher")


@pytest.fixture(scope="module")
def model(checkpoint: Any) -> Any:
    return checkpoint.load()


class Blocks:
    """Blocks of the corpus in a tokenizer's ids; the first `masked` labels are not counted."""

    def __init__(self, tokenizer: Any, count: int = 5, context: int = 16, masked: int = 0) -> None:
        ids = tokenizer.encode(CORPUS, add_special_tokens=False)[: count * context]
        self.ids = np.array(ids, np.int64).reshape(count, context)
        self.masked = masked

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        labels = self.ids[index].copy()
        labels[: self.masked] = generations.NOT_COUNTED
        return {"input_ids": self.ids[index], "labels": labels}


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ([5, 6, 7, 8], 2),
        ([-100, 6, 7, 8], 2),  # only the first, which nothing precedes
        ([-100, -100, 7, -100], 2),
        ([-100, -100, -100, 8], 3),
        ([-100] * 4, 2),
        ([5], 1),
    ],
)
def test_a_prompt_is_what_is_masked_or_half(labels: list[int], wanted: int) -> None:
    assert generations.prompt_length(np.array(labels)) == wanted


def greedily(model: Any, prompt: list[int], longest: int, end: int) -> list[int]:
    """The likeliest token, one at a time, without cache or padding."""
    ids = list(prompt)
    while len(ids) < longest and (len(ids) == len(prompt) or ids[-1] != end):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_batch_of_prompts_equals_each_alone(model: Any) -> None:
    prompts = [[5, 9, 33], [70], [8, 8, 120, 44, 2, 90, 17]]
    alone = [greedily(model, prompt, 12, -1) for prompt in prompts]
    end = alone[0][4]  # a token that the first text really comes to
    wanted = [greedily(model, prompt, 12, end) for prompt in prompts]
    model.train()
    found = generations.continue_texts(model, prompts, 12, end=(end,), width=V, **GREEDY)
    assert found == wanted
    assert len(found[0]) <= 5
    assert model.training
    model.eval()
    assert generations.continue_texts(model, prompts, 12, end=(), width=V, **GREEDY) == alone


def test_rows_that_pad_a_vocabulary_are_never_written(model: Any) -> None:
    torch.manual_seed(0)
    found = generations.continue_texts(model, [[5, 9, 33]] * 50, 12, end=(), width=40)
    assert 0 <= min(map(min, found)) <= max(map(max, found)) < 40


def test_samples_follow_the_models_distribution(model: Any) -> None:
    """First tokens of many samples against the softmax, by Pearson's chi-squared over the likely ones."""
    torch.manual_seed(0)
    prompt, count = [5, 9, 33], 4000
    found = generations.continue_texts(model, [prompt] * count, 4, end=(), width=V)
    drawn = np.bincount([text[0] for text in found], minlength=model.config.vocab_size)
    with torch.no_grad():
        shares = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()
    likely = shares * count > 10
    observed = np.append(drawn[likely], drawn[~likely].sum())
    expected = count * np.append(shares[likely], shares[~likely].sum())
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(observed) - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_blocks_count_what_was_written() -> None:
    ids, labels = generations.as_blocks([[1, 2], [3]], [[7, 8, 9], []], 4, pad=0)
    assert ids.tolist() == [[1, 2, 7, 8], [3, 0, 0, 0]]
    assert labels.tolist() == [[-100, -100, 7, 8], [-100] * 4]


def writer(checkpoint: Any, model: Any, student: Any = None, seed: int = 3) -> generations.Writer:
    own = checkpoint.tokenizer()
    return generations.Writer(
        teacher=model, own=own if student is not None else None, student=student or own,
        ends=(own.eos_token_id,), width=len(own), seed=seed,
    )  # fmt: skip


def test_the_teachers_blocks_begin_as_the_data_and_go_on_in_its_words(
    tmp_path: Path, checkpoint: Any, model: Any
) -> None:
    data = Blocks(checkpoint.tokenizer(), masked=6)
    path = tmp_path / "w.bin"
    records = generations.generate(writer(checkpoint, model), data, path, Quiet())
    written = generations.Written(records, data, 0.0, seed=0)
    assert len(written) == len(data)
    for index in range(len(data)):
        block = written[index]
        assert block["input_ids"].dtype == block["labels"].dtype == np.int64
        assert (block["input_ids"][:6] == data[index]["input_ids"][:6]).all()
        assert (block["labels"][:6] == generations.NOT_COUNTED).all()
        counted = block["labels"] != generations.NOT_COUNTED
        assert (block["labels"][counted] == block["input_ids"][counted]).all()
        assert counted.any()
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    generations.generate(writer(checkpoint, model), data, path, Quiet())
    assert path.read_bytes() == whole
    other = generations.generate(writer(checkpoint, model, seed=4), data, tmp_path / "v.bin", Quiet())
    assert other.path.read_bytes() != whole


def test_a_share_of_the_blocks_stays_true(tmp_path: Path, checkpoint: Any, model: Any) -> None:
    data = Blocks(checkpoint.tokenizer(), count=60, context=4)
    records = generations.generate(writer(checkpoint, model), data, tmp_path / "w.bin", Quiet())

    def true_ones(share: float) -> int:
        written = generations.Written(records, data, share, seed=1)
        return sum((written[index]["labels"] == data[index]["labels"]).all() for index in range(60))

    assert true_ones(1.0) == 60
    assert true_ones(0.0) < 10
    assert 15 <= true_ones(0.5) <= 45


def test_a_student_with_another_tokenizer_gets_the_same_text(
    tmp_path: Path, checkpoint: Any, model: Any
) -> None:
    path = write_hf_model(tmp_path / "student", "mistral")
    student = model_directory(path, "student").tokenizer()
    data = Blocks(student, count=3, context=40, masked=10)
    maker = writer(checkpoint, model, student)
    prompt = maker._to_teacher(data[0]["input_ids"][:10])
    assert maker.own.decode(prompt) == student.decode(data[0]["input_ids"][:10])
    ended = [*maker.own.encode(" and the quick brown fox", add_special_tokens=False), maker.ends[0]]
    back = maker._to_student(prompt, ended)
    assert back[-1] == student.eos_token_id
    assert student.decode(back[:-1]).strip() == "and the quick brown fox"
    ids, labels = maker.blocks([data[index] for index in range(3)], 0)
    assert ids.shape == labels.shape == (3, 40)
    assert (ids[:, :10] == data.ids[:, :10]).all()
    assert ids.max() < len(student)
