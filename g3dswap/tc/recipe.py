"""All that a printed kernel's text depends on, as a text of its own: its recipe.

What is compiled is stored under a hash of its recipe, so that it is found without being printed again, and
who prints a kernel in another process is sent its recipe and nothing else: what is not in there cannot
become part of a kernel.  That is the scheduled nest with all its fields, the schedule, the target, and the
code that prints.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ..errors import CompileError
from .nest import Access, Axis, Fused, Index, Loop, Nest, Stage, Tensor
from .schedule import Digit, Schedule
from .skew import Skew
from .syntax import Binary, Call, Name, Neg, Number, Ref

_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        *(Access, Axis, Fused, Index, Loop, Nest, Stage, Tensor),
        *(Binary, Call, Name, Neg, Number, Ref),
        *(Digit, Schedule, Skew),
    )
}


def digest_of(package: Path) -> str:
    """A hash of the code in a package's own folder, whether as source or as bytecode without it."""
    found = hashlib.sha256()
    for path in sorted(package.glob("*.py*")):
        found.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    return found.hexdigest()


GENERATOR = digest_of(Path(__file__).parent)
"""Of the code that this process prints with, which is why it is read when that is imported."""


def recipe(nest: Nest, schedule: Schedule, target: Any) -> str:
    """The recipe of a scheduled nest's kernel; `target` is what JSON can hold."""
    return json.dumps([GENERATOR, _plain(nest), _plain(schedule), target])


def read(text: str) -> tuple[Nest, Schedule, Any]:
    """What a recipe was made of. CompileError: by other code than this process has."""
    generator, nest, schedule, target = json.loads(text)
    if generator != GENERATOR:
        raise CompileError("the files of g3dswap have changed since this process began; start it again.")
    return _made(nest), _made(schedule), _made(target)


def _plain(value: Any) -> Any:
    """Dataclasses by name with the fields that tell equal ones apart, tuples as lists."""
    if is_dataclass(value):
        own = [_plain(getattr(value, field.name)) for field in fields(value) if field.compare]
        return {type(value).__name__: own}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _made(data: Any) -> Any:
    """The inverse of `_plain`."""
    if isinstance(data, dict):
        ((name, own),) = data.items()
        return _KINDS[name](*map(_made, own))
    return tuple(map(_made, data)) if isinstance(data, list) else data
