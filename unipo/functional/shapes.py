"""The door of the functions here: tensors of one shape, so that nothing broadcasts by accident."""

from __future__ import annotations

from torch import Tensor

__all__ = ["same_length", "same_shape"]


def same_length(**tensors: Tensor) -> None:
    """Raise `ValueError` unless every tensor is flat and all have one length."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) > 1:
        raise ValueError(f"expected flat tensors of one length, found {shapes}; flatten or expand them first")


def same_shape(**tensors: Tensor) -> None:
    """Raise `ValueError` unless all tensors have one shape."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"expected tensors of one shape, found {shapes}; select or expand them first")
