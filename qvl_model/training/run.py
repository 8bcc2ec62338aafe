"""A whole training run from its configuration: load, check the data, train or resume, save."""

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from qvl_model import capacity
from qvl_model.accelerate import accelerate
from qvl_model.checkpoint_files import load_config, one_line
from qvl_model.compat import CHECKPOINTING
from qvl_model.quantization.convert import is_quantized_checkpoint
from qvl_model.training.checkpoints import RunRecord, finished_steps, last_complete, locked, write_finished
from qvl_model.training.config import ConfigError, TrainConfig
from qvl_model.training.data import Rows, open_rows
from qvl_model.training.encode import Collator, Encoder
from qvl_model.training.trainer import CapacityCallback, CheckpointOnSignal, LogCallback, Trainer

__all__ = ["Stopped", "TrainResult", "build_arguments", "load_model", "train"]

FINAL = "final"
# Files of a processor, copied unchanged beside the trained weights.
PROCESSOR_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)


class Stopped(Exception):
    """A signal asked the run to end; its checkpoint is written."""


@dataclass
class TrainResult:
    """The result of a run.

    Attributes:
        directory: the trained model, for from_pretrained.
        steps: optimizer steps altogether.
        resumed_from: step of the checkpoint that the run resumed from; 0 for a new run.
        skipped: lines of the training data that were left out.
    """

    directory: Path
    steps: int
    resumed_from: int
    skipped: int


def _checkpoint_of(config: TrainConfig) -> Path:
    from qvl_model import digits

    path = Path(config.model.path) if config.model.path is not None else digits.CHECKPOINT
    if not (path / "config.json").is_file():
        raise ConfigError(f"model.path: {path} has no config.json; give a checkpoint as save_pretrained writes it")
    return path


def load_model(config: TrainConfig) -> tuple[PreTrainedModel, capacity.CapacitySpec, torch.dtype]:
    """The model to train, in fp32 and accelerated if asked for; its specification; the dtype to save it in.

    Raises: ConfigError if the checkpoint cannot be loaded, lacks weights, or holds NaN or Inf.
    """
    path = _checkpoint_of(config)
    try:
        settings = load_config(path)
        if is_quantized_checkpoint(path):
            raise ConfigError(
                f"model.path: {path} holds quantised weights, which are not trained; train the checkpoint that it was "
                "made from, or an adapter over it with PEFT"
            )
        dtype = (
            settings.dtype if isinstance(settings.dtype, torch.dtype) else torch.float32
        )  # loading in fp32 changes it
        _set_dropout(settings, config)
        if config.model.random_weights:
            torch.manual_seed(config.run.seed)
            model = AutoModelForImageTextToText.from_config(settings, dtype=torch.float32, trust_remote_code=False)
        else:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                path,
                config=settings,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                local_files_only=True,
            )
            model, info = loaded
            for keys in (info["missing_keys"], info["mismatched_keys"]):
                if keys:
                    first = min(key if isinstance(key, str) else key[0] for key in keys)
                    raise ConfigError(
                        f"model.path: {path} lacks {len(keys)} of the model's weights, or has them in another size, "
                        f"such as {first}"
                    )
            capacity.check_finite(model, path)
        model.train()
        if config.model.accelerate:
            model = accelerate(model)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, UnpicklingError) as error:
        raise ConfigError(f"model.path: {path} cannot be trained: {one_line(error)}") from error
    return model, capacity.CapacitySpec.of(model.config, type(model)), dtype


# Names of the two dropouts in the configs of the families.
_DROPOUTS = {
    "attention_dropout": ("attention_dropout", "attention_probs_dropout_prob"),
    "hidden_dropout": ("hidden_dropout_prob",),
}


def _set_dropout(settings: Any, config: TrainConfig) -> None:
    for key, names in _DROPOUTS.items():
        value = getattr(config.model, key)
        if value is None:
            continue
        owners = [
            (part, name) for part in (settings, settings.get_text_config()) for name in names if name in part.to_dict()
        ]
        if not owners:
            raise ConfigError(f"model.{key}: a {settings.model_type} model has no such dropout")
        for part, name in owners:
            setattr(part, name, value)


def _device_and_precision(config: TrainConfig) -> tuple[bool, str]:
    """(whether it trains on GPUs, precision). Raises: ConfigError for what is not available here."""
    run = config.run
    cuda = torch.cuda.is_available() and run.device != "cpu"
    if run.device == "cuda" and not cuda:
        raise ConfigError("run.device is cuda, and PyTorch finds no GPU; use auto or cpu")
    precision = ("fp16" if cuda else "bf16") if run.precision == "auto" else run.precision
    if precision == "fp16" and not cuda:
        raise ConfigError("run.precision fp16 needs a GPU; on a CPU use bf16 (or auto, which chooses)")
    return cuda, precision


