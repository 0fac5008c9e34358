"""The hooked layers of an engine, and what a condition looks at there."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_steer.engine.registry import DirectionBook, Registered
from vllm_steer.errors import LayerNotHooked
from vllm_steer.schema.conditions import Watch, When


class Hooks:
    """The hooked layers of an engine.

    Args:
        layers: the layers, in the order of the workers' layer indices.

    Attributes:
        index_of: layer -> its index.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.index_of = {layer: index for index, layer in enumerate(layers)}

    def index(self, layer: int) -> int:
        """The index of a layer.

        Raises:
            LayerNotHooked: it is not hooked.
        """
        if layer not in self.index_of:
            raise LayerNotHooked(
                f"layer {layer} is not hooked; hooked: {list(self.index_of)}. Choose one of these, or start "
                "the engine with steer_config(layers=[...]) naming it."
            )
        return self.index_of[layer]

    def look(self, book: DirectionBook, condition: When | Watch) -> tuple[Registered, int]:
        """The direction that a condition names, and the hooked layer at which it looks.

        Raises:
            UnknownDirection, AmbiguousDirection, LayerNotHooked: there is none.
        """
        direction = book.find(condition.direction, condition.layer, self.index_of)
        layer = direction.layer if condition.layer is None else condition.layer
        self.index(layer)
        return direction, layer
