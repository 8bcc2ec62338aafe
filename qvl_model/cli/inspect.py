"""``qvl inspect``: what ``accelerate`` replaces in a checkpoint."""

import argparse

from qvl_model.cli import models

__all__ = ["add", "run"]


def add(commands: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    parser = commands.add_parser("inspect", help="list what accelerate replaces in a checkpoint")
    parser.add_argument("model", metavar="MODEL", help=models.HELP)
    return parser


def run(arguments: argparse.Namespace) -> None:
    checkpoint = models.checkpoint_of(arguments.model)
    config = models.config_of(checkpoint)
    import torch
    from transformers import AutoModelForImageTextToText

    from qvl_model import api
    from qvl_model.quantization.convert import METHOD, is_quantized_checkpoint, method_of

    if is_quantized_checkpoint(checkpoint):
        method = method_of(checkpoint)
        if method != METHOD:
            becomes = "dense weights (with --weights int8: int8)" if method == "fp8" else "int4, exactly"
            print(f"weights quantised by another tool ({method}); loaded as {becomes}")
        print(api.report(models.read_weights(checkpoint)[0]))
        return
    with torch.device("meta"):  # the structure is enough; no weight is read
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    print(api.report(model))
