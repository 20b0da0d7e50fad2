"""What a network knows of classes: a row of a table for each, and one more for "no class" where it is trained for that.

A network that takes conditions says so by two attributes, which ``ScoreModel`` reads: ``num_classes`` (None: it takes
no classes) and ``null_condition``, the condition that stands for none (None: it knows no such one).
"""

from __future__ import annotations

from torch import nn

from scorelab.typing import Tensor

__all__ = ["Classes"]


class Classes(nn.Embedding):
    """(B,) whole numbers -> (B, width); of ``null``, number ``num_classes`` is "no class"."""

    def __init__(self, num_classes: int, width: int, null: bool) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; expected at least 1, or None")
        super().__init__(num_classes + null, width)
        self.num_classes, self.null = num_classes, num_classes if null else None


class Conditional(nn.Module):
    """Base of networks with a table ``classes`` of them, or None."""

    classes: Classes | None

    @property
    def num_classes(self) -> int | None:
        """How many classes the network knows."""
        return None if self.classes is None else self.classes.num_classes

    @property
    def null_condition(self) -> int | None:
        """The number that stands for no class."""
        return None if self.classes is None else self.classes.null

    def embedded(self, condition: Tensor) -> Tensor:
        """The rows of the classes (B,); ValueError for a network without."""
        if self.classes is None:
            raise ValueError(
                f"a condition was given to a {type(self).__name__} without classes; build it with num_classes"
            )
        found: Tensor = self.classes(condition)
        return found
