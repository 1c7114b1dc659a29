"""Message selectors: the SQL-92 subset of JMS 2.0, section 3.8.1. `compile_selector` is the way in.

`syntax` reads the text, `evaluation` turns what was read into functions, `like` matches patterns, `compiled` keeps the results,
`index` finds of many selectors those that a message may match.
"""

from pybroker.selectors.compiled import Selector, compile_selector

__all__ = ["Selector", "compile_selector"]
