"""What a pickle of weights would do and cost, found out without running it.

``torch.load(weights_only=True)`` bounds what a pickle can do, not what it costs: a few bytes ask for gigabytes, tuples
of tuples as a name take years to hash. So its instructions are walked along first, and end where weights need no more.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

MAX_TENSORS, MAX_DIMS = 100_000, 8
MAX_PICKLE, MAX_DIRECTORY = 2**26, 2**24
"""Bytes, of which a large model needs a hundredth."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool, "U8": torch.uint8}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch before 1.6 begin."""
OTHERWISE = "look for a .safetensors release of the same model, or convert it on a machine that trusts it"

MAX_STEPS = 10 * MAX_TENSORS
"""Instructions of one pickle: a tensor has some thirty of them."""
KINDS = {"Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Bool": "BOOL", "Byte": "U8"}
KINDS |= {"Long": "I64", "Int": "I32", "Short": "I16", "Char": "I8"}
STORAGES = {f"torch {kind}Storage": DTYPES[name] for kind, name in KINDS.items()}
STORAGES |= {"torch.storage UntypedStorage": torch.uint8}
"""How a pickle names the kinds of memory behind its tensors."""
PICKLED_DTYPES = {str(dtype).replace(".", " "): dtype for dtype in DTYPES.values()}
REBUILT = {f"torch._utils _rebuild_{kind}" for kind in ("tensor_v2", "tensor_v3", "parameter")}
GLOBALS = {"collections OrderedDict", "torch Size", "torch device", *REBUILT, *STORAGES, *PICKLED_DTYPES}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
CONSTANTS |= {"EMPTY_TUPLE": (), "EMPTY_LIST": list, "EMPTY_DICT": dict}


def check_pickle(file: BinaryIO, size: int) -> bool:
    """Whether a file of ``torch.save`` is a zip; raises ValueError unless it holds tensors by name and little else."""
    begin = file.read(len(LEGACY))
    zipped = begin.startswith(b"PK\3\4")
    if not zipped and begin != LEGACY:
        raise ValueError("is damaged or no file of torch.save; fetch it again")
    (_check_zip if zipped else _check_legacy)(file, size)
    return zipped


def _check_zip(file: BinaryIO, size: int) -> None:
    """Raises ValueError unless a zip is as torch.save writes them: uncompressed, its parts together not above it."""
    _check_directory(file, size)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            sizes = {member.orig_filename: member.file_size for member in members}
            if len({name.casefold() for name in sizes}) < len(members):
                raise ValueError("is damaged: one of its parts is there twice; fetch it again")
            if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
                raise ValueError("is compressed, which files of torch.save are not; fetch it again")
            if sum(sizes.values()) > size or any(member.file_size != member.compress_size for member in members):
                raise ValueError("is damaged: its parts claim more than the file holds; fetch it again")
            root = members[0].orig_filename.partition("/")[0] if members else ""
            data = f"{root}/data/"
            if max((n for name, n in sizes.items() if not name.startswith(data)), default=0) > MAX_PICKLE:
                raise ValueError(f"has more than {MAX_PICKLE} bytes that are no tensors; {OTHERWISE}")
            stream = io.BytesIO(archive.read(f"{root}/data.pkl"))
    except (zipfile.BadZipFile, LookupError, EOFError, RuntimeError, OverflowError, struct.error) as error:
        raise ValueError(f"is damaged or no file of torch.save ({error}); fetch it again") from error
    records = {name.removeprefix(data): n for name, n in sizes.items() if name.startswith(data)}
    _Walk(records).run(stream)


def _check_directory(file: BinaryIO, size: int) -> None:
    """A zip's list of parts lies right before its end, so that every reader finds the same one (APPNOTE 4.3)."""
    file.seek(max(size - 98, 0))
    tail = file.read(98).rjust(98, b"\0")
    length, begin = struct.unpack("<2L", tail[88:96])
    after = 22
    if tail[56:60] == b"PK\6\7":
        (length, begin), after = struct.unpack("<2Q", tail[40:56]), 98
    known = after == 22 or (tail[:4] == b"PK\6\6" and struct.unpack("<Q", tail[64:72]) == (size - 98,))
    if not known or tail[76:80] != b"PK\5\6" or begin + length + after != size:
        raise ValueError("is cut short or no file of torch.save; fetch it again")
    if length > MAX_DIRECTORY:
        raise ValueError(f"has more than {MAX_TENSORS} parts; give a model's weights")


def _check_legacy(file: BinaryIO, size: int) -> None:
    """Five pickles, of which the fourth has the weights and the fifth the names of its storages, which follow."""
    file.seek(0)
    stream = io.BytesIO(file.read(MAX_PICKLE))
    for _ in range(4):
        walk = _Walk(None)
        walk.run(stream)
    # a storage that is missing in the list would be whatever the memory held before
    if not stream.read().startswith(pickle.dumps(sorted(walk.storages), protocol=2)):
        raise ValueError("is cut short or damaged: it has no list of its storages; fetch it again")
    if sum(storage.nbytes for storage in walk.storages.values()) > size:
        raise ValueError("is cut short or damaged: its tensors claim more than the file holds; fetch it again")