def build_arguments(
    config: TrainConfig, model: PreTrainedModel, *, images_in_every_row: bool = True
) -> TrainingArguments:
    """transformers' TrainingArguments for a configuration.

    Args:
        images_in_every_row: False if ranks may get batches without images, so that the vision tower has no gradient.
    Raises: ConfigError for a precision, device or sharding that is not available here.
    """
    run, optimizer, output = config.run, config.optimizer, config.output
    cuda, precision = _device_and_precision(config)
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    options: dict[str, Any] = {CHECKPOINTING: run.gradient_checkpointing}
    if run.gradient_checkpointing:
        options[f"{CHECKPOINTING}_kwargs"] = {"use_reentrant": False}
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if run.sharding == "fsdp":
        if ranks == 1:
            raise ConfigError("run.sharding is fsdp, which needs several ranks: start with torchrun, or use ddp")
        if not images_in_every_row:
            raise ConfigError(
                "run.sharding fsdp needs images in every row or in none: a rank without them would wait for the "
                "others for ever"
            )
        present = {type(module).__name__ for module in model.modules()}
        wrapped = [name for name in model._no_split_modules or () if name in present]
        options |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": wrapped}}
    if ranks > 1:
        options |= {"ddp_find_unused_parameters": not images_in_every_row, "ddp_backend": "nccl" if cuda else "gloo"}
    if run.workers and "dataloader_multiprocessing_context" in names:
        options["dataloader_multiprocessing_context"] = "spawn"  # a forked worker hangs in PyTorch after OpenMP has run
    evaluate = config.data.validation is not None
    return TrainingArguments(
        output_dir=output.directory,
        max_steps=run.steps or -1,
        num_train_epochs=run.epochs or 1,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=run.batch_size,
        gradient_accumulation_steps=run.accumulation,
        optim="adamw_torch",
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.epsilon,
        max_grad_norm=optimizer.max_grad_norm,
        lr_scheduler_type=optimizer.schedule,
        warmup_steps=optimizer.warmup,
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        use_cpu=not cuda,
        seed=run.seed,
        data_seed=run.seed,
        dataloader_num_workers=run.workers,
        remove_unused_columns=False,
        logging_strategy="steps",
        logging_steps=output.log_every,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=not output.progress,
        save_strategy="steps",
        save_steps=output.save_every,
        save_total_limit=output.keep,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=(output.evaluate_every or output.save_every) if evaluate else None,
        prediction_loss_only=True,
        **options,
    )


def _rows(key: str, config: TrainConfig, encoder: Encoder) -> Rows:
    """The rows of data.train or data.validation."""
    source = open_rows(getattr(config.data, key), images=config.data.images, split=config.data.split)
    return Rows(source, encoder, columns=config.data.columns, decode=config.data.decode)


def _report(rows: Rows, file: Path) -> None:
    """Says which rows are skipped, and why."""
    print(rows.skipped, file=sys.stderr)
    if rows.skipped.rows:
        file.write_text("".join(f"line {line}: {reason}\n" for line, reason in rows.skipped.rows))


def _tensorboard(config: TrainConfig, main: bool, step: int) -> list:
    if not config.output.tensorboard:
        return []
    if not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
        raise ConfigError(
            "output.tensorboard needs the tensorboard package: pip install tensorboard, or set it to false"
        )
    if not main:
        return []
    from transformers.integrations import TensorBoardCallback

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        from tensorboardX import SummaryWriter  # type: ignore[no-redef]
    # Hides what a killed run logged after its last checkpoint, since the resumed run logs it again.
    return [
        TensorBoardCallback(
            SummaryWriter(str(Path(config.output.directory) / "tensorboard"), purge_step=step + 1 if step else None)
        )
    ]


