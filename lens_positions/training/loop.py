"""The training loop: AdamW, warm-up and cosine, checkpoints that resume to the bit, held-out evaluation.

A run is a folder:

    training.json        the configuration
    log.jsonl            a line a step and a line an evaluation
    checkpoints/step-N   the newest checkpoint: model, optimizer, state.json (each appears whole, by a rename)
    at/step-N            the model as it was at the steps of `keep_at`
    model                the finished model, for `HookedPositionTransformer.from_pretrained`
    heldout.csv          its loss on each held-out document; written last

Beside it stands a file with `.lock` behind the folder's name, held by the process that works on the run.
Batch n is a function of (seed, n) alone, so a resumed run reads what an uninterrupted one would have read.
"""

import errno
import json
import math
import os
import shutil
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import pandas as pd
import psutil
import torch
import torch._dynamo.config
import torch._dynamo.exc
from accelerate import Accelerator, PartialState
from filelock import FileLock, Timeout
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from ..checkpoint import load_pretrained, replacement_folder, save_pretrained
from ..checkpoint_files import write_whole
from ..core.position_streams import PositionStreams
from ..errors import PositionsError
from ..exits import interruption
from ..model import build_model
from ..tokenizer import END_OF_DOCUMENT, byte_tokenizer
from .checkpoints import (
    LOG,
    OPTIMIZER,
    STATE,
    describe_state,
    newest_checkpoint,
    read_description,
    read_log,
    read_optimizer,
    read_state,
    refuse_damaged,
    refuse_other,
)
from .config import RunConfig, TrainConfig, to_json
from .data import TokenizedCorpus, batch, heldout_documents, heldout_windows, tokenize_corpus
from .schema import CheckpointState, digest_of
from .tables import fixed_table

Nats = Callable[[Any, Int[Tensor, "batch pos"]], Float[Tensor, "batch pos_less_one"]]
"""The loss of each token after the first of its row, by a model, in nats."""

LOG_EVERY = 10
"""Steps between readings of the loss, which makes a GPU wait."""


class DivergedError(PositionsError):
    """The loss stopped being a number at this step."""

    def __init__(self, loss: float, step: int, run: Path) -> None:
        # Names what a person can go back to.
        checkpoint = newest_checkpoint(run)
        kept = "there is no checkpoint from before" if checkpoint is None else f"{checkpoint} is from before"
        super().__init__(f"the loss is {loss} at step {step}; expected a number. Try a lower learning_rate; {kept}.")
        self.step = step


