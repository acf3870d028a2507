"""Where a module sits in its model, read from its name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

__all__ = ["locate", "locate_all"]

# Parts of a name that tell two towers or two stages of one model apart: "vision_tower", "decoder", ResNet's "layer3".
TOWER = re.compile(r"vision|visual|image|audio|speech|decoder|[a-z]\d+$")


def locate(name: str) -> tuple[int | None, str]:
    """Layer number and kind of a module.

    The layer is the first part of the name that is a number. The kind is what follows it; wrappers before it (``base_model``, ``encoder``) are left out unless
    they tell two towers or stages of one model apart.

    Parameters
    ----------
    name : str
        Dotted module name, as in ``model.named_modules()``.

    Returns
    -------
    layer : int or None
        None for modules outside the stack of layers, such as a classification head.
    kind : str
        The same for corresponding modules of all layers.

    Examples
    --------
    >>> locate("base_model.model.bert.encoder.layer.3.attention.self.query")
    (3, 'attention.self.query')
    >>> locate("model.layers.11.mlp.down_proj")
    (11, 'mlp.down_proj')
    >>> locate("base_model.model.classifier.dense")
    (None, 'classifier.dense')
    """
    parts = name.removeprefix("base_model.model.").split(".")
    index = next((position for position, part in enumerate(parts) if part.isdecimal()), None)
    if index is None:
        return None, ".".join(parts)
    before, after = parts[:index], parts[index + 1 :]
    towers = [part for part in before if TOWER.search(part)]
    return int(parts[index]), ".".join(towers + after) or ".".join(before) or "layer"


def locate_all(names: Iterable[str]) -> dict[str, tuple[int | None, str]]:
    """`locate` for every module of one model, in the order of ``names``; two modules that would share a place keep their full names as kinds.

    Examples
    --------
    >>> locate_all(["text.layers.0.q", "other.layers.0.q"])
    {'text.layers.0.q': (0, 'text.layers.0.q'), 'other.layers.0.q': (0, 'other.layers.0.q')}
    """
    places = {name: locate(name) for name in names}
    counts = Counter(places.values())
    return {name: place if counts[place] == 1 else (place[0], name) for name, place in places.items()}
