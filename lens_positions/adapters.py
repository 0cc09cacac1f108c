"""What peft puts into a model: found by its modules, written in peft's own files, and put in again as it ran.

Adapters stay beside the weights they adapt, as in training: xW + xAB and x(W + AB) differ in rounding, so merging is
on request. Before a folder is written, the same steps that load it are tried on a copy without numbers (the meta
device); what would come back in another form is refused.
"""

import copy
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import JointQKVAttentionBridge

from .checkpoint_files import read_description, read_tensors
from .core.position_streams import PositionStreams, belongs_to_streams
from .core.transformer_lens_internals import ORIGINAL, own_name
from .errors import PositionsError

WEIGHTS, DESCRIPTION, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."

BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Ways to draw fresh adapter weights that leave the base's weights as they are."""

_NOT_OF_THE_FORM = {"training", *vars(nn.Module())}


def peft_layers(model: nn.Module) -> dict[str, Any]:
    """The modules that peft wraps around a model's own, by the model's own names; empty where there are none."""
    wrappers = peft_wrappers()
    return {own_name(name): m for name, m in model.named_modules() if isinstance(m, wrappers)}


def peft_wrappers() -> tuple[type, ...]:
    """The classes that peft puts around modules; none where nothing imported it, so that nothing waits for it."""
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return BaseTunerLayer, AuxiliaryTrainingWrapper


def own_weights(model: Any) -> dict[str, Tensor]:
    """The state of the model underneath a bridge, streams and adapters, by its own names."""
    plain: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        name = _own_name(model, key)
        if name is not None:
            # A bridge names some tensors twice; the first is the model's.
            plain.setdefault(name, tensor)
    return plain


def _own_name(model: nn.Module, key: str) -> str | None:
    """The model's own name of a tensor; None where it belongs to the streams or to an adapter."""
    # Walk down the name: what peft and the bridge put around a module is left out of it.
    module: nn.Module | None = model
    own: list[str] = []
    for part in key.split("."):
        if isinstance(module, peft_wrappers()):
            if part not in ("base_layer", "original_module", "token_adapter"):
                return None
        elif part == "position_streams" and module is model:
            return None
        elif part != ORIGINAL:
            own.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(own)


