"""The critic's own learning rate, and updates that train the critic alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..models.policy import Policy


def give_own_learning_rate(optimizer: Any, critic: nn.Module, learning_rate: float) -> None:
    """Move the critic's parameters into groups of their own, which differ from the others in `lr` alone.

    Before a scheduler is made: it multiplies the rate of every group by the same factor.
    """
    own = {id(p) for p in critic.parameters()}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in own]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in own]
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})


@contextmanager
def critic_alone(policy: Policy) -> Iterator[None]:
    """Inside, losses have no gradient in the student: an optimizer neither moves nor decays its parameters, and keeps
    no moments of them.
    """
    trained = [p for p in policy.student.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