def train(config: TrainConfig, run: Path, *, resume: bool = False, cache_dir: Path = Path(".cache")) -> dict[str, Any]:
    """Train a model into the folder `run` and return its last evaluation.

    Args:
        config: the run; with `resume` it must be the one that the folder was started with.
        run: the folder; a new run needs an empty one.
        resume: go on from the newest checkpoint in it.
        cache_dir: where the tokens of corpora are kept.

    Raises:
        PositionsError: the folder is in use or has nothing to resume, what is in it is damaged, or the corpus cannot
            be had.
        DivergedError: the loss stopped being a number.
        KeyboardInterrupt: after an interrupt, when the checkpoint has been written.
    """
    if resume:
        read_description(run)
    else:
        refuse_used(run)
    accelerator = new_accelerator(config, run)
    corpus = tokenize_corpus_once(config, cache_dir, accelerator)
    training = Run(config, run, accelerator, corpus, FreshModel(config, corpus))
    if resume:
        training.saved_progress()
    with lock_folder(run):
        return training.go(resume)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes; one that is killed leaves no lock behind.

    Raises:
        PositionsError: another process has it.
    """
    if not PartialState().is_main_process:  # of joint processes, the one that writes
        yield
        return

    # One folder by two names is one lock.
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = os.strerror(errno.ENOTDIR) if isinstance(error, FileExistsError) else error.strerror
        raise PositionsError(f"{folder} cannot be written ({reason}); expected a place in a folder.") from error

    # Beside the folder: a new run needs the folder itself empty.
    lock = FileLock(folder.with_name(f"{folder.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise PositionsError(f"another process works on {folder}; expected one at a time.") from error
    try:
        yield
    finally:
        lock.release()


def new_accelerator(config: RunConfig, run: Path) -> Accelerator:
    """The devices and processes that this program was started on.

    Raises:
        PositionsError: a tracker that accelerate does not have.
    """
    try:
        return Accelerator(
            cpu=not torch.accelerator.is_available(),
            log_with=list(config.trackers) or None,
            project_dir=run,
        )
    except ValueError as error:
        raise PositionsError(f"trackers is {config.trackers}; {error}") from error


def tokenize_corpus_once(
    config: RunConfig, cache_dir: Path, accelerator: Accelerator, tokenizer: Any = None
) -> TokenizedCorpus:
    """The corpus as tokens; with several processes the first one writes the cache and the others read it."""
    # The cache is written once; the others wait, and find it.
    with accelerator.main_process_first():
        return tokenize_corpus(
            config.corpus, cache_dir, text_column=config.text_column, max_bytes=config.max_bytes, tokenizer=tokenizer
        )


class Subject(ABC):
    """What a run trains, and how that is written and read."""

    model: Any  # a transformers model with streams attached
    n_ctx: int
    byte_tokens: bool = True  # losses are per byte, and else per token
    bos: int | None = None  # what every sequence starts with, where the tokenizer puts it in front of texts

    @abstractmethod
    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The parameters that learn, with the learning rate of each group."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was learned, as a folder that `from_pretrained` loads."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """Take over what `save` wrote."""

    def identity(self) -> dict[str, str]:
        """What a run must be resumed with, besides its configuration and its text."""
        return {}


class FreshModel(Subject):
    """A model of bytes from fresh weights, all of which learn."""

    def __init__(self, config: TrainConfig, corpus: TokenizedCorpus) -> None:
        model = config.model
        width, mlp = model.d_model, model.d_mlp or 4 * model.d_model

        # Four attention projections and three of the MLP in each layer, in bytes of float32: enough to refuse a typing
        # error.
        weights = model.n_layers * width * (4 * width + 3 * mlp)
        refuse_too_large(4 * weights, f"a model of {model.n_layers} layers and width {width}")
        self.model = build_model(config.model, seed=config.seed, table=fixed_table(config, corpus))
        self.n_ctx, self.learning_rate = config.model.n_ctx, config.learning_rate

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Everything, at one rate."""
        return [(list(self.model.parameters()), self.learning_rate)]

    def save(self, folder: Path) -> None:
        """Write the whole model."""
        save_pretrained(self.model, byte_tokenizer(), folder)

    def restore(self, folder: Path) -> None:
        """Take over a whole model."""
        self.model.load_state_dict(load_pretrained(folder)[0].state_dict())


def refuse_too_large(size: int, what: str) -> None:
    """Refuse what alone takes more than this machine's memory.

    Raises:
        PositionsError: it has more bytes.
    """
    memory = psutil.virtual_memory().total
    if size > memory:
        raise PositionsError(
            f"{what} takes over {size / 1e9:,.0f} GB; expected less than the {memory / 1e9:,.0f} GB of memory here."
        )