def base_digests(model: Any) -> tuple[str, str]:
    """SHA-256 of a model's own parameters: rounded to bf16, and in their own dtype.

    Raises:
        PositionsError: the model lacks a parameter that its configuration describes.
    """
    # On the meta device a model has names and shapes, and takes no memory.
    with torch.device("meta"):
        names = sorted(name for name, _ in type(model)(model.config).named_parameters())
    weights = own_weights(model)
    rounded, exact = hashlib.sha256(), hashlib.sha256()
    for name in names:
        if name not in weights:
            raise PositionsError(f"the model has no weight {name}, which its configuration describes; expected it.")

        # One weight at a time on the CPU, as a model may be larger than its memory.
        weight = weights[name].detach().to("cpu").contiguous()
        for digest, values in ((rounded, weight.to(torch.bfloat16)), (exact, weight)):
            digest.update(f"{name} {tuple(values.shape)}".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return rounded.hexdigest(), exact.hexdigest()


def refuse_lost_edits(model: Any) -> None:
    """Refuse a bridged model that computes with weights which the model itself does not have.

    Raises:
        PositionsError: the bridge's own query, key and value weights, or a bias it adds, were edited or went stale.
    """
    for name, module in model.named_modules():
        if isinstance(module, JointQKVAttentionBridge) and module.original_component is not None:
            parts = zip("qkv", module.split_qkv_matrix(module.original_component), strict=True)
            for part, whole in parts:
                # What the bridge computes with, beside what the joint matrix would give.
                used = own_weights(getattr(module, part))
                if any(not torch.equal(used[n], t) for n, t in whole.state_dict().items() if n in used):
                    raise PositionsError(
                        f"{own_name(name)} has joint query, key and value weights, and the bridge's own copy of "
                        f"them ({part}) is different; expected the same edit in both, since the joint ones are saved."
                    )
    with torch.device("meta"):
        described = set(type(model)(model.config).state_dict())
    weights = own_weights(model)

    # By storage, as one tensor may have several names.
    stored = {tensor.data_ptr() for name, tensor in weights.items() if name in described}
    for name, tensor in weights.items():
        if name in described or not name.endswith("bias") or tensor.is_meta or tensor.data_ptr() in stored:
            continue  # a bridge has second names for the model's own
        joint = any(isinstance(m, JointQKVAttentionBridge) for m in _around(model, name))
        if not joint and tensor.any():
            raise PositionsError(
                f"{name} is a bias that the bridge added and {type(model).__name__} does not have; expected zeros in "
                "it, since it cannot be saved."
            )


def _around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules on the way to a name of the model's own, through the components of a bridge."""
    module: nn.Module | None = model
    for part in name.split("."):
        while module is not None and part not in module._modules and ORIGINAL in module._modules:
            module = module._modules[ORIGINAL]
        module = None if module is None else module._modules.get(part)
        if module is not None:
            yield module


def refuse_out_of_step(model: Any, streams: Any) -> None:
    """Refuse streams that peft copied, wrapped or pushed aside after they were attached.

    Raises:
        PositionsError: what trains would not be what runs, or a stream sees a module that no longer stands alone.
    """
    first = "expected peft first and attach_positions after it"
    if not isinstance(streams, PositionStreams):
        raise PositionsError(
            f"peft copied position_streams (modules_to_save): the copy trains and the original runs; {first}."
        )
    within = next(iter(peft_layers(streams)), None)
    if within is not None:
        raise PositionsError(f"peft wrapped position_streams.{within}, a part of the increment source; {first}.")
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        around = set(name.split(".")) & {"base_layer", "original_module", "modules_to_save"}
        if around and any(belongs_to_streams(hook) for hook in hooks):
            wrapped = name.split(f".{around.pop()}")[0]
            raise PositionsError(
                f"peft wrapped {wrapped} after position streams were attached to it, which no longer see what it "
                f"returns; {first}."
            )
    embedding = model.get_input_embeddings()
    hooked = any(belongs_to_streams(hook) for hook in embedding._forward_hooks.values())
    if streams.config.source == "shared" and peft_layers(embedding) and not hooked:
        raise PositionsError(f"peft wrapped the embeddings, which the shared source reads; {first}.")


def describe_adapters(model: Any) -> dict[str, Any] | None:
    """Names of a model's adapters, which are active and whether they are enabled; None where it has none.

    Raises:
        PositionsError: they are merged, differ from layer to layer, or are of a kind that cannot be put in again.
    """
    layers = peft_layers(model)
    if not layers:
        return None
    configs = getattr(model, "peft_config", {})
    if not configs:
        raise PositionsError(
            f"{next(iter(layers))} is a module of peft, and the model has no peft_config; expected both."
        )
    for name, config in configs.items():
        _refuse_unfit(name, config)
    tuners: dict[str, Any] = {name: m for name, m in layers.items() if isinstance(m, peft_wrappers()[:1])}
    for name, module in tuners.items():
        if module.merged:
            raise PositionsError(
                f"the adapter {', '.join(module.merged_adapters)} is merged into {name}; expected it unmerged, or "
                "merge_and_unload() and save_pretrained()."
            )

    # peft switches layer by layer; one description cannot hold layers that differ.
    states = {(tuple(m.active_adapters), not m.disable_adapters) for n, m in tuners.items() if "token_adapter" not in n}
    if len(states) != 1:
        raise PositionsError(f"{len(states)} sets of adapters are active in different layers; expected one for all.")
    active, enabled = states.pop()
    return {"names": list(configs), "active": list(active), "enabled": enabled}


def _refuse_unfit(name: str, config: Any) -> None:
    reason = None
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or tuner is None:
        reason = f"is of the kind {kind}, which adds more than modules to a model"
    elif getattr(tuner, "uses_shared_state", False) or config.is_adaption_prompt:
        reason = f"is of the kind {kind}, which layers share weights in"
    elif getattr(config, "bias", "none") != "none":
        reason = f"trains biases of the base (bias={config.bias!r})"
    elif getattr(config, "init_lora_weights", None) not in BEGINNINGS:
        reason = f"changes the base's weights (init_lora_weights={config.init_lora_weights!r})"
    elif getattr(config, "layer_replication", None):
        reason = "repeats layers of the base (layer_replication)"
    elif getattr(config, "alora_invocation_tokens", None):
        reason = "acts from an invocation token on, which only peft's own model looks for (alora_invocation_tokens)"
    elif not name or name in (".", "..") or len(Path(name).parts) != 1 or Path(name).is_absolute():
        reason = "has a name that no folder can have"
    if reason is not None:
        raise PositionsError(f"the adapter {name!r} {reason}; expected one such as LoRA with its defaults.")


def write_adapters(model: Any, folder: Path, base: str, described: dict[str, Any]) -> None:
    """Write each adapter in peft's format: "default" into the folder itself, another into one of its name.

    Raises:
        PositionsError: a tensor of an adapter has no place in peft's format, or what was written would not come back.
    """
    state = model.state_dict()
    written: set[str] = set()
    for name in described["names"]:
        config = copy.deepcopy(model.peft_config[name])

        # peft's own loader then finds the base as well.
        config.base_model_name_or_path = base
        place = _place(folder, name)
        place.mkdir(exist_ok=True)
        config.save_pretrained(place)
        keys = _keys(model, name)

        # Cloned, as safetensors refuses tensors that share memory.
        tensors = {PREFIX + saved: state[key].detach().to("cpu").contiguous().clone() for saved, key in keys.items()}
        save_file(tensors, place / WEIGHTS, {"format": "pt"})
        written |= set(keys.values())
    known = {key for key in state if _own_name(model, key) is not None or key.startswith("position_streams.")}
    stored = {state[key].data_ptr() for key in written}
    for key in sorted(set(state) - known - written):
        if state[key].data_ptr() not in stored:  # a bridge names some modules twice
            raise PositionsError(f"peft does not save {key}; expected adapters whose every tensor it does.")
    _refuse_other_form(model, folder, described)


def _place(folder: Path, name: str) -> Path:
    return folder if name == "default" else folder / name


def _keys(model: Any, name: str) -> dict[str, str]:
    """What an adapter's tensors are called in peft's files, and in the model."""
    # peft is given names in the place of tensors, and so tells which it would save as what.
    same: Any = {key: key for key in model.state_dict()}
    from peft import get_peft_model_state_dict

    names = get_peft_model_state_dict(model, state_dict=same, adapter_name=name, save_embedding_layers=False)
    return {own_name(saved): str(key) for saved, key in names.items()}


def _refuse_other_form(model: Any, folder: Path, described: dict[str, Any]) -> None:
    # Put what was written into an empty model, and compare what peft's modules say of themselves.
    with torch.device("meta"):
        skeleton = type(model)(model.config).to(model.dtype)
    put_adapters(skeleton, folder, described)
    ours, theirs = _form(model), _form(skeleton)
    for name in sorted(set(ours) | set(theirs)):
        if ours.get(name) != theirs.get(name):
            here, there = ours.get(name, {}), theirs.get(name, {})
            what = next((f for f in sorted({*here, *there}) if here.get(f) != there.get(f)), "is missing")
            raise PositionsError(
                f"the adapter in {name} would not come back as it is ({what}); expected one that peft's own files "
                "describe."
            )


def _form(model: Any) -> dict[str, dict[str, Any]]:
    """What peft's modules say about themselves beside their tensors."""
    forms = {}
    for name, module in peft_layers(model).items():
        values = {key: _plain(value) for key, value in vars(module).items() if key not in _NOT_OF_THE_FORM}
        forms[name] = {key: value for key, value in values.items() if value is not NotImplemented}
    return forms


def _plain(value: Any) -> Any:
    """A value as JSON could hold it, to compare; NotImplemented for what it could not."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else NotImplemented


def put_adapters(model: Any, folder: Path, described: dict[str, Any] | None) -> list[Any]:
    """Put the adapters of a folder into a model, unmerged, as active and enabled as they were.

    Args:
        model: a transformers model without adapters.
        folder: where `write_adapters` wrote them.
        described: what it was given; None for a folder of before, with one adapter.

    Returns:
        peft's tuners, which can merge them.

    Raises:
        PositionsError: the files are damaged or do not fit the model, which may be changed then.
    """
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    described = described or {"names": ["default"], "active": ["default"], "enabled": True}

    # peft freezes the base when it puts an adapter in; what learned before learns after.
    learns = {id(p): p.requires_grad for p in model.parameters()}
    there = {id(module) for module in model.modules()}
    tuners = []
    try:
        for name in described["names"]:
            place = _place(folder, name)
            read_description(place / DESCRIPTION)
            config: Any = PeftConfig.from_pretrained(str(place))
            _refuse_unfit(name, config)

            # As if to be trained: in inference mode peft freezes what it adds, and learning would be off without a
            # word.
            config.inference_mode = False
            if hasattr(config, "init_lora_weights"):
                config.init_lora_weights = True  # fresh weights are replaced at once
            kind: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
            tuners.append(kind(model, config, adapter_name=name, low_cpu_mem_usage=True))
            _fill(model, name, read_tensors(place / WEIGHTS))
        model._hf_peft_config_loaded = True  # what transformers asks before set_adapter and its siblings
        if described["active"]:
            tuners[-1].set_adapter(described["active"])
        if not described["enabled"]:
            tuners[-1].disable_adapter_layers()
    except Exception as error:  # peft has many words for a configuration that makes no sense
        reason = " ".join(str(error).split())
        raise PositionsError(f"the LoRA weights in {folder} are damaged or do not fit: {reason[:300]}") from error
    for parameter in model.parameters():
        parameter.requires_grad_(learns.get(id(parameter), parameter.requires_grad))
    for module in model.modules():
        if id(module) not in there:
            module.training = model.training
    return tuners


def _fill(model: Any, name: str, tensors: dict[str, Tensor]) -> None:
    """Give an adapter's modules their weights, in the dtype of the file."""
    keys = _keys(model, name)
    given = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}

    # Every tensor of the file has a place, and every place a tensor.
    if set(given) != set(keys):
        odd = sorted(set(given) ^ set(keys))[0]
        raise ValueError(f"it has {len(given)} tensors that do not match the model's {len(keys)}, such as {odd}")
    for saved, key in keys.items():
        place, _, leaf = key.rpartition(".")
        module = model.get_submodule(place)
        target = module._parameters.get(leaf, module._buffers.get(leaf))
        if target is None or target.shape != given[saved].shape:
            found = None if target is None else tuple(target.shape)
            raise ValueError(f"{saved} has shape {tuple(given[saved].shape)}, expected {found}")
        if not given[saved].is_floating_point() and target.is_floating_point():
            raise ValueError(f"{saved} has dtype {given[saved].dtype}, expected floating numbers")
        value = given[saved].to(_device_around(model, place))
        if isinstance(target, nn.Parameter) and target.is_meta:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=target.requires_grad)
        elif target.is_meta:
            module._buffers[leaf] = value
        else:
            target.data = value  # in place: another module may share it