def train(config: TrainConfig) -> TrainResult:
    """Trains as configured; resumes from the newest complete checkpoint if the output directory has one.

    Under torchrun every rank calls this. Bad rows are reported on stderr and in ``skipped-*.txt``, losses in
    ``log.jsonl``.

    A run that is finished stays as it is. SIGTERM writes a checkpoint first.

    Returns: where the trained model is, and what was skipped.
    Raises: ConfigError and DataError (both ValueError) before the first step, for configurations and data that
        cannot be trained, most of them before the output directory is made; capacity.CapacityError if the model loses
        capacity during training; Diverged if the loss is no longer finite; Stopped after SIGTERM; OSError for a full
        disk. Each of these leaves the last checkpoint as it was, and the same call goes on from it.
    Example:
        >>> result = train(TrainConfig.from_yaml("train.yaml"))
        >>> model = Qwen3VLForConditionalGeneration.from_pretrained(result.directory)
    """
    from qvl_model.processing import load_processor

    main, directory = int(os.environ.get("RANK", 0)) == 0, Path(config.output.directory)
    path = _checkpoint_of(config)
    _device_and_precision(config)
    try:
        processor = load_processor(path)
        settings = load_config(path)
        encoder = Encoder(processor, config.data.max_length, getattr(settings, "max_num_images", None))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: config or processor of {path} cannot be loaded: {one_line(error)}") from error
    rows = {
        key: _rows(key, config, encoder) for key in ("train", "validation") if getattr(config.data, key) is not None
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output.directory: {directory} cannot be made: {error}") from error
    with locked(directory) if main else contextlib.nullcontext():
        if main:
            for key, found in rows.items():
                _report(found, directory / f"skipped-{key}.txt")
        return _train(config, path, directory, main, processor, rows)


def _train(
    config: TrainConfig, path: Path, directory: Path, main: bool, processor: Any, found: dict[str, Rows]
) -> TrainResult:
    rows, validation = found["train"], found.get("validation")
    mixed = 0 < len(rows.without_images) < len(rows)
    checkpoint, incomplete = last_complete(directory)
    fingerprints = {
        "train": rows.source.fingerprint,
        "validation": validation.source.fingerprint if validation else None,
    }
    record = RunRecord(config.to_dict(), fingerprints, int(os.environ.get("WORLD_SIZE", 1)), path)
    if checkpoint is not None:
        record.check(directory)
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else 0
    done = finished_steps(directory)
    if done is not None and (checkpoint is None or step >= done) and (directory / FINAL / "config.json").is_file():
        if main:
            print(f"{directory} is finished; nothing is changed", file=sys.stderr)
        return TrainResult(directory / FINAL, done, done, len(rows.skipped.rows))
    if main:
        for broken in incomplete:
            print(f"{broken} was not written to its end, it is left out", file=sys.stderr)
        if checkpoint is not None:
            print(f"going on from {checkpoint}", file=sys.stderr)

    model, spec, dtype = load_model(config)
    arguments = build_arguments(config, model, images_in_every_row=not mixed)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=Collator(processor),
        callbacks=[
            CapacityCallback(spec, config.output.capacity_every),
            LogCallback(directory),
            *_tensorboard(config, main, step),
        ],
    )
    if main and checkpoint is None:
        record.write(directory)
    trainer.add_callback(_ProcessorCallback(path))
    try:
        with CheckpointOnSignal() as stop:
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    except UnpicklingError as error:  # the Trainer loads tensors and numbers only
        raise ConfigError(
            f"{checkpoint} holds files that are damaged, or more than data; delete it to go on from the one before"
        ) from error
    if stop.asked:
        raise Stopped(f"stopped after step {trainer.state.global_step}; the same command goes on from there")
    _save_final(trainer, path, directory / FINAL, dtype)
    if main:
        write_finished(directory, trainer.state.global_step)
    return TrainResult(directory / FINAL, trainer.state.global_step, step, len(rows.skipped.rows))


def _copy_processor(source: Path, target: Path) -> None:
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


class _ProcessorCallback(transformers.TrainerCallback):
    """Copies the processor into every checkpoint, so that each is complete."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.process_index == 0:
            _copy_processor(self.source, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")


def _save_final(trainer: Any, source: Path, target: Path, dtype: torch.dtype) -> None:
    """Weights in the dtype of the checkpoint that training began with, config, generation config and processor."""
    state = trainer.accelerator.get_state_dict(trainer.model)  # gathers sharded weights, so every rank must call it
    if trainer.is_world_process_zero():
        model: Any = capacity.innermost(trainer.model)
        model.config.use_cache = True  # the Trainer switched it off
        state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
        model.save_pretrained(target, state_dict=state)
        for part in (model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)):
            if part is not None:
                part.dtype = dtype  # save_pretrained wrote that of the fp32 weights in memory
        model.config.save_pretrained(target)
        _copy_processor(source, target)
    trainer.accelerator.wait_for_everyone()
