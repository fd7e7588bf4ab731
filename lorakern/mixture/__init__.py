"""Mixtures of adapters: `LoraRetriever` finds the adapters that a request needs."""

from typing import Any

from lorakern.mixture.contrastive import retrieval_accuracy, train_encoder
from lorakern.mixture.retriever import INSTRUCTION, LoraRetriever

__all__ = ["INSTRUCTION", "LoraRetriever", "MiniLM", "retrieval_accuracy", "train_encoder"]


def __getattr__(name: str) -> Any:
    # the one name that stands for a model: its file is read only where it is wanted
    if name == "MiniLM":
        from lorakern.integrations.minilm import MiniLM

        return MiniLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