def _device_around(model: nn.Module, place: str) -> torch.device:
    """The device of the weights nearest to a module."""
    # From the module outwards, to the first that has weights anywhere.
    while True:
        for parameter in model.get_submodule(place).parameters():
            if not parameter.is_meta:
                return parameter.device
        if not place:
            return torch.device("meta")
        place = place.rpartition(".")[0]


def merge_adapters(model: Any, tuners: list[Any], described: dict[str, Any] | None) -> None:
    """Merge a model's active adapters into its weights, and take peft's modules out.

    Raises:
        PositionsError: they adapt weights that another module shares, which merging would change too.
    """
    learns = {id(parameter): parameter.requires_grad for parameter in model.parameters()}

    # Tied embeddings are one weight in two places: merged into one of them, an adapter would act in both.
    shared = model.config.get_text_config().tie_word_embeddings
    names = [n for n, m in peft_layers(model).items() if isinstance(m, peft_wrappers()[:1])]
    ends = {id(e): e for e in (model.get_input_embeddings(), model.get_output_embeddings())}
    tied = [n for n in names if any(id(m) in ends or n.endswith("token_adapter") for m in _around(model, n))]
    if shared and tied:
        raise PositionsError(
            f"the adapter changes {tied[0]}, whose weights the model uses twice; expected load_adapter(..., "
            "merge=False), which leaves it beside them."
        )
    try:
        if described is None or (described["enabled"] and described["active"]):
            tuners[-1].merge_and_unload(adapter_names=None if described is None else described["active"])
        else:
            tuners[-1].unload()
    except (ValueError, NotImplementedError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PositionsError(f"peft cannot merge the adapter: {reason}; expected merge=False.") from error
    vars(model).pop("_hf_peft_config_loaded", None)
    for parameter in model.parameters():
        parameter.requires_grad_(learns.get(id(parameter), True))
