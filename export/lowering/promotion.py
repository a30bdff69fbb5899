"""Makes conversions between dtypes explicit, which ONNX operators do not make by themselves."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node
from torch.onnx._internal.fx.passes import InsertTypePromotion, type_promotion

_Interpreter: Any = type_promotion._TypePromotionInterpreter


def convert_explicitly(module: GraphModule) -> None:
    """Insert conversions where the inputs of an operator have different dtypes.

    torch's pass would run every node of the graph again. Tracing has left the result of every node
    with it, so only nodes that change are run.
    """
    promotion = InsertTypePromotion(module)
    promotion.interpreter = _Promotion(module, promotion.interpreter.type_promotion_table)
    promotion.run()


class _Promotion(_Interpreter):  # type: ignore[misc]
    """Torch's pass, with the results that tracing has left."""

    def run_node(self, n: Node) -> Any:
        """The result of a node, after the conversions that it needs."""
        if n.op != "call_function" or "val" not in n.meta:
            return super().run_node(n)
        with self._set_current_node(n):
            rule = type_promotion.get_type_promotion_rule(n, self.type_promotion_table)
            if rule is not None:
                self._maybe_promote_node(n, rule)
        return n.meta["val"]
