"""Training steps of a stock and an accelerated model, whose logits are compared."""

import models
import torch
from models import relative

BATCH = models.inputs([5, (1, 4, 6), 3], [14], [3, (1, 2, 2), (1, 8, 6)])
LABELS = torch.where(BATCH["input_ids"] < models.IMAGE, BATCH["input_ids"], -100)


def loss_of(model, logits):
    return model.loss_function(logits=logits, labels=LABELS, vocab_size=models.VOCABULARY)


def assert_same(pair, step, limit=5e-5):
    """What ``step(model)`` returns, and the gradients that it leaves, are stock's."""
    results = []
    for model in pair:
        model.zero_grad()
        out = step(model)
        results.append((out, model.lm_head.weight.grad, model.model.visual.patch_embed.proj.weight.grad))
    leaves = [torch.utils._pytree.tree_leaves(result) for result in results]
    assert len(leaves[0]) == len(leaves[1])
    for expected, ours in zip(*leaves):
        if not isinstance(expected, torch.Tensor):
            assert ours == expected
        else:
            assert (
                ours.shape == expected.shape
                and ours.dtype == expected.dtype
                and relative(ours.detach(), expected.detach()) < limit
            )


def accuracy(logits):
    return (logits[:, :-1].argmax(-1) == LABELS[:, 1:]).sum()


def mask_rare(logits):
    logits[..., 100:] = -1e4
