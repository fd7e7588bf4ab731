"""lego_picture: a map of LoRA-LEGO's clusters to look at."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Okabe and Ito's, which colour-blind readers can tell apart.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#b8a800", "#444444")
PALE = 0.4
PANELS = 7
TICKS = 16
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def lego_picture(found: Mapping[str, Any], title: str | None = None) -> bytes:
    """A map that `lego_map` returned, as a PNG.

    A panel for each kind of module and in it a strip for each layer: the module's ranks, which lie cluster by cluster
    in the colours of their adapters, the clusters of several adapters first and full, those of one adapter alone pale.
    Needs matplotlib.

    Args:
        found: what `lego_map` returned.
        title: above it all; by default the share of ranks that share a cluster.

    Returns:
        The file's bytes.

    >>> import torch
    >>> from lorakern.merge import lego_map, lego_picture
    >>> a = {f"layers.{i}.proj": (torch.eye(4)[:2], torch.eye(4)[:, :2], 3.0) for i in range(3)}
    >>> lego_picture(lego_map([a, a]))[1:4]
    b'PNG'
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layers, panels = _layout(list(found["modules"]))
    columns = min(PANELS, len(panels))
    rows = -(-len(panels) // columns)
    size = max(5.0, 0.8 + 1.9 * columns), 1.5 + rows * (0.7 + max(1.0, 0.155 * len(layers)))
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    colors = _colors(len(found["adapters"]))
    for place, (axes, (kind, modules)) in enumerate(zip(grid, panels.items(), strict=False)):
        strips = {y: _sorted_clusters(found["modules"][module]["labels"]) for y, module in modules.items()}
        _panel(axes, kind, strips, colors)
        every = range(0, len(layers), -(-len(layers) // TICKS))
        axes.set_yticks(every, [layers[y] for y in every] if place % columns == 0 else [], fontsize=6)
        axes.set_ylim(len(layers) - 0.4, -0.6)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    title = title or f"{found['shared']:.0%} of the ranks share a cluster with another adapter"
    figure.suptitle(title, fontsize=10, parse_math=False)
    handles = [Patch(color=color) for color in colors] + [Patch(color="#999999", alpha=PALE)]
    labels = [*found["adapters"], "pale: no other adapter in the cluster"]
    texts = figure.legend(
        handles, labels, loc="outside lower center", ncols=min(5, columns + 1), frameon=False, fontsize=8
    ).get_texts()
    for text in texts:
        text.set_parse_math(False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _layout(modules: Sequence[str]) -> tuple[list[str], dict[str, dict[int, str]]]:
    """The layers, and for each kind of module the row of its layer and its path.

    >>> _layout(["h.10.q", "h.2.q", "h.2.v"])
    (['2', '10'], {'q': {1: 'h.10.q', 0: 'h.2.q'}, 'v': {0: 'h.2.v'}})
    """
    numbers = {module: found[0] if (found := _NUMBER.search(module)) else "" for module in modules}
    layers = sorted(set(numbers.values()), key=lambda number: int(number or -1))
    panels: dict[str, dict[int, str]] = {}
    for module, number in numbers.items():
        panels.setdefault(_NUMBER.sub("*", module), {})[layers.index(number)] = module
    # the last word, where that tells kinds apart
    ends = [kind.rpartition(".")[2] for kind in panels]
    names = ends if len(set(ends)) == len(ends) else list(panels)
    return layers, dict(zip(names, panels.values(), strict=True))


def _colors(count: int) -> list:
    if count <= len(COLORS):
        return list(COLORS[:count])
    from matplotlib import colormaps

    return [colormaps["turbo"](0.05 + 0.9 * i / (count - 1)) for i in range(count)]


def _panel(axes, kind: str, strips: Mapping[int, list[list[int]]], colors: Sequence) -> None:
    """Strips of the modules of one kind, row to the clusters' members by adapter."""
    from matplotlib.collections import LineCollection, PolyCollection
    from matplotlib.colors import to_rgba

    boxes, faces, seams, shared, total = [], [], [], 0, 0
    for y, clusters in strips.items():
        width = max(1, sum(map(sum, clusters)))
        at = 0
        for members in clusters:
            alone = sum(map(bool, members)) == 1
            for color, count in zip(colors, members, strict=True):
                left, at = at, at + count
                box = [(x / width, y + half) for x, half in ((left, -0.43), (left, 0.43), (at, 0.43), (at, -0.43))]
                boxes += [box] * (count > 0)
                faces += [to_rgba(color, PALE if alone else 1.0)] * (count > 0)
            seams.append([(at / width, y - 0.46), (at / width, y + 0.46)])
            shared += 0 if alone else sum(members)
        total += at
    axes.add_collection(PolyCollection(boxes, facecolors=faces, linewidths=0))
    axes.add_collection(LineCollection(seams, colors="white", linewidths=0.9))
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{kind}\n{shared / max(1, total):.0%} shared", fontsize=8, parse_math=False)


def _sorted_clusters(labels: Sequence[Sequence[int]]) -> list[list[int]]:
    """How many ranks of each adapter every cluster has: those of most adapters first, then the largest.

    >>> _sorted_clusters([[0, 0, 1], [1, 2]])
    [[1, 1], [2, 0], [0, 1]]
    """
    clusters: dict[int, list[int]] = {}
    for adapter, own in enumerate(labels):
        for label in own:
            clusters.setdefault(label, [0] * len(labels))[adapter] += 1
    return sorted(clusters.values(), key=lambda members: (members.count(0), -sum(members), [-n for n in members]))
