"""What people wrap models in, taken off where that is exact and refused by name where it is not.

`unwrap_model` takes off pipelines and torch.compile, and refuses DataParallel; `base_model` goes on to the model of
transformers inside a bridge or an adapter of peft.
"""

import sys
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformer_lens.model_bridge import TransformerBridge

from ..errors import PositionsError


def unwrap_model(model: Any) -> Any:
    """Return the model inside a pipeline or what `torch.compile` returned, or the model itself.

    A compiled wrapper compiles its model anew once that has streams, so attaching inside does the same.

    Raises:
        PositionsError: a wrapper that has made copies or pieces of the model's weights already, and would not know of
            those of a source.
    """
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        return unwrap_model(model.model)  # a pipeline of transformers
    if isinstance(model, OptimizedModule):
        # torch.compile keeps the module that it was given as `_orig_mod`.
        return unwrap_model(model._orig_mod)

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


def base_model(model: Any) -> Any:
    """Return the transformers model inside a bridge or what peft wraps around it, or the model itself.

    Raises:
        PositionsError: peft puts tokens of its own in front, which only its wrapper does.
    """
    if isinstance(model, TransformerBridge):
        return model.original_model

    if "peft" not in sys.modules:  # what wraps no model need not be imported
        return model
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(model, PeftModel | PeftMixedModel | BaseTuner):
        return model

    # Any adapter of the model, also one that is not active now: it may be switched on later.
    configs: dict[str, Any] = model.peft_config
    for name, config in configs.items():
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise PositionsError(
                f"the adapter {name!r} of the model is {config.peft_type.value}, which puts tokens of its own in "
                "front; expected one that adapts weights, such as LoRA."
            )

    # A PeftModel holds a tuner, which holds the model.
    return model.model if isinstance(model, BaseTuner) else base_model(model.base_model)
