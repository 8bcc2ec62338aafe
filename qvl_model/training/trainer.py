"""The Trainer and its callbacks: weight decay, complete checkpoints, capacity checks, the log."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qvl_model import capacity
from qvl_model.training.checkpoints import LOG, truncate_log

__all__ = ["CapacityCallback", "LogCallback", "Trainer", "decayed"]


def decayed(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay applies to: matrices. Norms, biases and gates have one dimension or
    none.

    Example:
        >>> "model.language_model.norm.weight" in decayed(model)
        False
    """
    return [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]


class Trainer(transformers.Trainer):
    """transformers' Trainer, with four differences.

    The loss of a step is the mean over all its learned tokens, independent of their distribution over accumulated
    batches and ranks (stock Qwen3-VL takes a mean of means); weight decay applies to matrices only; a checkpoint's last
    file marks it as complete; and FSDP2 works on CPU ranks too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True

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
