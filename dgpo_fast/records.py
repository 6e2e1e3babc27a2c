"""Names for the dictionaries that files, requests and reports are made of.

Their values are of several types, and what is in them depends on who wrote them: readers check what they take.
"""

from typing import Any, NoReturn

JsonObject = dict[str, Any]
"""A JSON object: settings, a line of an index, a request, a summary."""
Metrics = dict[str, Any]
"""What was measured, by name: a line of `metrics.jsonl`. Most values are numbers, some are lists or objects of them."""
Metadata = dict[str, Any]
"""What a prompt's source says beside the text, for example GenEval's `include`."""


def refuse_constant(name: str) -> NoReturn:
    """As `parse_constant` of `json.loads`: Python reads NaN and Infinity, which are no JSON."""
    raise ValueError(f"{name} is no JSON")
