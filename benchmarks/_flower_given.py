"""What every participant is given in `flower.py` and `_flower_many.py`: a vector that costs nothing to train.

The model is as long as wanted, and its gradient is the same in every round: a factor of the site's times a vector of
multiples of 1/256. Both are short binary fractions, so that nothing is rounded on the way into a sum of 16 fraction
bits, and a sum is right or wrong to the last bit. The worker processes import this module for its model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from protocols.datasets import SiteData
from protocols.fedavg import Update, build_model, evaluate, gradient_update
from protocols.study import Study, parse_study

FEATURES = ("x",)


@functools.cache
def direction(d: int) -> Tensor:
    """Shape [d], float32: multiples of 1/256 in [-1, 1]."""
    return ((torch.arange(d) % 511) - 255).to(torch.float32) / 256


class Given(nn.Module):
    """d parameters whose gradient does not depend on them, as the logit is always zero."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return torch.zeros(len(x), 1)
        along = self.values @ direction(len(self.values))
        return x[:, :1] * (along - along.detach())


def __getattr__(name: str) -> functools.partial[Given]:
    """`model_1000` is the factory of a model of 1000 parameters."""
    word, _, d = name.partition("_")
    if word != "model" or not d.isdecimal():
        raise AttributeError(name)
    return functools.partial(_made, int(d))


def _made(d: int, features: int) -> Given:
    return Given(d)


def study_of(n: int, d: int, rounds: int, protocol: str = "") -> Study:
    """A study over n sites, with the protocol's defaults unless `protocol` has lines of its table."""
    sites = "".join(f'[[sites]]\nname = "site{u:03d}"\n' for u in range(n))
    return parse_study(
        f'name = "given"\nrounds = {rounds}\n'
        '[task]\ndata = "csv"\nfeatures = ["x"]\ntarget = "y"\n'
        f'[model]\nkind = "factory"\nfactory = "_flower_given:model_{d}"\n'
        f'[training]\nalgorithm = "fedsgd"\n[protocol]\n{protocol}\n{sites}'
    )


def rows_of(u: int) -> SiteData:
    """Site u's rows, 16 or 32 of them; the gradient is (1 + u mod 7) / 16 times the direction."""
    count = 16 << u % 2
    y = np.arange(count, dtype=np.float32) % 2
    x = (1 - 2 * y)[:, None] * np.float32(1 + u % 7) / 8
    return SiteData(f"site{u:03d}", FEATURES, x, y, x[:4], y[:4])


def update_of(study: Study, data: SiteData, model: np.ndarray) -> Update:
    """What a site does with the model that came: it sees how that does on its test rows, and computes the gradient."""
    own, cpu = build_model(study, len(FEATURES)), torch.device("cpu")
    own.load_state_dict({"values": torch.from_numpy(model)})
    evaluate(own, data, cpu)
    return gradient_update(own, data, cpu)


def weight_of(sites: Iterable[int]) -> int:
    """Rows of these sites together."""
    return sum(16 << u % 2 for u in sites)


def mean_of(sites: Iterable[int], d: int) -> np.ndarray:
    """The weighted mean of these sites' vectors, float64 of shape [d], from the one exact factor."""
    sites = list(sites)
    total = sum(Fraction((16 << u % 2) * (1 + u % 7), 16) for u in sites)
    # As the server decodes: the exact sum, divided once. The gradient's sign is turned.
    return -(direction(d).numpy().astype(np.float64) * float(total)) / weight_of(sites)
