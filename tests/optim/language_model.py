"""Defines a small language model without attention, of any width."""

import torch
from torch import Tensor, nn

VOCABULARY = 32


class LanguageModel(nn.Module):
    """Predicts from one token by a residual layer; its embedding is also the output head where it is ``tied``."""

    def __init__(self, width: int, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.norm = nn.RMSNorm(width)
        self.first = nn.Linear(width, 4 * width)
        self.second = nn.Linear(4 * width, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.second(nn.functional.gelu(self.first(self.norm(hidden))))
        return self.head(hidden)
