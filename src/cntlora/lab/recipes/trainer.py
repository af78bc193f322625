"""transformers' `Trainer` as `train` uses it: given batches, exact losses, checkpoints that go on exactly.

What differs from the plain Trainer, and why:
- the loss is `model(**batch).loss` and nothing else (the Trainer would divide by its own count of tokens);
- a loss that is not finite ends the run before it gets into the weights;
- a checkpoint holds what training changes, not the model: the pretrained part is made again from its settings;
- nothing is logged, printed or written unless asked for.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from ...data.batches import to_device
from ...messages import quiet_transformers
from ..record import SampleEntry
from .layer_decay import layered_groups
from .scoring import loss_of, modes
from .trackers import Tracked, log_report, tracking
from .train_settings import SCHEDULES, Evaluate, Evaluation, MakeSamples, TrainSettings, cycled

_WEIGHTS = "trained.safetensors"
_STATE = "trainer_state.json"  # the Trainer writes it last, so a checkpoint with it is whole


class Diverged(Exception):
    """The loss is not finite."""


class Recorder(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps the curve of a run, evaluates and samples; its state lies in every checkpoint.

    Attributes:
        losses, times, evaluations, samples: see `Curve`.
        log: tells the trackers, if there are any; the Trainer itself tells them the training loss.
        start: gives what they are told first.
    """

    def __init__(
        self,
        settings: TrainSettings,
        evaluate: Evaluate | None,
        sample: MakeSamples | None,
        progress: Callable[[int, float], None] | None,
    ) -> None:
        self.evaluate, self.eval_at = evaluate, {*settings.eval_at, settings.steps}
        self.sample, self.sample_at = sample, set(settings.sample_at)
        self.progress = progress
        self.losses: list[float] = []
        self.times: list[float] = []
        self.evaluations: list[Evaluation] = []
        self.samples: list[SampleEntry] = []
        self.log: Callable[[dict[str, Any]], None] = _nobody
        self.start: Callable[[], Mapping[str, float | str]] = dict
        self._parts: list[float] = []  # losses of the batches of this update
        self._mark = 0.0

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: plain values, exact in JSON."""
        evaluations = [[e.step, dict(e.metrics), e.seconds] for e in self.evaluations]
        return {"losses": self.losses, "times": self.times, "evaluations": evaluations, "samples": self.samples}

    def restore(self, checkpoint: Path) -> None:
        """Take the curve of a checkpoint."""
        kept = json.loads((checkpoint / _STATE).read_text())["stateful_callbacks"][type(self).__name__]
        self.losses, self.times, self.samples = kept["losses"], kept["times"], kept["samples"]
        self.evaluations = [Evaluation(*values) for values in kept["evaluations"]]

    def part(self, loss: float) -> None:
        """The loss of one batch."""
        self._parts.append(loss)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Scores the start, unless it is the middle of a run that goes on."""
        if state.global_step == 0:
            if start := self.start():
                self.log(dict(start))
            self._look(model, 0)
        self._mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Write the update down; what follows does not count as training."""
        now = time.perf_counter()
        self.times.append((self.times[-1] if self.times else 0.0) + now - self._mark)
        self.losses.append(math.fsum(self._parts) / len(self._parts))
        self._parts = []
        if self.progress:
            self.progress(state.global_step, self.losses[-1])
        self._look(model, state.global_step)
        self._mark = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint does not count as training either."""
        self._mark = time.perf_counter()

    on_log = on_save  # nor does what trackers do

    def _look(self, model: nn.Module, step: int) -> None:
        seconds = self.times[-1] if self.times else 0.0
        if self.evaluate and step in self.eval_at:
            self.evaluations.append(Evaluation(step, dict(self.evaluate(model)), seconds))
            self.log({f"eval_{name}": value for name, value in self.evaluations[-1].metrics.items()})
        if self.sample and step in self.sample_at:
            self.samples += [{"step": step, **one} for one in self.sample(model, step)]


def _nobody(values: dict[str, Any]) -> None:
    """No tracker."""


def _tell(trainer: Trainer, values: dict[str, Any]) -> None:
    """Report values; the Trainer would take that for its own report of this update and leave out the loss."""
    due = trainer.control.should_log
    trainer.log(values)
    trainer.control.should_log = due


