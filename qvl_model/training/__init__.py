"""Training on transformers.Trainer: from a YAML file (``qvl train``), or piece by piece.

from qvl_model import training

training.train(training.TrainConfig.from_yaml("train.yaml"))           # all of it

processor = load_processor(path)                                       # or with a Trainer of your own
rows = training.Rows(training.JsonlRows("train.jsonl"), training.Encoder(processor, max_length=2048))
print(rows.skipped)                                                    # bad rows, with line and reason
trainer = training.Trainer(
    model=qvl_model.accelerate(model), args=TrainingArguments(..., remove_unused_columns=False), train_dataset=rows,
    data_collator=training.Collator(processor), callbacks=[training.CapacityCallback("qwen3-vl-2b", every=100)],
)
trainer.train()
"""

import importlib
from typing import TYPE_CHECKING, Any

from qvl_model.training.checkpoints import last_complete, read_log
from qvl_model.training.config import ConfigError, TrainConfig, describe_keys
from qvl_model.training.data import DataError, DatasetRows, JsonlRows, Rows, Skipped, open_rows
from qvl_model.training.encode import Collator, Encoder, pad
from qvl_model.training.rows import BadRow, Conversation, load_image, parse

if TYPE_CHECKING:
    from qvl_model.training.run import Stopped, TrainResult, build_arguments, load_model, train
    from qvl_model.training.trainer import CapacityCallback, Diverged, LogCallback, Trainer, decayed

__all__ = [
    "BadRow",
    "CapacityCallback",
    "Collator",
    "ConfigError",
    "Conversation",
    "DataError",
    "DatasetRows",
    "Diverged",
    "Encoder",
    "JsonlRows",
    "LogCallback",
    "Rows",
    "Skipped",
    "Stopped",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "build_arguments",
    "decayed",
    "describe_keys",
    "last_complete",
    "load_image",
    "load_model",
    "open_rows",
    "pad",
    "parse",
    "read_log",
    "train",
]

# What needs the packages of qvl[train] is imported when it is asked for.
_LATER = {
    **dict.fromkeys(("Stopped", "TrainResult", "build_arguments", "load_model", "train"), "run"),
    **dict.fromkeys(("CapacityCallback", "Diverged", "LogCallback", "Trainer", "decayed"), "trainer"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
