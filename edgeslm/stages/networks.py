"""Classifiers as modules with one way to call them: (input_ids, attention_mask) -> logits.

B batch, S sequence, H hidden size, L classes.  Loads torch: imported only where it is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PooledClassifier(nn.Module):
    """An encoder, the mean over its text's states scaled to length 1, and one linear layer.

    The features are those of sentence-transformers (Reimers & Gurevych 2019, arXiv:1908.10084, section 3,
    mean pooling, with its Normalize module), so padding changes nothing.
    """

    def __init__(self, encoder: Any, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.get_text_config().hidden_size, labels)

    @property
    def config(self) -> Any:
        return self.encoder.config

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()  # type: ignore[no-any-return]

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, H] of length 1.  input_ids, attention_mask: [B, S], 1 = text."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        inside = attention_mask[..., None].to(states.dtype)
        mean = (states * inside).sum(1) / inside.sum(1).clamp(min=1)
        return nn.functional.normalize(mean, dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L] logits.  input_ids, attention_mask: [B, S], 1 = text."""
        return self.head(self.features(input_ids, attention_mask))  # type: ignore[no-any-return]


class SequenceClassifier(nn.Module):
    """A sequence classifier of transformers that returns its logits and nothing else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        return self.model.config

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()  # type: ignore[no-any-return]

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        self.model.gradient_checkpointing_enable(**settings)

    def gradient_checkpointing_disable(self) -> None:
        self.model.gradient_checkpointing_disable()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L] logits.  input_ids, attention_mask: [B, S], 1 = text."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits  # type: ignore[no-any-return]


def set_head(classifier: PooledClassifier, weight: Any, bias: Any) -> None:
    """Put a solver's coefficients into the linear layer.  weight: [L, H], bias: [L], NumPy arrays."""
    with torch.no_grad():
        classifier.head.weight.copy_(torch.from_numpy(weight))
        classifier.head.bias.copy_(torch.from_numpy(bias))