class Run:
    """One training run, in this process's memory."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        accelerator: Accelerator,
        corpus: TokenizedCorpus,
        subject: Subject,
        name: str = "training",
        whole: Path | None = None,
    ) -> None:
        """Args as attributes; `whole` is what a person resumes, where the run is a part of it."""
        # Each process takes its share of a batch, in as many parts as are accumulated.
        parts = config.accumulate * accelerator.num_processes
        if config.batch_size % parts:
            raise PositionsError(
                f"batch_size {config.batch_size} is no multiple of {accelerator.num_processes} processes times "
                f"accumulate {config.accumulate}; expected equal parts."
            )
        refuse_too_large(8 * config.batch_size * (subject.n_ctx + 1), f"a batch of {config.batch_size}")
        self.config, self.folder, self.accelerator, self.corpus = config, folder, accelerator, corpus
        self.subject, self.model, self.n_ctx = subject, subject.model, subject.n_ctx
        self.name, self.whole = name, whole or folder
        self.unit = "byte" if subject.byte_tokens else "token"
        self.console = Console(stderr=True)
        self.windows = heldout_windows(corpus.heldout, self.n_ctx, config.eval_windows)
        groups: list[dict[str, Any]] = []
        for parameters, rate in subject.groups():
            # Weight decay is for matrices; it would pull norms and biases to zero.
            matrices = [p for p in parameters if p.ndim >= 2]
            vectors = [p for p in parameters if p.ndim < 2]
            groups += [{"params": matrices, "lr": rate}, {"params": vectors, "lr": rate, "weight_decay": 0.0}]
        if config.compile:
            # Over several processes, torch.compile would cut the graph at the buckets of gradients that DDP sends, so
            # that sending overlaps with computing. The sums are the same without: one graph, on one process as on many.
            torch._dynamo.config.optimize_ddp = False

        # The model and its loss as one module, so that DDP sees the whole of a step.
        self.prepared_model = accelerator.prepare(TokenNats(self.model))
        self.learns = any(group["params"] for group in groups)
        if self.learns:
            groups = [group for group in groups if group["params"]]

            # fused: one kernel for all parameters instead of several for each.
            optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
            self.schedule = get_cosine_schedule_with_warmup(optimizer, config.warmup_steps, config.steps)
            self.optimizer = accelerator.prepare(optimizer)
        # Forward pass and loss as one graph, whose backward is one as well.
        # On one GPU it is recorded as CUDA graphs: a step of a small model is hundreds of launches otherwise.
        recorded = config.compile and accelerator.device.type == "cuda" and accelerator.num_processes == 1
        mode = "reduce-overhead" if recorded else None
        self.step_nats: Nats = torch.compile(token_nats, mode=mode) if config.compile else token_nats

        # A recorded graph writes its gradients to the same place again; several parts add up in a place of their own.
        self.keeps_gradients = recorded and config.accumulate > 1
        for parameter in self.model.parameters() if self.keeps_gradients else ():
            parameter.grad = torch.zeros_like(parameter)
        self.step = 0
        self.interrupted: type[KeyboardInterrupt] | None = None
        self.heldout_nats: Float[Tensor, "window pos_less_one"] | None = None  # of the newest evaluation

    def go(self, resume: bool) -> dict[str, Any]:
        """Train to the end and return the last evaluation."""
        self._open(resume)
        config, accelerator = self.config, self.accelerator

        # Losses stay on the device until they are logged: reading one makes a GPU wait.
        pending: list[Tensor] = []
        evaluation: dict[str, Any] = {}
        self.model.train()
        began, began_at = time.monotonic(), self.step
        with self._progress() as show, interrupts() as interrupted:
            while self.learns and self.step < config.steps:
                pending.append(self._train_step())
                self.step += 1

                # With several processes all of them must stop at the same step, or one waits for the others for ever.
                stop = self._any(interrupted) if accelerator.num_processes > 1 else bool(interrupted)
                last = stop or self.step == config.steps

                # Always before a checkpoint, so that its log holds every step up to it.
                if last or self.step % LOG_EVERY == 0 or self.step % config.save_every == 0:
                    speed = (self.step - began_at) * config.batch_size * self.n_ctx / (time.monotonic() - began)
                    show(self._log_losses(pending, speed))
                if self._is_evaluated(self.step):
                    evaluation = self.evaluate(show)
                    self._log(evaluation)
                    show(evaluation)
                if self.step in (config.keep_at or ()) and accelerator.is_main_process:
                    with replacement_folder(self.folder / "at" / f"step-{self.step:08d}") as folder:
                        self.subject.save(folder)
                if last or self.step % config.save_every == 0:
                    self._save()
                if stop:
                    break

            # A baseline that learns nothing is done before its first step.
            done = self.step == config.steps or not self.learns
            if done and not evaluation:  # nothing was left to train
                evaluation = self.evaluate(show)
                if not self.learns:
                    self._log(evaluation)
                    show(evaluation)
        self.interrupted = interruption(interrupted[0]) if interrupted else None
        if not done:
            raise (self.interrupted or KeyboardInterrupt)(
                f"interrupted at step {self.step} of {config.steps}; --resume {self.whole} goes on from there"
            )
        if accelerator.is_main_process:
            self.subject.save(self.folder / "model")
            self._write_heldout()
        accelerator.wait_for_everyone()
        if config.trackers:
            accelerator.end_training()
        return evaluation

    def _train_step(self) -> Float[Tensor, ""]:
        """One optimizer step, eager from here on where the compiler fails; the mean loss."""
        # Nothing is compiled, or no longer.
        if self.step_nats is token_nats:
            return self._optimized_step()
        try:
            return self._optimized_step()
        # OSError: its cache cannot be written. What else fails so fails again without the compiler, and is raised.
        except (torch._dynamo.exc.TorchDynamoException, OSError) as error:
            # The first line; the compiler's own message runs over pages.
            reason = str(error).strip().splitlines()[0].rstrip(".")
            self._say(f"{self.name}: torch.compile failed ({reason}); training goes on without it")
            self.step_nats = token_nats
            self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
            return self._optimized_step()

    def _optimized_step(self) -> Float[Tensor, ""]:
        config, accelerator = self.config, self.accelerator
        size = config.batch_size
        # Dropout, where a base has it, draws the same in a run that is resumed.
        torch.manual_seed((config.seed << 32) + (self.step << 8) + accelerator.process_index)

        # A function of seed and step alone: a run that is resumed sees the rows that it would have seen.
        rows = batch(self.corpus.train, seed=config.seed, n=self.step, batch_size=size, n_ctx=self.n_ctx)
        share = size // accelerator.num_processes

        # The same batch whatever the number of processes, cut among them.
        rows = rows[accelerator.process_index * share :][:share].to(accelerator.device, non_blocking=True)
        total = torch.zeros((), device=accelerator.device)
        parts = rows.chunk(config.accumulate)
        for i, part in enumerate(parts):
            # Gradients are exchanged between processes once a step, with the last part.
            more = i + 1 < len(parts)
            with accelerator.no_sync(self.prepared_model) if more else nullcontext():
                # The mean over the batch is the mean over parts of one size.
                loss = self._nats(part, self.step_nats).mean() / len(parts)
                accelerator.backward(loss)
            total += loss.detach()
        accelerator.clip_grad_norm_(self.prepared_model.parameters(), config.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        return accelerator.reduce(total, "mean") if accelerator.num_processes > 1 else total

    def _nats(self, rows: Int[Tensor, "batch pos"], nats: Nats) -> Float[Tensor, "batch pos_less_one"]:
        bf16 = self.config.precision == "bf16"
        if self.subject.bos is not None:
            # Windows are cut anywhere; a model that always saw its BOS first gets it here too, in the place of the
            # first token.
            rows = torch.cat([torch.full_like(rows[:, :1], self.subject.bos), rows[:, 1:]], dim=1)
        with torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16, enabled=bf16):
            return cast(Tensor, self.prepared_model(rows, nats))

    @torch.no_grad()
    def evaluate(self, show: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Loss on the held-out windows and the increments that they get, layer by layer."""
        streams = cast(PositionStreams, self.model.position_streams)
        cap = streams.config.max_increment if streams.config.activation == "sigmoid" else math.inf
        training, found = self.model.training, []
        self.model.eval()

        # A bare model has no cache of activations: the streams record themselves.
        with streams.record() as seen:
            # Always eager: a window batch of another size would compile a graph of its own.
            for rows in self.windows.split(self.config.batch_size):
                found.append(self._nats(rows.to(self.accelerator.device), token_nats).double().cpu())
                if show:
                    show({"windows": sum(map(len, found))})

        # An evaluation in the middle of training leaves dropout as it was.
        self.model.train(training)
        self.heldout_nats = torch.cat(found)

        # Per byte: the tokens that end documents are predicted, and are no bytes.
        count = int(self._loss_mask().sum())
        nats = self.heldout_nats.sum().item() / count
        return {
            "step": self.step,
            f"heldout_nats_per_{self.unit}": nats,
            f"heldout_bits_per_{self.unit}": nats / math.log(2),
            f"heldout_{self.unit}s": count,
            "increments": [spread(layer[:, streams.config.effective], cap) for layer in seen],
        }

    def _loss_mask(self) -> Bool[Tensor, "window pos_less_one"]:
        """Predicted tokens that a loss is divided by."""
        predicted = self.windows[:, 1:]
        return are_bytes(predicted) if self.subject.byte_tokens else torch.ones_like(predicted, dtype=torch.bool)

    def _write_heldout(self) -> None:
        """The newest evaluation by document: a row each with its predicted tokens and their nats."""
        assert self.heldout_nats is not None

        # By document, as these are the samples that a difference of two runs is tested over.
        documents = heldout_documents(self.corpus, self.n_ctx, self.config.eval_windows)
        columns = {"document": documents, self.unit + "s": self._loss_mask().int(), "nats": self.heldout_nats}
        table = pd.DataFrame({name: values.flatten().numpy() for name, values in columns.items()})
        text = table.groupby("document").sum().to_csv()
        write_whole(self.folder / "heldout.csv", lambda file: file.write(text.encode()))

    def _open(self, resume: bool) -> None:
        """Begin the run, or take up where it was left; everything there is checked before anything is written."""
        described, kept = self._description(), list[str]()
        if resume:
            described, checkpoint, state, kept = self.saved_progress()
            if checkpoint is not None and state is not None:
                self._load(checkpoint, state)
        else:
            refuse_used(self.folder)
        self.digest = digest_of(described)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if not resume:
                self.folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps(described, indent=2) + "\n"
                write_whole(self.folder / "training.json", lambda file: file.write(text.encode()))

            # The log is cut back to the checkpoint: what was logged after it happens again.
            lines = "".join(line + "\n" for line in kept)
            write_whole(self.folder / LOG, lambda file: file.write(lines.encode()))
        if self.config.trackers:
            self.accelerator.init_trackers("lens-positions", config={"run": str(self.folder)})

    def _description(self) -> dict[str, Any]:
        described = {
            "config": to_json(self.config),
            "corpus_fingerprint": self.corpus.fingerprint,
            **self.subject.identity(),
        }

        # As it reads when it comes back from the file: tuples as lists.
        return dict(json.loads(json.dumps(described)))

    def _is_evaluated(self, step: int) -> bool:
        return step % self.config.eval_every == 0 or step == self.config.steps

    def _log(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.folder / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
        if self.config.trackers:
            flat = {k: v for k, v in record.items() if isinstance(v, float)}
            self.accelerator.log(flat, step=record["step"])

    def _log_losses(self, pending: list[Tensor], speed: float) -> dict[str, Any]:
        # One wait for the device, for all losses since the last reading.
        losses = torch.stack(pending).tolist()
        first = self.step - len(losses) + 1
        newest: dict[str, Any] = {}
        pending.clear()
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise DivergedError(loss, step, self.folder)
            newest = {"step": step, "loss": loss}
            if step == self.step:
                newest |= {"learning_rate": self.schedule.get_last_lr()[0], "tokens_per_second": round(speed)}
            self._log(newest)
        return newest

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            checkpoints = self.folder / "checkpoints"
            checkpoint = checkpoints / f"step-{self.step:08d}"
            with replacement_folder(checkpoint) as folder:
                self.subject.save(folder / "model")
                state = self.optimizer.state_dict()

                # safetensors holds no nested state: number of the parameter, then name of the moment.
                tensors = {f"{i}.{k}": v.contiguous() for i, s in state["state"].items() for k, v in s.items()}
                save_file(tensors, folder / OPTIMIZER)
                schedule = self.schedule.state_dict()
                described = describe_state(folder, self.step, self.digest, schedule, state["param_groups"])
                (folder / STATE).write_text(json.dumps(described), "utf-8")

            # Only after the new one is whole.
            for other in checkpoints.iterdir():
                if other != checkpoint:
                    shutil.rmtree(other, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def saved_progress(self) -> tuple[dict[str, Any], Path | None, CheckpointState | None, list[str]]:
        """What is there to go on from: the run's description, its checkpoint, that one's state, the log up to there.

        Raises:
            PositionsError: it is of another run, or damaged.
        """
        refuse_other(self.folder, self._description())
        described = dict(read_description(self.folder))
        checkpoint = newest_checkpoint(self.folder)
        if checkpoint is None:
            return described, None, None, read_log(self.folder, 0, self._is_evaluated)
        state = read_state(checkpoint)
        if not self.learns or state["step"] > self.config.steps:
            raise PositionsError(f"{checkpoint} is of a step that this run does not have; expected its own.")
        refuse_damaged(checkpoint, state, self._expected_state(state["step"]))
        return described, checkpoint, state, read_log(self.folder, state["step"], self._is_evaluated)

    def _load(self, checkpoint: Path, state: CheckpointState) -> None:
        """Take over a checkpoint that was checked."""
        # In the order in which the optimizer numbers them.
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = read_optimizer(checkpoint, parameters)
        try:
            self.subject.restore(checkpoint / "model")
            self.optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
            self.schedule.load_state_dict(state["schedule"])
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise PositionsError(f"the checkpoint {checkpoint} is damaged: {' '.join(str(error).split())}") from error
        self.step = state["step"]

    def _expected_state(self, step: int) -> dict[str, Any]:
        """The schedule and the groups of parameters after a step, which the configuration decides."""
        schedule, groups = self.schedule.state_dict(), self.optimizer.state_dict()["param_groups"]

        # What the schedule would be at that step, computed anew: a state.json that says otherwise was edited.
        rates = [
            rate * factor(step) for rate, factor in zip(schedule["base_lrs"], self.schedule.lr_lambdas, strict=True)
        ]
        schedule |= {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
        return {
            "schedule": schedule,
            "param_groups": [group | {"lr": rate} for group, rate in zip(groups, rates, strict=True)],
        }

    def _any(self, interrupted: list[int]) -> bool:
        return bool(self.accelerator.reduce(torch.tensor(len(interrupted), device=self.accelerator.device)).item())

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _progress(self) -> Iterator[Any]:
        """A function that shows what was logged: a bar on a terminal, now and then a line elsewhere."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        live = self.console.is_terminal and self.accelerator.is_main_process
        with Progress(*columns, console=self.console, disable=not live, transient=False) as bar:
            task = bar.add_task(self.name, total=self.config.steps, completed=self.step, status="")
            began, began_at, printed = time.monotonic(), self.step, 0.0

            def show(record: dict[str, Any]) -> None:
                nonlocal printed
                if "windows" in record:
                    status = f"evaluating {record['windows']} of {len(self.windows)} windows"
                    bar.update(task, status=status)
                    if not live and time.monotonic() - printed > 15:
                        printed = time.monotonic()
                        self._say(f"{self.name}: step {self.step} of {self.config.steps}  {status}")
                    return
                if "increments" in record:
                    nats, bits = (record[f"heldout_{kind}_per_{self.unit}"] for kind in ("nats", "bits"))
                    text = f"held-out loss {nats:.4f} nats per {self.unit} ({bits:.4f} bits)"
                    text = f"{self.name}: step {self.step}: {text}"
                    (bar.console.print if live else self._say)(text)
                    return
                status = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,} tokens/s"
                bar.update(task, completed=self.step, status=status)
                if not live and time.monotonic() - printed > 15:
                    printed = time.monotonic()
                    left = (printed - began) / max(1, self.step - began_at) * (self.config.steps - self.step)
                    self._say(
                        f"{self.name}: step {self.step} of {self.config.steps}  {status}  {left / 60:.1f} min left"
                    )

            yield show


class TokenNats(nn.Module):
    """Forward pass and loss as a module.

    DDP calls it as a whole. Its own bookkeeping, which cannot be traced, so stays outside a compiled function.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Int[Tensor, "batch pos"], nats: Nats) -> Float[Tensor, "batch pos_less_one"]:
        """The loss of each token after the first of its row, by `token_nats` or what it was compiled to."""
        return nats(self.model, rows)


def token_nats(model: Any, rows: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos_less_one"]:
    """The loss of each token after the first of its row, in nats."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction="none")


def are_bytes(tokens: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Which tokens of a byte model are bytes of text: those that end a document are not."""
    return tokens != END_OF_DOCUMENT


def spread(increments: Float[Tensor, "batch pos *head"], cap: float) -> dict[str, float]:
    """Mean, spread and extremes of increments, and the share within 1% of the cap."""
    values = increments.double()
    return {
        "mean": values.mean().item(),
        "std": values.std().item(),
        "min": values.min().item(),
        "max": values.max().item(),
        "share_at_cap": (values >= 0.99 * cap).double().mean().item(),
    }


def refuse_used(folder: Path) -> None:
    """Refuse a folder for a new run.

    Raises:
        PositionsError: there is something in it, or it is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PositionsError(f"{folder} exists already; expected a new or empty folder, or --resume with it.")


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of stopping at once; a second one stops."""
    caught: list[int] = []

    def note(number: int, _frame: object) -> None:
        if caught:
            raise interruption(number)
        caught.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
