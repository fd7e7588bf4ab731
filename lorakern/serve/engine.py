"""The engine of `lorakern serve`: a model, a retriever, and the mixture of both."""

from pathlib import Path
from typing import Any

import torch

from lorakern.commands.learned import EMBEDDED, load_model
from lorakern.mixture import LoraRetriever, MiniLM, MixtureModel, Routers
from lorakern.serve.template import CHATML, Template, chat_template


def build(
    model: str, dtype: torch.dtype, *, mode: str | None, k: int, routers: Path | None
) -> tuple[Any, LoraRetriever, Template]:
    """The engine, its retriever and the template of its chats.

    Args:
        model: "smollm2", or a folder of transformers.
        dtype: of the model.
        mode: of `MixtureModel`; None for that of the routers, or "mixture".
        k: adapters a request.
        routers: a file that `Routers.save` wrote, for the modes that have some.

    Raises:
        LorakernError: something of it is missing, or cannot be loaded.
    """
    learned = None if routers is None else Routers.load(routers)
    mode = mode or ("mixture" if learned is None else learned.mode)
    loaded, tokenizer = load_model(model, dtype)
    retriever = LoraRetriever(MiniLM())
    engine = MixtureModel(loaded, retriever, tokenizer=tokenizer, mode=mode, k=k, routers=learned)
    return engine, retriever, chat_template(tokenizer, CHATML if model == EMBEDDED else None)
