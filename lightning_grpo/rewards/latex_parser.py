"""Makes the parser of LaTeX that math-verify uses faster.

ANTLR's parsers spend most of their time on predicting which alternative of a rule follows. This depends on the types of
the tokens alone, not on their text: ``x^2 + 17`` is parsed like ``y^2 + 25``. The predictions are therefore stored for
each sequence of types and repeated for the next text that has it, which leads to the same tree.
"""

from functools import cache, lru_cache, wraps
from typing import Any

SEQUENCES = 4096
"""Sequences of types whose predictions are stored, at most."""


@lru_cache(maxsize=SEQUENCES)
def _predictions(types: tuple[int, ...]) -> list[int]:
    """The alternatives that were predicted for a text with tokens of these types, in order."""
    return []


@cache
def store_predictions() -> None:
    """Have latex2sympy's parser store its predictions in this process."""
    from antlr4.atn.ParserATNSimulator import ParserATNSimulator
    from latex2sympy2_extended.antlr_parser import PSParser

    class Stored(ParserATNSimulator):
        """Repeats the predictions of an earlier text, and makes those that follow."""

        def adaptivePredict(self, *state: Any) -> int:
            self.count += 1
            if self.count > len(self.alternatives):
                self.alternatives.append(super().adaptivePredict(*state))
            return self.alternatives[self.count - 1]

    original = PSParser.math

    @wraps(original)
    def math(parser: Any) -> Any:
        parser._input.fill()
        known = _predictions(tuple(token.type for token in parser._input.tokens))
        parser._interp = stored = Stored(parser, parser.atn, parser.decisionsToDFA, parser.sharedContextCache)
        stored.alternatives, stored.count = list(known), 0
        try:
            return original(parser)
        finally:
            known[:] = stored.alternatives  # of two threads with the same types, one has the beginning of the other's

    PSParser.math = math
