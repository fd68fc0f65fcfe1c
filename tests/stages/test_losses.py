"""Distillation losses: against brute force in numpy, closed limits, and finite differences."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgeslm.stages import losses  # noqa: E402

pytestmark = pytest.mark.workstation

B, S, V = 2, 5, 11


def logits(seed: int, *shape: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(shape, generator=generator, dtype=torch.float64)


def mask() -> Any:
    return torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)


def shares(row: Any, temperature: float = 1.0) -> Any:
    """Softmax of one row, in float64."""
    scaled = row.numpy() / temperature
    exponentials = np.exp(scaled - scaled.max())
    return exponentials / exponentials.sum()


def kl(p: Any, q: Any) -> float:
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def js(p: Any, q: Any, beta: float = 0.5) -> float:
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def counted_loss(
    student: Any, teacher: Any, counted: Any, temperature: float, divergence: str = "forward"
) -> Any:
    """The soft loss over the counted positions of [B, S, V] logits."""
    return losses.soft_loss(student[counted], teacher[counted], temperature, divergence)


BRUTE = {"forward": kl, "reverse": lambda p, q: kl(q, p), "js": js}


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_divergence_equals_brute_force(divergence: str, temperature: float) -> None:
    student, teacher = logits(0, B, S, V), logits(1, B, S, V)
    wanted = temperature**2 * sum(
        BRUTE[divergence](shares(teacher[b, s], temperature), shares(student[b, s], temperature))
        for b in range(B)
        for s in range(S)
        if mask()[b, s]
    )
    found = counted_loss(student, teacher, mask(), temperature, divergence)
    assert found.item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_gradients_are_those_of_finite_differences(divergence: str) -> None:
    student = logits(2, 1, S, V).requires_grad_()
    teacher = logits(3, 1, S, V)
    counted = mask()[:1]
    kept = losses.top_k(teacher[0], 4, 2.0)
    assert torch.autograd.gradcheck(lambda x: counted_loss(x, teacher, counted, 2.0, divergence), student)
    assert torch.autograd.gradcheck(lambda x: losses.top_k_loss(x[0], kept, 2.0, divergence), student)


def test_the_gradient_keeps_its_size_over_temperature() -> None:
    """Hinton et al.: with T^2 the gradient tends to (student - teacher) / V for zero-mean logits, T to infinity."""
    student, teacher = logits(4, 1, 1, V), logits(5, 1, 1, V)
    student, teacher = student - student.mean(), teacher - teacher.mean()
    student.requires_grad_()
    counted_loss(student, teacher, torch.ones(1, 1, dtype=torch.bool), 1e4).backward()
    assert torch.allclose(student.grad, (student - teacher).detach() / V, rtol=2e-3, atol=1e-4)


def test_generalized_jsd_has_both_divergences_as_limits() -> None:
    student, teacher = logits(6, 7, V).log_softmax(-1), logits(7, 7, V).log_softmax(-1)
    forward = losses.divergence_of(student, teacher, "forward")
    reverse = losses.divergence_of(student, teacher, "reverse")
    tiny = 1e-7
    near_teacher = losses.generalized_jsd(student, teacher, tiny) / tiny
    near_student = losses.generalized_jsd(student, teacher, 1 - tiny) / tiny
    assert torch.allclose(near_teacher, forward, rtol=1e-3)
    assert torch.allclose(near_student, reverse, rtol=1e-3)
    half = losses.generalized_jsd(student, teacher)
    assert torch.allclose(half, losses.generalized_jsd(teacher, student))
    assert float(half.max()) <= np.log(2)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_generalized_jsd_equals_brute_force(beta: float) -> None:
    student, teacher = logits(8, V), logits(9, V)
    found = losses.generalized_jsd(student.log_softmax(-1), teacher.log_softmax(-1), beta)
    assert found.item() == pytest.approx(js(shares(teacher), shares(student), beta), rel=1e-12)


def test_impossible_tokens_cost_nothing() -> None:
    """A teacher may rule tokens out by -inf; a student that does so too is at distance 0."""
    teacher = logits(12, B, S, V)
    teacher[..., 3:6] = -torch.inf
    student = teacher.clone().requires_grad_()
    for divergence in losses.DIVERGENCES:
        distance = counted_loss(student, teacher, mask(), 1.0, divergence)
        assert distance.item() == pytest.approx(0, abs=1e-12)
        distance.backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_top_k_equals_the_full_divergence_when_k_is_the_vocabulary(
    divergence: str, temperature: float
) -> None:
    student, teacher = logits(13, B, S, V).requires_grad_(), logits(14, B, S, V)
    student, teacher = student[mask()], teacher[mask()]
    full = losses.soft_loss(student, teacher, temperature, divergence)
    (wanted,) = torch.autograd.grad(full, student)
    for k in (V, V + 100):
        kept = losses.top_k(teacher, k, temperature)
        found = losses.top_k_loss(student, kept, temperature, divergence)
        assert found.item() == pytest.approx(full.item(), rel=1e-12)
        (gradient,) = torch.autograd.grad(found, student)
        assert torch.allclose(gradient, wanted, rtol=1e-10)


@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_top_k_with_its_tail_is_a_lower_bound_that_grows_with_k(divergence: str) -> None:
    student, teacher = logits(15, S, V), logits(16, S, V)
    bounds = [
        losses.top_k_loss(student, losses.top_k(teacher, k), 1.0, divergence).item() for k in range(1, V + 1)
    ]
    full = losses.soft_loss(student, teacher, 1.0, divergence).item()
    assert all(low <= high + 1e-12 for low, high in pairwise(bounds))
    assert bounds[0] < full
    assert bounds[-1] == pytest.approx(full, rel=1e-12)


@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_top_k_equals_brute_force_over_merged_tokens(divergence: str) -> None:
    student, teacher, k = logits(17, V), logits(18, V), 3
    p, q = shares(teacher), shares(student)
    order = np.argsort(-p)[:k]
    merged = [np.append(x[order], 1 - x[order].sum()) for x in (p, q)]
    found = losses.top_k_loss(student[None], losses.top_k(teacher[None], k), 1.0, divergence)
    assert found.item() == pytest.approx(BRUTE[divergence](*merged), rel=1e-10)


def test_top_k_survives_half_precision_values() -> None:
    student, teacher = logits(19, S, V).float(), logits(20, S, V).float()
    kept = losses.top_k(teacher, 6)
    halved = losses.TopK(kept.values.half().float(), kept.ids, kept.tail)
    exact = losses.top_k_loss(student, kept, 1.0).item()
    assert losses.top_k_loss(student, halved, 1.0).item() == pytest.approx(exact, rel=2e-3)
    same = losses.top_k_loss(teacher, halved, 1.0).item()
    assert abs(same) < 1e-5


def test_hard_loss_is_the_negative_log_likelihood() -> None:
    student, labels = logits(21, 6, V), torch.tensor([0, 3, 10, 2, 2, 7])
    wanted = -sum(np.log(shares(row)[label]) for row, label in zip(student, labels, strict=True))
    assert losses.hard_loss(student, labels).item() == pytest.approx(wanted, rel=1e-12)
    assert losses.hard_loss(student.bfloat16(), labels).dtype == torch.float32


def test_hidden_match_is_the_relative_squared_error() -> None:
    student, teacher = logits(22, B, S, 4), logits(23, B, S, 6)
    projection = torch.nn.Linear(4, 6, bias=False).double()
    weight = projection.weight.detach().numpy()
    wanted = 0.0
    for b, s in np.argwhere(mask().numpy()):
        theirs = teacher[b, s].numpy()
        wanted += ((weight @ student[b, s].numpy() - theirs) ** 2).sum() / (theirs**2).sum()
    found = losses.hidden_match(student, teacher, mask(), projection)
    assert found.item() == pytest.approx(wanted, rel=1e-12)
    assert losses.hidden_match(teacher, teacher, mask()).item() == 0
    assert losses.hidden_match(2 * teacher, teacher, mask()).item() == pytest.approx(mask().sum().item())


@pytest.mark.parametrize("heads", [3, 2])
def test_attention_match_is_the_mean_divergence_of_the_heads(heads: int) -> None:
    causal = torch.full((S, S), -torch.inf, dtype=torch.float64).triu(1)
    student = (logits(24, B, heads, S, S) + causal).softmax(-1)
    teacher = (logits(25, B, 3, S, S) + causal).softmax(-1)
    ours, theirs = student.numpy(), teacher.numpy()
    if heads != 3:
        ours, theirs = ours.mean(1, keepdims=True), theirs.mean(1, keepdims=True)
    wanted = sum(
        np.mean([kl(theirs[b, a, s], ours[b, a, s]) for a in range(ours.shape[1])])
        for b, s in np.argwhere(mask().numpy())
    )
    found = losses.attention_match(student, teacher, mask())
    assert found.item() == pytest.approx(wanted, rel=1e-10)


def test_sums_of_parts_are_the_sum_of_the_whole() -> None:
    """What lets micro-batches of different lengths add up to one batch."""
    student, teacher = logits(26, B, S, V), logits(27, B, S, V)
    whole = counted_loss(student, teacher, mask(), 2.0)
    parts = sum(
        counted_loss(student[b : b + 1], teacher[b : b + 1], mask()[b : b + 1], 2.0) for b in range(B)
    )
    assert whole.item() == pytest.approx(parts.item(), rel=1e-12)


@pytest.mark.parametrize("rows", [0, 1, 128, 129, 300])
def test_by_rows_is_the_loss_at_once(rows: int) -> None:
    student, teacher = logits(28, rows, V).requires_grad_(), logits(29, rows, V)
    labels = torch.randint(0, V, (rows,), generator=torch.Generator().manual_seed(0))

    def loss(ours: Any, theirs: Any, true: Any) -> Any:
        return losses.soft_loss(ours, theirs, 2.0) + losses.hard_loss(ours, true)

    whole, parts = loss(student, teacher, labels), losses.by_rows(loss, student, teacher, labels)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    (wanted,), (found,) = (torch.autograd.grad(3 * value, student) for value in (whole, parts))
    assert torch.allclose(found, wanted, rtol=1e-10)