@dataclass(frozen=True)
class _Global:
    """The name of a class or function, "module name", which stands for it; nothing is looked up."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """The memory behind tensors."""

    dtype: torch.dtype
    nbytes: int


class _Walk:
    """A walk along one pickle's instructions, without running them, that ends where they do more than weights need.

    ``weights_only`` bounds what a pickle can do, not what it costs: a few bytes ask for gigabytes, and tuples of tuples
    as a name take years to hash. The stack holds numbers, texts and tuples as they are, and of all else its type.
    """

    def __init__(self, records: Mapping[str, int] | None) -> None:
        """``records``: the size of each storage in bytes, where the file has a list of them."""
        self.records = records
        self.stack: list[object] = []
        self.outer: list[list[object]] = []
        self.memo: dict[object, object] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self, stream: BinaryIO) -> None:
        """Raises ValueError at the first instruction that is damaged or not needed."""
        try:
            for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                if step > MAX_STEPS:
                    raise ValueError("it is too long")
                self._step(opcode.name, argument)
        except (ValueError, LookupError, TypeError) as error:
            reason = f"is damaged, or holds more than weights ({error})"
            raise ValueError(f"{reason}; fetch it again, or {OTHERWISE}") from error

    def _step(self, name: str, argument: object) -> None:
        match name:
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "BINUNICODE" | "SHORT_BINSTRING" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                self.stack.append(argument)
            case _ if name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            case "GLOBAL":
                if argument not in GLOBALS:
                    raise ValueError(f"it asks to run {str(argument).replace(' ', '.')[:100]!r}")
                self.stack.append(_Global(str(argument)))
            case "MARK":
                self.outer.append(self.stack)
                self.stack = []
            case "TUPLE":
                items = tuple(self._since_mark())
                self.stack.append(items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self._pop(int(name[-1]))))
            case "APPEND" | "APPENDS":
                self._pop(1) if name == "APPEND" else self._since_mark()
                self._expect_last(list)
            case "SETITEM" | "SETITEMS":
                items = self._pop(2) if name == "SETITEM" else self._since_mark()
                if any(type(key) not in (str, int) for key in items[::2]):
                    raise ValueError("a name in it is neither a text nor a number")
                self._expect_last(dict, OrderedDict)
            case "BUILD":
                if self._pop(1)[0] is not dict:
                    raise ValueError("it builds an object")
                self._expect_last(OrderedDict)
            case "BINPERSID":
                self.stack.append(self._storage(*self._pop(1)))
            case "REDUCE":
                self.stack.append(_result(*self._pop(2)))
            case "STOP":
                pass
            case "PROTO" if argument == 2:
                pass
            case _:
                raise ValueError(f"it has an unusual {name}")

    def _pop(self, count: int) -> list[object]:
        items = self.stack[-count:]
        if len(items) < count:
            raise ValueError("a value is missing")
        del self.stack[-count:]
        return items

    def _since_mark(self) -> list[object]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _expect_last(self, *kinds: type) -> None:
        if self.stack[-1] not in kinds:
            raise ValueError("it changes an object")

    def _storage(self, name: object) -> _Storage:
        match name:
            case ("storage", _Global(kind), str(key), str(), int(count), *view) if kind in STORAGES and count >= 0:
                storage = _Storage(STORAGES[kind], count * STORAGES[kind].itemsize)
                sizes = {key: storage.nbytes} if self.records is None else self.records
                known = not any(view) and sizes.get(key) == storage.nbytes
                if known and self.storages.setdefault(key, storage) == storage:
                    return storage
        raise ValueError("it asks for a storage that the file does not have")


def _result(function: object, arguments: object) -> type:
    """What a call makes, if weights need it."""
    match (function, arguments):
        case (_Global("collections OrderedDict"), ()):
            return OrderedDict
        case (_Global("torch Size"), (tuple(sizes),)) if all(type(n) is int for n in sizes):
            return torch.Size
        case (_Global("torch device"), (str(),) | (str(), int())):
            return torch.device
        case (_Global("torch._utils _rebuild_parameter"), (made, bool(), hooks)):
            if made is Tensor and hooks is OrderedDict:
                return Tensor
        case (_Global("torch._utils _rebuild_tensor_v2"), (_Storage(dtype, nbytes), *view, bool(), hooks)):
            if hooks is OrderedDict and _fits(view, nbytes // dtype.itemsize):
                return Tensor
        case (_Global("torch._utils _rebuild_tensor_v3"), (_Storage(_, nbytes), *view, bool(), hooks, _Global(kind))):
            if hooks is OrderedDict and _fits(view, nbytes // PICKLED_DTYPES[kind].itemsize):
                return Tensor
    raise ValueError("it makes something else than a tensor within its storage")


def _fits(view: Sequence[object], available: int) -> bool:
    """Whether an offset, a shape and strides stay within a storage and claim no more elements than it has."""
    match view:
        case [int(offset), tuple(shape), tuple(stride)] if len(shape) == len(stride) <= MAX_DIMS:
            if all(type(number) is int and number >= 0 for number in (offset, *shape, *stride)):
                last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
                return math.prod(shape) <= available and (0 in shape or last < available)
    return False
