"""Damage to the weights of a model, as pruning does it: each function returns one that damages a model."""

import torch

TEXT = "model.language_model.layers"
VISION = "model.visual.blocks"


def zero_in(path, rows=slice(None), columns=slice(None)):
    def damage(model):
        with torch.no_grad():
            model.get_submodule(path).weight[rows, columns] = 0

    return damage


def scale_in(path, factor, rows=slice(None), columns=slice(None)):
    def damage(model):
        with torch.no_grad():
            model.get_submodule(path).weight[rows, columns] *= factor

    return damage
