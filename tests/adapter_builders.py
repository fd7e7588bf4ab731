"""Small adapters, good and bad, for the tests of adapter files."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lorakern.adapters import LoraAdapter
from lorakern.errors import LorakernError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULE = "base_model.model.layers.0.proj"
FACTORS = {f"{MODULE}.lora_A.weight": torch.ones(2, 8), f"{MODULE}.lora_B.weight": torch.ones(6, 2)}


def write(folder, tensors=FACTORS, /, **config):
    """A PEFT adapter of one module, with these fields in its config."""
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["proj"]} | config
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(fields))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def safetensors_bytes(header, data=b"", length=None):
    """A file with any header, an object or bytes, that may announce another length."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    return length.to_bytes(8, "little") + header + data


def write_raw(folder, header, data=b"", length=None):
    write(folder)
    (folder / WEIGHTS).write_bytes(safetensors_bytes(header, data, length))
    return folder


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


class Chain(torch.nn.Module):
    """Layers of odd sizes whose names end alike."""

    SHAPES = (("first", 7, 5), ("layers.1.proj", 5, 9), ("layers.11.proj", 9, 3), ("layers.11.out_proj", 3, 1))

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(7, 5)
        self.layers = torch.nn.ModuleDict(
            {
                "1": torch.nn.ModuleDict({"proj": torch.nn.Linear(5, 9)}),
                "11": torch.nn.ModuleDict({"proj": torch.nn.Linear(9, 3), "out_proj": torch.nn.Linear(3, 1)}),
            }
        )

    def forward(self, x):
        for name, *_ in self.SHAPES:
            x = self.get_submodule(name)(x)
        return x


def factors(rank, d_in, d_out, scale, dtype=torch.float32, seed=0):
    """Random A (rank, d_in), B (d_out, rank), and the scale."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, d_in, generator=generator).to(dtype),
        torch.randn(d_out, rank, generator=generator).to(dtype),
        scale,
    )


def small(fill=1.0, rank=2):
    """An adapter of two modules that is `fill` all over."""
    factors = (torch.full((rank, 8), fill), torch.full((6, rank), fill), fill / 3)
    return LoraAdapter({"layers.0.proj": factors, "layers.1.proj": factors}, task_type="CAUSAL_LM")


def refused(path, *says, load=LoraAdapter.load, **options):
    """The message with which `load` refuses `path`; it must hold the words of `says`."""
    with pytest.raises(LorakernError) as error:
        load(path, **options)
    message = str(error.value)
    for words in says:
        assert words in message
    assert len(message) < 1500
    return message


def assert_same(adapter, other):
    """The same modules in the same order, with the same scales, dtypes and bits."""
    assert list(adapter) == list(other)
    for module in adapter:
        for ours, theirs in zip(adapter[module], other[module], strict=True):
            if isinstance(ours, float):
                assert ours == theirs
            else:
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
                assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