class _Trainer(Trainer):  # type: ignore[misc]
    """The Trainer on batches that come as they are."""

    def __init__(
        self, model: nn.Module, args: TrainingArguments, batches: Iterable[Any], recorder: Recorder, **own: Any
    ):
        super().__init__(model, args, callbacks=[recorder])
        self.model_accepts_loss_kwargs = False  # it would hand num_items_in_batch to the model, which changes the loss
        self.remove_callback(PrinterCallback)
        self.batches, self.recorder, self.own = batches, recorder, own

    def get_train_dataloader(self) -> Iterable[Any]:  # type: ignore[override]
        return _Ordered(self.batches, self.own["first"], self.own["count"])

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        rate, decay = self.args.learning_rate, self.own["layer_decay"]
        trained: list[Any] = [p for p in self.model.parameters() if p.requires_grad]
        groups = layered_groups(self.model, rate, decay) if decay else trained
        self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=self.args.weight_decay)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
        loss = loss_of(model(**inputs) if isinstance(inputs, Mapping) else model(inputs))
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged
        self.recorder.part(value)
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        return to_device(inputs, self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        """Nothing is counted, as nothing is divided by it."""

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in _changing(self.model)}, folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        kept = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
        with torch.no_grad():
            for name, tensor in _changing(self.model):
                tensor.copy_(kept[name])


def _changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return what training changes: parameters that require a gradient, and buffers of the model's state."""
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    state = model.state_dict()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in state)


class _Ordered:
    """Batches in their order, without those that a checkpoint has seen."""

    def __init__(self, batches: Iterable[Any], first: int, count: int) -> None:
        self.batches, self.first, self.count = batches, first, count

    def __iter__(self) -> Iterator[Any]:
        return cycled(self.batches, self.count, self.first)


def run_trainer(
    model: nn.Module,
    batches: Iterable[Any],
    settings: TrainSettings,
    learning_rate: float,
    recorder: Recorder,
    folder: Path | None,
    tracked: Tracked,
) -> bool:
    """Train for `settings.steps` updates; the curve is in the recorder. Return whether the loss became not finite."""
    checkpoint = last_checkpoint(folder) if folder and settings.save_every else None
    first, accumulation = 0, settings.gradient_accumulation
    if checkpoint:
        recorder.restore(checkpoint)
        first = len(recorder.losses) * accumulation
    own = {"first": first, "count": (settings.steps or 0) * accumulation, "layer_decay": settings.layer_decay}
    names = settings.report_to
    told = tracking(names, tracked) if names else nullcontext()
    with tempfile.TemporaryDirectory() as temporary, _left_as_found(model), quiet_transformers(), told:
        kept = folder if folder and settings.save_every else Path(temporary)
        arguments = _arguments(model, settings, learning_rate, kept, tracked)
        with _random_state():  # the Trainer seeds everything when it is made
            trainer = _Trainer(model, arguments, batches, recorder, **own)
        if names:
            recorder.log, recorder.start = partial(_tell, trainer), partial(log_report, names, tracked)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Diverged:
            return True
        finally:
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # takes autocast off the forward method
    return False


def _arguments(
    model: nn.Module, settings: TrainSettings, learning_rate: float, folder: Path, tracked: Tracked
) -> TrainingArguments:
    device = next(model.parameters()).device
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps or 0,
        learning_rate=learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup or 0,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bfloat16",
        gradient_accumulation_steps=settings.gradient_accumulation,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=max(1, settings.save_every),
        save_total_limit=2,  # one stays if the process is killed while it writes the other
        ignore_data_skip=True,  # `_Ordered` skips
        use_cpu=device.type == "cpu",
        logging_strategy="steps" if settings.report_to else "no",
        logging_steps=1,
        report_to=list(settings.report_to) or "none",
        run_name=tracked.run,
        **({"project": tracked.project} if "trackio" in settings.report_to else {}),  # none in transformers 4.56
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # no DataParallel: one process, one device
    return arguments


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / _STATE).read_text())
            return path
        except (OSError, ValueError):  # a kill left it half-written
            continue
    return None


@contextmanager
def _random_state() -> Iterator[None]:
    """The global random states are the same after the block as before it."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Modes, attributes and `use_cache` as before, and no gradients; Trainer and accelerate change all of them."""
    config: Any = getattr(model, "config", None)
    before, cache = set(vars(model)), getattr(config, "use_cache", None)
    had_cache = hasattr(config, "use_cache")
    try:
        with modes(model, training=True):
            yield
    finally:
        for name in set(vars(model)) - before:
            delattr(model, name)
        if had_cache:
            config.use_cache = cache
        elif config is not None and hasattr(config, "use_cache"):
            del config.use_cache
        model.zero_grad(set_to_none=True)
