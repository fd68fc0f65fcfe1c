"""What a student is trained on: divergences from its teacher, and the matching of hidden states and attention.

Pure functions of tensors.  Each loss is a sum over the counted positions, so that the sums of several
micro-batches, divided by all of their positions, are the loss of one large batch.

B batch, S sequence, V vocabulary, N counted positions, K kept tokens, H hidden width, A attention heads.
"""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

FLOOR = -1e4
"""Log-probability that stands for "impossible": its exponential is 0, and its products stay finite."""

DIVERGENCES = ("forward", "reverse", "js")
ROWS_AT_ONCE = 128
"""Positions whose distributions fit into a processor's cache together."""


class TopK(NamedTuple):
    """A distribution over V tokens, known for K of them.

    values: [..., K] log-probabilities.  ids: [..., K] their tokens.  tail: [...] log of the others' mass.
    """

    values: Tensor
    ids: Tensor
    tail: Tensor


def widened(tensor: Tensor) -> Tensor:
    """At least float32: half precision has too few digits for sums over a vocabulary."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def log_shares(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """[..., V] log-softmax of logits / temperature; -inf becomes FLOOR or less."""
    return (widened(logits) / temperature).clamp(min=FLOOR).log_softmax(-1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """[...] KL(teacher || student) in nats of [..., V] log-probabilities."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """[...] generalized Jensen-Shannon divergence in nats; Agarwal et al. 2023, arXiv:2306.13649, section 2.

    beta KL(teacher || M) + (1 - beta) KL(student || M) with M = beta teacher + (1 - beta) student, of
    [..., V] log-probabilities.  Divided by beta it tends to the forward KL for beta to 0, divided by
    1 - beta to the reverse KL for beta to 1.
    """
    mixture = torch.logaddexp(teacher + log(beta), student + log(1 - beta))
    return beta * forward_kl(mixture, teacher) + (1 - beta) * forward_kl(mixture, student)


def divergence_of(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """[...] nats between [..., V] log-probabilities: forward KL(teacher || student), reverse, or js."""
    if divergence == "forward":
        return forward_kl(student, teacher)
    if divergence == "reverse":
        return forward_kl(teacher, student)
    return generalized_jsd(student, teacher)


def soft_loss(student: Tensor, teacher: Tensor, temperature: float, divergence: str = "forward") -> Tensor:
    """Sum of the divergence at a temperature, in nats, times the temperature's square.

    Hinton et al. 2015, arXiv:1503.02531, section 2: the square keeps the gradients' size, whatever the
    temperature.  student, teacher: [N, V] logits.
    """
    ours, theirs = log_shares(student, temperature), log_shares(teacher, temperature)
    return temperature**2 * divergence_of(ours, theirs, divergence).sum()


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The k likeliest of [..., V] logits at a temperature, and the mass of the rest."""
    shares = log_shares(logits, temperature)
    values, ids = shares.topk(min(k, shares.shape[-1]), dim=-1)
    return TopK(values, ids, _rest(shares, ids))


def top_k_loss(student: Tensor, teacher: TopK, temperature: float, divergence: str = "forward") -> Tensor:
    """`soft_loss` with the tokens that the teacher's top k leaves out taken as one.

    student: [N, V] logits over the vocabulary that the top k was taken from.  teacher: of [N, ...], at
    the same temperature.  Merging tokens can only lower a divergence, so this is a lower bound of the
    full one, and equal to it when k is the whole vocabulary.
    """
    shares = log_shares(student, temperature)
    ours = torch.cat([shares.gather(-1, teacher.ids), _rest(shares, teacher.ids)[..., None]], -1)
    theirs = torch.cat([teacher.values, teacher.tail[..., None]], -1).clamp(min=FLOOR)
    return temperature**2 * divergence_of(ours, theirs.log_softmax(-1), divergence).sum()


def _rest(shares: Tensor, ids: Tensor) -> Tensor:
    """[...] log of the mass that [..., V] log-probabilities leave for tokens other than `ids` [..., K]."""
    return shares.scatter(-1, ids, 2 * FLOOR).logsumexp(-1).clamp(min=FLOOR)


def hard_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropy, in nats, of [N, V] logits and [N] true ids."""
    return functional.cross_entropy(widened(student), labels, reduction="sum")


def hidden_match(
    student: Tensor, teacher: Tensor, mask: Tensor, projection: nn.Module | None = None
) -> Tensor:
    """Sum over counted positions of |projected student - teacher|^2 / |teacher|^2.

    The squared error of hidden states (Jiao et al. 2019, arXiv:1909.10351, eq. 8) relative to the
    teacher's, since a few positions of a language model have states hundreds of times larger than the
    rest.  student: [B, S, H].  teacher: [B, S, H'].  projection: H to H', learned; None when H is H'.
    """
    ours, theirs = widened(student[mask]), widened(teacher[mask])
    if projection is not None:
        ours = widened(projection(ours))
    error = (ours - theirs).square().sum(-1)
    return (error / theirs.square().sum(-1).clamp(min=torch.finfo(theirs.dtype).tiny)).sum()


def attention_match(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Sum over counted queries of the heads' mean KL(teacher || student) between attention distributions.

    Wang et al. 2020, arXiv:2002.10957, eq. 5.  student: [B, A, S, S], teacher: [B, A', S, S], rows that
    sum to 1.  With different numbers of heads their means are compared.  mask: [B, S] of queries.
    """
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    student, teacher = widened(student), widened(teacher)
    least = torch.finfo(student.dtype).tiny
    ratio = teacher.clamp(min=least).log() - student.clamp(min=least).log()
    per_query = (teacher * ratio).sum(-1).mean(1)
    return per_query[mask].sum()


def by_rows(loss: Callable[..., Tensor], student: Tensor, *others: Tensor) -> Tensor:
    """loss(student, *others), for a loss that is a sum over rows, computed a few rows at a time.

    student: [N, V], the only one that gets a gradient.  others: tensors of N rows.  What is kept until
    the backward pass is the gradient, [N, V], in place of a dozen steps of the arithmetic.
    """
    value: Tensor = _ByRows.apply(student, loss, *others)  # type: ignore[no-untyped-call]
    return value


class _ByRows(torch.autograd.Function):
    """The gradient is computed together with the loss."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, loss: Callable[..., Tensor], *others: Tensor) -> Tensor:
        gradient = torch.empty_like(student)
        total = torch.zeros((), dtype=widened(student[:0]).dtype, device=student.device)
        for start in range(0, len(student), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            with torch.enable_grad():
                part = student[rows].detach().requires_grad_()
                value = loss(part, *(other[rows] for other in others))
                (gradient[rows],) = torch.autograd.grad(value, part)
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * slopes[0].to(gradient.dtype), *[None] * (len(ctx.needs_input_grad) - 1)
