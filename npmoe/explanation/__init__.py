"""What happened to one token, from its logits to its rows."""

from npmoe.explanation.one_token import explain
from npmoe.explanation.result import ExplainedChoice, Explanation

__all__ = ["ExplainedChoice", "Explanation", "explain"]
