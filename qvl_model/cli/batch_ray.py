"""``qvl batch --ray``: the same on a cluster, by Ray Data. Each worker is an actor that holds the accelerated model."""

import argparse
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from qvl_model.cli import models
from qvl_model.cli.batch_rows import Answered, Row, answers_to
from qvl_model.cli.errors import CommandError

__all__ = ["answered_by_workers"]

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
BLOCKS = 4096  # of the data set, at most: a block is answered by one worker, and its answers arrive together


class _Worker:
    """An actor. A worker that dies is started anew by Ray, and its batch answered again."""

    def __init__(self, model: str | None, weights: str | None, threads: int, seed: int | None, options: dict) -> None:
        import torch

        self._loaded = models.load(model, weights=weights, threads=threads)
        self._options = options
        if seed is not None:
            torch.manual_seed(seed)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        rows = [Row(**{**row, "folder": Path(row["folder"])}) for row in json.loads(item["batch"])]
        return {"answered": json.dumps(answers_to(self._loaded, rows, self._options))}


def answered_by_workers(batches: list[list[Row]], arguments: argparse.Namespace, options: dict) -> Iterator[Answered]:
    """What became of each batch, as workers finish them. Images are read by the workers, from the same paths.

    Raises: CommandError without Ray, for more workers than the cluster has CPUs, and if a worker cannot load the model.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise CommandError("--ray needs Ray Data: pip install 'qvl[ray]'") from error
    models.checkpoint_of(arguments.model)  # mistakes in names are told before workers start
    ray.init(logging_level=logging.ERROR, log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        cpus = int(ray.cluster_resources().get("CPU", 0))
        threads = arguments.threads or cpus // arguments.ray
        if threads < 1 or threads * arguments.ray > cpus:
            raise CommandError(
                f"--ray {arguments.ray} asks for {arguments.ray} workers of {max(1, threads)} threads, and the cluster "
                f"has {cpus} CPUs"
            )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        items = [
            {"batch": json.dumps([{**vars(row), "folder": str(row.folder.absolute())} for row in batch])}
            for batch in batches
        ]
        found = ray.data.from_items(items, override_num_blocks=min(len(items), BLOCKS)).map(
            cast(Any, _Worker),  # a class: each actor makes one
            fn_constructor_args=(arguments.model, arguments.weights, threads, arguments.seed, options),
            compute=ray.data.ActorPoolStrategy(size=arguments.ray),
            num_cpus=threads,
        )
        for item in found.iter_rows():
            yield Answered(*json.loads(item["answered"]))
    except ray.exceptions.RayError as error:
        raise CommandError(f"a worker failed: {str(error).strip().splitlines()[-1]}") from error
    finally:
        ray.shutdown()
