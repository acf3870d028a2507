"""Write a pruned model so that it loads: safetensors and JSON, no pickles, no code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from partwise.checks import InputError

if TYPE_CHECKING:
    import os

    from torch import nn

    from partwise.prune.plan import PrunePlan

__all__ = ["PLAN", "save"]

PLAN = "plan"  # folder inside that of the model: other programs take every safetensors file beside the weights for weights


def save(model: nn.Module, folder: str | os.PathLike[str], *, plan: PrunePlan | None = None, tokenizer: Any = None, card: str = "") -> None:
    """Write what `apply` made; ``partwise.load(folder)`` opens it. The folder appears whole or not at all.

    A model of transformers whose layers agree in size becomes an ordinary checkpoint, which stock ``from_pretrained`` opens; so does a masked one. Where layers
    differ, their sizes stand in ``per_layer_config`` of ``config.json``; layers of low rank stand in ``low_rank.json``. Stock code refuses both instead of
    loading half of a model. A perceptron or ResNet of this package is built again from its configuration. Of a network of your own the units are kept, and
    ``partwise.load(folder, model=whole)`` cuts them out of the whole one again.

    Parameters
    ----------
    model : torch.nn.Module
        The pruned model.
    folder : str or path
        Target; a model that is already there is replaced.
    plan : PrunePlan, optional
        What `apply` was given. Kept in ``plan/``, where `load_plan` reads it. A network of your own needs it.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Saved beside the model.
    card : str, default=""
        Content of ``README.md``; none if empty.

    Raises
    ------
    InputError
        ``plan-for-another-model`` when the plan does not make this model; ``unknown-network`` for a network of your own without plan; and what
        `partwise.models.uneven_files.save_uneven` or `partwise.models.network_files.save_network` refuses, such as ``quantised-model``, ``torn-ties``,
        ``sizes-contradict`` and ``not-a-model-folder``.
    RunError
        ``disk-full`` or ``cannot-write``; what was there before is then intact.
    """
    part = None if plan is None else plan.part_of(model)
    extra = {} if plan is None else {f"{PLAN}/{name}": data for name, data in plan.files().items()}
    extra |= {"README.md": card.encode()} if card else {}
    folder = Path(folder)
    if hasattr(type(model), "config_class"):
        from partwise.models.uneven_files import save_uneven

        save_uneven(model, folder, tokenizer=tokenizer, extra=extra)
        return
    from partwise.models.network_files import save_network
    from partwise.models.networks import is_ours

    if tokenizer is not None:
        raise InputError("unknown-network", f"got a tokenizer with a {type(model).__name__}, which is no model of transformers. Leave it out.")
    if part is None and not is_ours(model):
        raise InputError(
            "unknown-network",
            f"got a {type(model).__name__}, which partwise cannot build again, expected the plan too: it says which units of the whole network this one "
            "holds. Pass plan=.",
        )
    save_network(model, folder, part=part, extra=extra)
