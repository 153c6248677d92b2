"""Has a data set changed since? A digest of all that can be seen of it, taken at each iteration of a loader.

A list of 8,144 (path, label) pairs costs half a millisecond, a tensor of 12 MB three. One relabelled target, a
transform whose size was set, a variable that a transform closes over, a global that ``__getitem__`` names: each gives
another digest, and the items are read anew. Identities alone would not do: Python gives the ``id()`` of a number that
was replaced to the next one.

It follows attributes, slots, containers, functions with what they close over and the globals that they name, and the
classes of the user's own modules. Libraries' own code is taken as fixed while the process runs. What cannot be looked
into (a database, an object written in C) counts by identity.

A class that knows better says with ``__recycle_state__(self)`` what its state consists of.

`lasting_state_of` gives a digest that another process gives too: what counts by identity is refused there, and objects
that are written in C count by what pickling makes of them.

`generators_of` walks the same way in search of private random generators.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import marshal
import os
import random
import sys
import sysconfig
import types
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import parent_process
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from torchrecycle.errors import RecycleError
from torchrecycle.frames import is_frame, plain_of, texts_of

__all__ = ["NoLastingStateError", "generators_of", "lasting_state_of", "state_of"]


class NoLastingStateError(RecycleError, TypeError):
    """An object cannot be told from another one by what it consists of."""


_PLAIN = (str, int, float, bool, type(None), bytes, complex)
_PLAIN_TYPES = frozenset(_PLAIN)
_FULL_BYTES = 1 << 30
"""So many bytes of tensors and arrays are hashed in full (0.3 s); what comes after counts by version and in places."""
_MOST_PARTS = 5_000_000
"""How many parts are looked into; a data set that holds half of the process must not stop it."""


def state_of(*objects: Any) -> str:
    """A digest of the present state of objects, as far as it can be seen: for one process."""
    walk = _Walk()
    for one in objects:
        walk.visit(one)
    return walk.hasher.hexdigest(length=16)


def lasting_state_of(*objects: Any) -> str:
    """A digest of the present state of objects that is the same in another process, all bytes of tensors included.

    Generators count with the state that they are in, files by size and times, loggers and locks not at all.

    Raises:
        NoLastingStateError: something in them counts by identity: an open connection, a sparse tensor.
    """
    walk = _Walk(lasting=True)
    for one in objects:
        walk.visit(one)
    return walk.hasher.hexdigest(length=16)


def generators_of(*objects: Any) -> list[Any]:
    """The random generators that can be reached from objects: Python's, NumPy's and torch's kinds."""
    walk = _Walk(hashes=False)
    for one in objects:
        walk.visit(one)
    return walk.generators


def _is_file(name: Any) -> bool:
    """Whether a text is the path of a file; most are seen at once to be none."""
    path = isinstance(name, str) and ("." in name or os.sep in name) and len(name) < 4096 and "\0" not in name
    return path and os.path.isfile(name)


def _is_plain(values: Any) -> bool:
    """Whether a list holds nothing but numbers and strings, or tuples of these."""
    kinds = set(map(type, values))
    if kinds <= _PLAIN_TYPES:
        return True
    return kinds == {tuple} and all(set(map(type, value)) <= _PLAIN_TYPES for value in values)


class _Nothing:
    """In place of a hasher, where only generators are looked for."""

    def update(self, content: Any) -> None:
        pass


