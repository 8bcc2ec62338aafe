"""The Trainer and its callbacks: weight decay, complete checkpoints, capacity checks, the log."""

import errno
import json
import math
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qvl_model import capacity
from qvl_model.training.checkpoints import LOG, truncate_log

__all__ = ["CapacityCallback", "CheckpointOnSignal", "Diverged", "LogCallback", "Trainer", "decayed", "is_full"]

LOST = (
    "{what} is not finite at step {step}; nothing of it is saved. Take a lower optimizer.learning_rate, or look at the "
    "rows of that step; the same command goes on from the last checkpoint"
)
LEAST_FREE = 1 << 20  # bytes: with less a disk is full


def decayed(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay applies to: matrices. Norms, biases and gates have one dimension or
    none.

    Example:
        >>> "model.language_model.norm.weight" in decayed(model)
        False
    """
    return [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]


class Trainer(transformers.Trainer):
    """transformers' Trainer, with six differences.

    The loss of a step is the mean over all its learned tokens, independent of their distribution over accumulated
    batches and ranks (stock Qwen3-VL takes a mean of means); weight decay applies to matrices only; a checkpoint's last
    file marks it as complete, and one that cannot be written is removed; a loss or weight that is not finite stops the
    run (on GPUs at the next log or checkpoint); and FSDP2 works on CPU ranks too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["callbacks"] = [_StopAtLostLoss(self), *(kwargs.get("callbacks") or ())]  # before checks of capacity
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True
        self._lost: torch.Tensor | None = None  # whether a loss was not finite

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        lost = ~torch.isfinite(loss.detach())
        self._lost = lost if self._lost is None else self._lost | lost
        return loss

    def check_loss(self, step: int) -> None:
        """Raises: Diverged if a loss since the last check was not finite."""
        if self._lost is not None and bool(self._lost):
            raise Diverged(LOST.format(what="the loss", step=step))
        self._lost = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not all(capacity.weights.is_finite(parameter.detach()) for parameter in model.parameters()):
            raise Diverged(LOST.format(what="a weight", step=self.state.global_step))
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # each of the libraries that write raises its own
            folder = Path(str(self.args.output_dir))
            if self.args.process_index == 0:
                shutil.rmtree(folder / f"checkpoint-{self.state.global_step}", ignore_errors=True)
            if not is_full(folder, error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp and not self.is_fsdp_enabled and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate enables FSDP for GPUs only; the rest works with gloo too.
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = (
                DistributedType.FSDP
            )  # every AcceleratorState() reads it from here
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled and state.mixed_precision != "no":
            # accelerate's own policy would also reduce gradients, and round the loss, in 16 bits.
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype={"fp16": torch.float16, "bf16": torch.bfloat16}[state.mixed_precision],
                reduce_dtype=torch.float32,
            )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decayed(model)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The main rank writes trainer_state.json next, which marks the checkpoint as complete; so every rank must have
        # written its part before.
        if self.args.world_size > 1:
            torch.distributed.barrier()


class Diverged(Exception):
    """The loss is NaN or infinite."""


def is_full(folder: Path, error: BaseException) -> bool:
    """Whether an error while writing is that of a full disk."""
    found: BaseException | None = error
    while found is not None:
        if getattr(found, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(found):
            return True
        found = found.__cause__ or found.__context__
    return shutil.disk_usage(folder).free < LEAST_FREE


class _StopAtLostLoss(TrainerCallback):
    """On a CPU at each step; on a GPU, where looking waits for the device, when it is looked at anyway."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_log or control.should_save or args.device.type == "cpu":
            self._trainer.check_loss(state.global_step)


class CheckpointOnSignal(TrainerCallback):
    """While it is entered, SIGTERM ends the run after the step in work, with a checkpoint of it."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Self:
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():  # signals come there
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:  # all ranks stop at the same step
            asked = torch.tensor(int(self.asked), device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.asked = bool(asked)
        if self.asked:
            control.should_save = control.should_training_stop = True


class CapacityCallback(TrainerCallback):
    """Checks the capacity before the first step, every ``every`` steps and after the last, and stops the run on a
    violation.

    All ranks check together. The violation is raised as CapacityError out of ``Trainer.train``, before a checkpoint of
    the step is written, so the newest checkpoint has its full capacity.

    Args:
        spec: as for ``qvl_model.capacity.verify``.
        every: steps between checks.
    Example:
        >>> trainer = Trainer(model=model, args=arguments, train_dataset=rows,
        callbacks=[CapacityCallback("qwen3-vl-2b", every=100)])
    """

    def __init__(self, spec: "capacity.Spec" = None, every: int = 500) -> None:
        if every < 1:
            raise ValueError(f"CapacityCallback: every must be at least 1 step, got {every}")
        self.spec, self.every, self.checks = spec, every, 0

    def _verify(self, model: nn.Module, optimizer: Any) -> None:
        if not isinstance(self.spec, capacity.CapacitySpec):
            inner = capacity.innermost(model)
            self.spec = capacity.CapacitySpec.of(self.spec if self.spec is not None else inner.config, type(inner))
        self.checks += 1
        capacity.verify(model, self.spec, training=True, optimizer=optimizer)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self._verify(model, optimizer)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step % self.every == 0:
            self._verify(model, optimizer)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        self._verify(model, optimizer)


class LogCallback(TrainerCallback):
    """Writes losses into log.jsonl, one line each, flushed at once; a resumed run continues from its checkpoint."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.process_index == 0:
            truncate_log(self.directory, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if args.process_index != 0 or not logs or not ("loss" in logs or "eval_loss" in logs):
            return
        kept = {key: logs[key] for key in ("loss", "learning_rate", "grad_norm", "eval_loss") if key in logs}
        shown = {key: value if math.isfinite(value) else str(value) for key, value in kept.items()}
        with open(self.directory / LOG, "a") as stream:
            stream.write(json.dumps({"step": state.global_step, **shown}) + "\n")
