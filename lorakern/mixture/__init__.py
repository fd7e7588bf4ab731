"""Mixtures of adapters: `LoraRetriever` finds those that a request needs, `MixtureModel` answers with them."""

from typing import Any

from lorakern.mixture.contrastive import retrieval_accuracy, train_encoder
from lorakern.mixture.engine import Generation
from lorakern.mixture.model import MixtureModel, Ticket
from lorakern.mixture.retriever import INSTRUCTION, LoraRetriever
from lorakern.mixture.router_training import train_router
from lorakern.mixture.routers import Routers

__all__ = [
    "INSTRUCTION",
    "Generation",
    "LoraRetriever",
    "MiniLM",
    "MixtureModel",
    "Routers",
    "Ticket",
    "retrieval_accuracy",
    "train_encoder",
    "train_router",
]


def __getattr__(name: str) -> Any:
    # the one name that stands for a model: its file is read only where it is wanted
    if name == "MiniLM":
        from lorakern.integrations.minilm import MiniLM

        return MiniLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
