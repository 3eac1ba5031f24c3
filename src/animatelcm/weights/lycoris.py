"""LoHa and LoKr files: changes of weights that are products of two matrices, with LyCORIS' keys.

LoHa (FedPara, section 2.2) multiplies number by number, LoKr (LyCORIS, section 4) is a Kronecker product. Either matrix
is stored in full (``w1``), as two factors (``w1_a``, ``w1_b``), or for convolutions as two and a core (Tucker: ``t1``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from animatelcm.weights.files import State
from animatelcm.weights.lora_keys import ALPHA, missing, parse

Matrix = tuple[Tensor, ...]
"""(full,), (a (out, r), b (r, in)), or (core (r, s, k, k), a (r, out), b (s, in)), which is (out, in, k, k)."""
_FACTOR = re.compile(r"(.+)\.(hada|lokr)_(w[12](?:_[ab])?|t[12])")


@dataclass(frozen=True, eq=False)
class ProductLayer:
    """A change of one weight: scale times the product of two matrices."""

    kind: Literal["LoHa", "LoKr"]
    one: Matrix
    two: Matrix
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight it was made for, as a matrix: out, and all that is summed over."""
        one, two = _shape(self.one), _shape(self.two)
        return one if self.kind == "LoHa" else (one[0] * two[0], one[1] * two[1])

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape can take it."""
        return (shape[0], math.prod(shape[1:])) == self.shape

    def to(self, device: torch.device | str) -> ProductLayer:
        """The same layer with its factors on a device."""
        one, two = (tuple(factor.to(device) for factor in matrix) for matrix in (self.one, self.two))
        return ProductLayer(self.kind, one, two, self.scale)

    def delta(self, shape: Sequence[int]) -> Tensor:
        """What is added to a weight of this shape, which it must fit: float32."""
        assert self.fits(shape), f"a {self.kind} for {self.shape} does not fit {tuple(shape)}"
        one, two = _product(self.one), _product(self.two)
        if self.kind == "LoHa":
            product = one.flatten(1) * two.flatten(1)
        else:
            product = torch.kron(one.reshape(*one.shape, *[1] * (two.ndim - one.ndim)), two.contiguous())
        return self.scale * product.reshape(tuple(shape))


def take_products(path: Path, state: State, known: Mapping[str, str]) -> dict[str, ProductLayer]:
    """Take LoHa's and LoKr's tensors, with their alphas, out of ``state``: the layers that they are, by module path.

    ``known``: kohya's names -> module paths (``lora_keys.names``). The scale is alpha / rank, of a LoKr in full 1.
    Raises ValueError with the file and the first key that is for no module, incomplete, or of a shape or of numbers
    that cannot be.
    """
    stems: dict[tuple[str, str], State] = {}
    for key in sorted(state):
        if match := _FACTOR.fullmatch(key):
            value = state.pop(key)
            if not value.is_floating_point() or not value.float().isfinite().all():
                raise ValueError(f"{path}: {key} holds numbers that no factor has, or not finite ones; fetch it again")
            stems.setdefault((match[1], match[2]), {})[match[3]] = value
    found: dict[str, ProductLayer] = {}
    for (stem, word), factors in stems.items():
        parsed = parse(stem + ALPHA)
        assert parsed is not None
        if parsed.name not in known:
            raise ValueError(f"{path}: {stem} {missing(parsed.name, known)}")
        module, alpha = known[parsed.name], state.pop(stem + ALPHA, None)
        try:
            layer = _layer("LoHa" if word == "hada" else "LoKr", factors, alpha)
        except ValueError as error:
            raise ValueError(f"{path}: {stem} {error}") from error
        if module in found:
            raise ValueError(f"{path}: {stem} is the second change of {module}; keep one of them")
        found[module] = layer
    return found


def _layer(kind: Literal["LoHa", "LoKr"], factors: State, alpha: Tensor | None) -> ProductLayer:
    one, two = _matrix(1, factors), _matrix(2, factors)
    if factors:
        raise ValueError(f"has {min(factors)} beside the whole matrix; fetch it again")
    if alpha is not None and (alpha.numel() != 1 or not alpha.isfinite().all()):
        raise ValueError(f"has an alpha that is no number: {tuple(alpha.shape)}")
    if _shape(one) != _shape(two) if kind == "LoHa" else max(factor.ndim for factor in one) > 2:
        raise ValueError(f"has matrices that do not go together: {_shape(one)} and {_shape(two)}")
    # LyCORIS gives both matrices one rank, and leaves a LoKr without any as it is
    rank = next((matrix[-1].shape[0] for matrix in (two, one) if len(matrix) > 1), None)
    scale = 1.0 if alpha is None or rank is None else alpha.item() / rank
    return ProductLayer(kind, one, two, scale)


def _matrix(number: int, factors: State) -> Matrix:
    """The first or the second matrix, taken out of ``factors``. Raises ValueError where its factors do not fit."""
    if (full := factors.pop(f"w{number}", None)) is not None:
        if full.ndim not in (2, 4):
            raise ValueError(f"has w{number} of shape {tuple(full.shape)}, which is no map's")
        return (full,)
    core = factors.pop(f"t{number}", None)
    for name in (f"w{number}_a", f"w{number}_b"):
        if name not in factors:
            raise ValueError(f"has no {name}; the file is incomplete")
    a, b = factors.pop(f"w{number}_a"), factors.pop(f"w{number}_b")
    inner = (a.shape[-1:], b.shape[:1]) if core is None else ((*a.shape[:1], *b.shape[:1]), core.shape[:2])
    if a.ndim != 2 or b.ndim != 2 or (core is not None and core.ndim != 4) or inner[0] != inner[1] or 0 in inner[1]:
        raise ValueError(f"has factors of w{number} that do not fit: {tuple(a.shape)} and {tuple(b.shape)}")
    return (a, b) if core is None else (core, a, b)


def _shape(matrix: Matrix) -> tuple[int, int]:
    """Rows, and columns with the pixels of a kernel."""
    if len(matrix) == 1:
        return matrix[0].shape[0], math.prod(matrix[0].shape[1:])
    if len(matrix) == 2:
        return matrix[0].shape[0], matrix[1].shape[1]
    core, a, b = matrix
    return a.shape[1], b.shape[1] * math.prod(core.shape[2:])


def _product(matrix: Matrix) -> Tensor:
    factors = [factor.float() for factor in matrix]
    if len(factors) == 3:
        return torch.einsum("rskl,ro,si->oikl", *factors)
    return factors[0] @ factors[1] if len(factors) == 2 else factors[0]
