"""What people wrap models in (pipelines, torch.compile, DataParallel): taken off where exact, else refused by name."""

from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import PositionsError


def unwrapped(model: Any) -> Any:
    """Return the model inside a pipeline or what `torch.compile` returned, or the model itself.

    A compiled wrapper compiles its model anew once that has streams, so attaching inside does the same.

    Raises:
        PositionsError: a wrapper that has made copies or pieces of the model's weights already, and would not know of
            those of a source.
    """
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        return unwrapped(model.model)  # a pipeline of transformers
    if isinstance(model, OptimizedModule):
        return unwrapped(model._orig_mod)

    kind = type(model).__name__
    if isinstance(model, DataParallel | DistributedDataParallel) or kind == "FullyShardedDataParallel":
        raise PositionsError(
            f"the model is wrapped in {kind}, which shares out the weights that it had; expected the model itself, "
            "wrapped after position streams are attached."
        )

    # A DTensor, as fully_shard makes it, is a piece of the weight.
    for name, parameter in model.named_parameters() if isinstance(model, nn.Module) else ():
        if hasattr(parameter, "placements"):
            raise PositionsError(
                f"{name} is spread over several processes (DTensor); expected a model that is sharded after position "
                "streams are attached."
            )

    return model
