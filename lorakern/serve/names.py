"""What an adapter may be called: a name is data, shown and looked up, and never a path."""

from typing import Any

from lorakern.adapters.json_file import show
from lorakern.errors import LorakernError
from lorakern.mixture._checks import check_name as check_printable

AUTO, BASE = "auto", "base"


def check_name(name: Any) -> str:
    """The name, if an adapter may have it.

    Raises:
        LorakernError: it is no printable text of 1 to 255 characters, could be taken for a path or for part of a
            URL that clients rewrite, or means something else where a model is named.

    >>> check_name("poet, <b>2")
    'poet, <b>2'
    """
    check_printable(name)
    if name in (AUTO, BASE):
        raise LorakernError(f"name {show(name)} stands for something else where a request names a model; give another")
    for part in ("/", "\\", ".."):
        if part in name:
            raise LorakernError(f"name {show(name)} holds {show(part)}; a name is no path, leave that out")
    if name != name.strip() or name == ".":
        raise LorakernError(f"name {show(name)} begins or ends with a space, or is a dot; give another")
    return name
