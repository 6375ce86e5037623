"""The spectral norm as a constraint: W * min(1, c / sigma), c = the checkpoint's own sigma.

Power iteration with persistent vectors as in Miyato et al. 2018 (arXiv 1802.05957, algorithm 1), u and v
constants in the gradient: G - <G, W / sigma> u v^T where the constraint holds tight. Differs from the
paper: a weight within the bound is left alone, so step 0 computes what the checkpoint computes. Of a
convolution it is the norm of the (out, in * kernel) matrix, which is not the norm of the operator. A
scalar scaling: zeros and the condition number stay.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lpsparse.training.conditioning.base import Conditioning

_FIRST = 60  # iterations on the checkpoint's weight
_EACH = 4  # a step, from where the vectors were
_TIGHT = 1 - 1e-3


class PowerIteration:
    """sigma_max of a matrix that changes slowly, with its singular vectors."""

    def __init__(self, matrix: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(matrix.shape[1], generator=generator).to(matrix)
        self.v = nn.functional.normalize(start, dim=0)
        self.u = matrix.new_zeros(matrix.shape[0])

    def sigma(self, matrix: Tensor, iterations: int = 1) -> Tensor:
        """A lower bound of sigma_max of (rows, columns), tight once the vectors have converged; 0-dim."""
        for _ in range(iterations):
            self.u = nn.functional.normalize(matrix @ self.v, dim=0)
            self.v = nn.functional.normalize(matrix.T @ self.u, dim=0)
        return self.u @ (matrix @ self.v)

    def state_dict(self) -> dict[str, Tensor]:
        return {"u": self.u, "v": self.v}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.u, self.v = state["u"].to(self.u), state["v"].to(self.v)


def exact_sigma(matrix: Tensor) -> Tensor:
    """sigma_max of (rows, columns) by a singular value decomposition; 0-dim."""
    return torch.linalg.matrix_norm(matrix.float() if matrix.dtype != torch.float64 else matrix, ord=2)


class Spectral(Conditioning):
    def __init__(self, model: nn.Module, names: Iterable[str] | None = None, **options: Any) -> None:
        super().__init__(model, names, **options)
        self.power = {name: PowerIteration(item.rows()) for name, item in self.weights.items()}
        self.bound = {name: exact_sigma(item.rows()) for name, item in self.weights.items()}
        for name, item in self.weights.items():
            self.power[name].sigma(item.rows(), _FIRST)
        self._tight = dict.fromkeys(self.weights, True)
        for name, item in self.weights.items():
            self.handles.append(item.weight.register_post_accumulate_grad_hook(self._hook(name)))
        self.handles.append(model.register_forward_pre_hook(self._enter))
        self._versions = {name: item.weight._version for name, item in self.weights.items()}

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.retract()

    def _hook(self, name: str):
        @torch.no_grad()
        def hook(weight: Tensor) -> None:
            if weight.grad is not None and self._tight[name]:
                item, power = self.weights[name], self.power[name]
                slopes = item.rows(weight.grad)
                along = (slopes * item.rows()).sum() / self.bound[name].clamp(
                    min=torch.finfo(slopes.dtype).tiny
                )
                weight.grad.copy_(item.unrows(slopes - along * torch.outer(power.u, power.v)))

        return hook

    @torch.no_grad()
    def retract(self) -> None:
        for name, item in self.weights.items():
            if item.weight._version == self._versions[name]:
                continue
            self._shrink(name, self.power[name].sigma(self.weights[name].rows(), _EACH))
            self._versions[name] = item.weight._version

    def _shrink(self, name: str, sigma: Tensor) -> None:
        share = float(sigma / self.bound[name])  # NaN for a weight of zeros
        self._tight[name] = share >= _TIGHT
        if share > 1:
            self.weights[name].weight.mul_(1 / share)

    @torch.no_grad()
    def remove(self) -> None:
        for name, item in self.weights.items():
            self._shrink(name, exact_sigma(item.rows()))
        super().remove()

    def state_dict(self) -> dict[str, Any]:
        power = {name: each.state_dict() for name, each in self.power.items()}
        return {"power": power, "tight": dict(self._tight), "changed": self.changed(self._versions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, vectors in state["power"].items():
            self.power[name].load_state_dict(vectors)
        self._tight = dict(state["tight"])
        self._versions = self.versions(state["changed"])