class _Walk:
    """One look at some objects."""

    def __init__(self, *, hashes: bool = True, lasting: bool = False) -> None:
        # A forked worker has not the threads of its parent, and would wait for them for ever.
        threads = blake3.AUTO if parent_process() is None else 1
        self.hasher: Any = blake3(max_threads=threads) if hashes else _Nothing()
        self.generators: list[Any] = []
        self._lasting = lasting
        self._left = sys.maxsize if lasting else _FULL_BYTES
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # an id in `_seen` must not be given again

    def say(self, *words: Any) -> None:
        self.hasher.update((" ".join(map(str, words)) + ";").encode("utf-8", "surrogatepass"))

    def visit(self, value: Any) -> None:
        kind = type(value)
        if kind in _PLAIN_TYPES:
            self.say(kind.__name__, repr(value))
            if kind is str and _is_file(value):
                self._file(value)
            return
        if id(value) in self._seen:
            self.say("again", self._seen[id(value)])
            return
        if len(self._seen) > _MOST_PARTS:
            self._by_identity(value)
            return
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        self.say(kind.__module__, kind.__qualname__)
        next(writer for kinds, writer in _WRITERS if isinstance(value, kinds))(self, value)

    def _by_identity(self, value: Any, *more: Any) -> None:
        """Of what cannot be looked into."""
        if self._lasting:
            raise NoLastingStateError(f"a {type(value).__module__}.{type(value).__qualname__} cannot be looked into")
        self.say("id", id(value), *more)

    def _reduced(self, value: Any) -> None:
        """An object written in C, by what pickling makes of it; only for a digest that lasts."""
        if not self._lasting:
            self._by_identity(value)
            return
        try:
            known = copyreg.dispatch_table.get(type(value))
            parts = value.__reduce_ex__(2) if known is None else known(value)
        except Exception as error:  # whatever a class raises that cannot be pickled
            raise NoLastingStateError(f"a {type(value).__module__}.{type(value).__qualname__}: {error}") from error
        if isinstance(parts, str):  # the name of a global, such as Ellipsis
            self.say(parts)
        else:
            self.visit(tuple(list(part) if isinstance(part, Iterator) else part for part in parts))

    # -- values --------------------------------------------------------------------------------------------------------

    def _sequence(self, value: Any) -> None:
        self.say(len(value))
        if type(value) in (list, tuple) and _is_plain(value):
            self.hasher.update(marshal.dumps(list(value), 2))
            self._files_among(value)
            return
        for part in value:
            self.visit(part)
        self._attributes(value)

    def _files_among(self, values: Any) -> None:
        """Where the first entry names a file, all entries are looked at: a file may change under its path."""
        first = values[0] if len(values) else None
        if isinstance(first, tuple):
            for place, name in enumerate(first):
                if _is_file(name):
                    for value in values:
                        self._file(value[place] if place < len(value) else None)
        elif _is_file(first):
            for value in values:
                self._file(value)

    def _file(self, path: Any) -> None:
        try:
            stat = os.stat(path)
        except (OSError, ValueError, TypeError):
            self.say("no file")
        else:
            self.say(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def _set(self, value: Any) -> None:
        self.say(len(value))
        for part in sorted(value, key=repr):
            self.visit(part)

    def _mapping(self, value: Mapping[Any, Any]) -> None:
        self.say(len(value))
        for name, part in value.items():
            self.visit(name)
            self.visit(part)
        self._attributes(value)

    def _tensor(self, value: torch.Tensor) -> None:
        self.say(value.dtype, tuple(value.shape), value.layout, value.device)
        plain = value.detach()
        try:
            flat = plain.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        except (RuntimeError, NotImplementedError, TypeError):  # sparse, quantised, without storage
            self._by_identity(value, plain._version)
            return
        if not self._bytes(flat):
            self.say("version", plain._version)
        self._attributes(value)

    def _array(self, value: np.ndarray) -> None:
        self.say(value.dtype, value.shape)
        if value.dtype.hasobject or value.dtype.kind == "U":  # texts, which may be paths
            self._sequence(value.ravel().tolist())
        else:
            self._bytes(np.ascontiguousarray(value).reshape(-1).view(np.uint8) if value.size else np.empty(0, np.uint8))

    def _bytes(self, flat: np.ndarray) -> bool:
        """Hash a content; whether all of it."""
        self._left -= flat.nbytes
        if self._left >= 0:
            self.hasher.update(flat.data)
            return True
        for begin in range(0, flat.nbytes, max(1, flat.nbytes // 16)):
            self.hasher.update(flat[begin : begin + 4096].tobytes())
        return False

    def _buffer(self, value: Any) -> None:
        content = memoryview(value)
        self.say(content.format, content.shape)
        self._bytes(np.frombuffer(content.tobytes(), np.uint8))

    def _number(self, value: Any) -> None:
        self.say(value.dtype, value.tobytes().hex())

    def _path(self, value: PurePath) -> None:
        self.say(value)
        self._file(value)

    def _generator(self, value: Any) -> None:
        # What it will draw is no state of the data set: reading items moves it.
        self.generators.append(value)
        if self._lasting:
            self.visit(_state_of_generator(value))

    # -- code ----------------------------------------------------------------------------------------------------------

    def _function(self, function: types.FunctionType) -> None:
        self.say(function.__module__, function.__qualname__)
        for cell in function.__closure__ or ():
            try:
                self.visit(cell.cell_contents)
            except ValueError:  # an empty cell
                self.say("empty")
        self.visit(function.__defaults__)
        self.visit(function.__kwdefaults__)
        if not _is_of_a_library(function.__module__):
            self._code(function.__code__, function.__globals__)

    def _code(self, code: types.CodeType, names: dict[str, Any]) -> None:
        self.hasher.update(code.co_code)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, names)
            elif isinstance(constant, frozenset):  # whose order is another in each process
                self.say(sorted(map(repr, constant)))
            else:
                self.say(repr(constant))
        asked = _globals_of(code)
        for name in _imports_of(code):
            module = sys.modules.get(name)
            if module is not None and not _is_of_a_library(name):
                self._named_in(code, module)
        for name in code.co_names:
            self.say(name)
            # An attribute's name may be that of a global which has nothing to do with it: a loop's `x` and `self.x`.
            value = names.get(name) if name in asked else None
            if isinstance(value, types.ModuleType) and not _is_of_a_library(value.__name__):
                self._named_in(code, value)
            elif name in asked and name in names and name != "__builtins__":
                self.visit(value)

    def _named_in(self, code: types.CodeType, module: types.ModuleType) -> None:
        """What of a module some code may mean."""
        for attribute in code.co_names:
            if attribute in vars(module):
                self.visit(vars(module)[attribute])

    def _method(self, method: types.MethodType) -> None:
        self.visit(method.__func__)
        self.visit(method.__self__)

    def _builtin(self, function: types.BuiltinFunctionType) -> None:
        self.say(function.__module__, function.__qualname__)
        if not isinstance(function.__self__, types.ModuleType):
            self.visit(function.__self__)

    def _partial(self, partial: functools.partial[Any]) -> None:
        self.visit(partial.func)
        self.visit(partial.args)
        self.visit(partial.keywords)

    def _wrapped(self, descriptor: Any) -> None:
        self.visit(descriptor.__func__)

    def _property(self, value: property) -> None:
        self.visit((value.fget, value.fset))

    def _module(self, module: types.ModuleType) -> None:
        self.say(module.__name__)

    def _class(self, kind: type) -> None:
        self.say(kind.__module__, kind.__qualname__)
        for base in kind.__mro__:
            if not _is_of_a_library(base.__module__):
                for name, value in list(vars(base).items()):
                    # Python itself writes names such as `__slotnames__` into a class, when an object is pickled.
                    if not name.startswith(("__", "_abc_")) or isinstance(value, types.FunctionType):
                        self.say(name)
                        self.visit(value)

    # -- objects -------------------------------------------------------------------------------------------------------

    def _hugging_face(self, dataset: Any) -> None:
        self.say(dataset._fingerprint, len(dataset))
        self.visit(dataset.format)
        for name in dataset.column_names:
            parts = [_paths_in(chunk) for chunk in dataset.data.column(name).chunks]
            if parts and len(parts[0]) and _is_file(parts[0][0].as_py()):  # before a column of texts is copied
                self._files_among([path for part in parts for path in part.to_pylist()])

    def _other(self, value: Any) -> None:
        kind = type(value)
        if kind.__module__.split(".")[0] in _OPAQUE:
            if not self._lasting:
                self.say("id", id(value))
            return
        own = getattr(kind, "__recycle_state__", None)
        if own is not None:
            self.visit(own(value))
            return
        if kind.__module__ == "datasets.arrow_dataset" and kind.__name__ == "Dataset":
            self._hugging_face(value)
            return
        if hasattr(kind, "tobytes") and hasattr(kind, "getpalette"):  # a PIL image
            self.say(value.mode, value.size, value.info.get("transparency"), value.getpalette())
            self._bytes(np.frombuffer(value.tobytes(), np.uint8))
            return
        if is_frame(value):
            self._frame(value)
            return
        if _is_image_folder(kind):
            self._files(value)
        if not self._attributes(value):
            self._reduced(value)

    def _frame(self, frame: Any) -> None:
        """Of a pandas, Arrow or polars object its content: it may have been edited in place."""
        try:
            content = plain_of(frame, by_chunk=True)
        except (ValueError, TypeError, NotImplementedError):
            self._by_identity(frame)
        else:
            self.visit(content)
            for texts in texts_of(frame):
                self._files_among(texts)
        kind = type(frame)
        if not _is_of_a_library(kind.__module__):  # what a subclass of the user's adds
            self.visit(kind)
            self.visit({name: part for name, part in getattr(frame, "__dict__", {}).items() if name[:1] != "_"})

    def _files(self, folder: Any) -> None:
        """What tells whether a file was edited under the same path, without reading it."""
        for path, _ in folder.samples:
            stat = os.stat(path)
            self.say(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def _attributes(self, value: Any) -> bool:
        """Those of an object and its class; whether it has any."""
        kind = type(value)
        if not _is_of_a_library(kind.__module__):
            self.visit(kind)
        found = False
        if hasattr(value, "__dict__"):
            found = bool(vars(value))
            for name, part in list(vars(value).items()):
                self.say(name)
                self.visit(part)
        for base in kind.__mro__:
            for name in _slots(base):
                if hasattr(value, name):
                    found = True
                    self.say(name)
                    self.visit(getattr(value, name))
        return found


def _state_of_generator(value: Any) -> Any:
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    return value.get_state()


def _paths_in(chunk: Any) -> Any:
    """A chunk of an Arrow column; of pictures and sounds, as `datasets` keeps them, their paths."""
    return chunk.field("path") if getattr(chunk.type, "get_field_index", lambda _: -1)("path") >= 0 else chunk


_OPAQUE = frozenset(
    {"logging", "threading", "_thread", "_io", "io", "socket", "multiprocessing", "concurrent", "ctypes"}
)
"""Packages whose objects lead to the whole process, or change with each use: a logger knows all loggers."""


def _is_image_folder(kind: type) -> bool:
    return any(
        base.__module__ == "torchvision.datasets.folder" and base.__name__ == "DatasetFolder" for base in kind.__mro__
    )


def _slots(kind: type) -> tuple[str, ...]:
    names = vars(kind).get("__slots__", ())
    names = (names,) if isinstance(names, str) else tuple(names)
    return tuple(
        f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
        for name in names
        if name not in ("__dict__", "__weakref__")
    )


_WRITERS: list[tuple[Any, Callable[[_Walk, Any], None]]] = [
    (torch.Tensor, _Walk._tensor),
    (np.ndarray, _Walk._array),
    (np.generic, _Walk._number),
    ((random.Random, np.random.Generator, np.random.RandomState, torch.Generator), _Walk._generator),
    ((list, tuple, bytearray, deque), _Walk._sequence),
    ((array, memoryview), _Walk._buffer),
    (Mapping, _Walk._mapping),
    ((set, frozenset), _Walk._set),
    (PurePath, _Walk._path),
    (types.FunctionType, _Walk._function),
    (types.MethodType, _Walk._method),
    (types.BuiltinFunctionType, _Walk._builtin),
    (functools.partial, _Walk._partial),
    ((staticmethod, classmethod), _Walk._wrapped),
    (property, _Walk._property),
    (types.ModuleType, _Walk._module),
    (type, _Walk._class),
    (object, _Walk._other),
]


@functools.lru_cache(maxsize=4096)
def _globals_of(code: types.CodeType) -> frozenset[str]:
    """The names that some code looks up among its module's globals."""
    return frozenset(
        str(step.argval) for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    )


@functools.lru_cache(maxsize=4096)
def _imports_of(code: types.CodeType) -> tuple[str, ...]:
    """The modules that some code imports when it runs."""
    found = (str(step.argval) for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME")
    return tuple(dict.fromkeys(found))


# -- whose code is it --------------------------------------------------------------------------------------------------


def _library_folders() -> Iterator[str]:
    for name in ("stdlib", "platstdlib", "purelib", "platlib"):
        folder = sysconfig.get_paths().get(name)
        if folder:
            yield folder


_FOLDERS = tuple(_library_folders())


@functools.lru_cache(maxsize=4096)
def _is_of_a_library(module: str | None) -> bool:
    """Whether a module is installed, rather than the user's own."""
    if module is None:
        return False
    root = module.split(".")[0]
    if root in sys.builtin_module_names or root in sys.stdlib_module_names or root == "torchrecycle":
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and (file.startswith(_FOLDERS) or "site-packages" in file or "dist-packages" in file)
