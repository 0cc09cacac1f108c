"""Fixtures that every test may use: tiny models on the CPU, nothing from the network, shapes checked at every call."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import shape_checks
import torch
from filelock import FileLock
from transformers import LlamaConfig, LlamaForCausalLM

shape_checks.install()  # before the packages are first imported

import lens_positions as lp  # noqa: E402
from lens_positions.checkpoint import load_base  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: threads cost more than they bring


def in_threads(work, count, threads):
    """The results of `work(i)` for i below `count`, from several threads that begin together."""
    ready = threading.Barrier(threads)

    def waits(i):
        if i < threads:
            ready.wait()
        with torch.no_grad():
            return work(i)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(waits, range(count)))


SMOLLM2 = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M as a folder: half a minute from its package, once for all processes, and then a second a load."""
    folder = Path(os.environ["LENS_POSITIONS_TESTS"])
    with FileLock(folder / "smollm2.lock"):
        if not (folder / SMOLLM2).exists():
            for part in load_base(SMOLLM2):
                part.save_pretrained(folder / "unfinished")
            (folder / "unfinished").rename(folder / SMOLLM2)
    return folder / SMOLLM2


@pytest.fixture
def unchecked() -> Iterator[None]:
    """What a person meets who runs without shape checks: the library's own refusals."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def tiny_config() -> Callable[..., lp.PositionModelConfig]:
    """tiny_config(source=..., ...): a byte model of two layers and four heads."""

    def config(**positions: Any) -> lp.PositionModelConfig:
        return lp.PositionModelConfig(
            d_model=32, n_layers=2, n_heads=4, d_mlp=48, n_ctx=64, positions=lp.PositionConfig(**positions)
        )

    return config


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """tiny_llama(...): a Llama with grouped attention (four heads on two) and weights that make positions matter."""

    def llama(*, dtype: torch.dtype = torch.float32, attention: str = "eager", **config: Any) -> LlamaForCausalLM:
        values: dict[str, Any] = {
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.25,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**values | config))
        model.config._attn_implementation = attention
        return model.to(dtype).eval()

    return llama


def drawn_weights(model: Any, seed: int = 0) -> Any:
    """Non-trivial weights everywhere, those of the increment sources included."""
    base = getattr(model, "original_model", model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "position_streams" in name:
                if ".out." in name:
                    parameter.normal_(generator=generator)
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(std=0.25, generator=generator)
        for name, buffer in base.position_streams.named_buffers():
            if name.endswith("table"):
                buffer.uniform_(0.25, 3, generator=generator)
    return model.eval()


@pytest.fixture
def randomize() -> Callable[..., Any]:
    """randomize(model): `drawn_weights`."""
    return drawn_weights


@pytest.fixture
def tiny_model(tiny_config: Any, randomize: Any) -> Callable[..., lp.HookedPositionTransformer]:
    """tiny_model(source=..., ...): a HookedPositionTransformer whose increments are far from one."""

    def model(**positions: Any) -> lp.HookedPositionTransformer:
        return randomize(lp.HookedPositionTransformer.from_config(tiny_config(**positions)))

    return model
