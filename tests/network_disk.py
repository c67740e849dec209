"""A file system that the kernel takes for sshfs: FUSE, spoken without a library, over a folder of this machine.

`python -m tests.network_disk POINT FOLDER` mounts it where nobody else sees it, says `mounted`, and serves it until its
standard input ends. It knows the calls that a run makes. The protocol is that of linux/fuse.h, version 7.31.
"""

import ctypes
import errno
import os
import select
import struct
import sys
from collections.abc import Callable
from contextlib import suppress

_REQUEST = struct.Struct("<IIQQIIII")
_ATTR = struct.Struct("<6Q10I")
_ENTRY = struct.Struct("<4Q2I")
_READ_WRITE = struct.Struct("<QQIIQII")
_LARGEST = 128 << 10
_NOT_ANSWERED = (2, 36, 42)  # forget, interrupt, forget many
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000


class Served:
    """The folder, by the kernel's numbers of its files. What a method raises is the call's errno."""

    def __init__(self, folder: str) -> None:
        self._paths = {1: folder}
        self._numbers = {folder: 1}
        self.calls: dict[int, Callable[[int, bytes], bytes]] = {
            1: lambda node, data: self._entry(self._join(node, data)),
            3: lambda node, data: struct.pack("<QII", 0, 0, 0) + self._attr(self._paths[node]),
            4: self._setattr,
            9: self._mkdir,
            10: lambda node, data: _done(os.unlink, self._join(node, data)),
            11: lambda node, data: _done(os.rmdir, self._join(node, data)),
            12: lambda node, data: self._rename(node, data, 8),
            14: lambda node, data: self._opened(os.open(self._paths[node], _flags(data) & ~os.O_APPEND)),
            15: self._read,
            16: self._write,
            17: self._statfs,
            18: lambda node, data: _done(os.close, _handle(data)),
            20: lambda node, data: _done(os.fsync, _handle(data)),
            25: lambda node, data: b"",
            26: lambda node, data: struct.pack("<IIIIHHIIHHI28x", 7, 31, 1 << 20, 0, 12, 10, _LARGEST, 1, 0, 0, 0),
            27: lambda node, data: self._opened(os.open(self._paths[node], os.O_RDONLY)),
            28: self._readdir,
            29: lambda node, data: _done(os.close, _handle(data)),
            30: lambda node, data: _done(os.fsync, _handle(data)),
            35: self._create,
            45: lambda node, data: self._rename(node, data, 16),
        }

    def _join(self, node: int, name: bytes) -> str:
        return os.path.join(self._paths[node], os.fsdecode(name.split(b"\0")[0]))

    @staticmethod
    def _attr(path: str) -> bytes:
        found = os.lstat(path)
        times = (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)
        return _ATTR.pack(
            *(found.st_ino, found.st_size, found.st_blocks, *(at // 10**9 for at in times)),
            *(at % 10**9 for at in times),
            *(found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_rdev, 4096, 0),
        )

    def _entry(self, path: str) -> bytes:
        attributes = self._attr(path)
        number = self._numbers.setdefault(path, len(self._paths) + 1)
        self._paths[number] = path
        return _ENTRY.pack(number, 0, 0, 0, 0, 0) + attributes

    @staticmethod
    def _opened(handle: int) -> bytes:
        return struct.pack("<QII", handle, 0, 0)

    def _setattr(self, node: int, data: bytes) -> bytes:
        valid, size, mode = (struct.unpack_from(form, data, at)[0] for form, at in (("<I", 0), ("<Q", 16), ("<I", 68)))
        if valid & 8:
            os.truncate(self._paths[node], size)
        if valid & 1:
            os.chmod(self._paths[node], mode & 0o7777)
        if valid & 32:
            os.utime(self._paths[node])
        return struct.pack("<QII", 0, 0, 0) + self._attr(self._paths[node])

    def _mkdir(self, node: int, data: bytes) -> bytes:
        path = self._join(node, data[8:])
        os.mkdir(path)
        return self._entry(path)

    def _create(self, node: int, data: bytes) -> bytes:
        path = self._join(node, data[16:])
        handle = os.open(path, (_flags(data) & ~os.O_APPEND) | os.O_CREAT, 0o644)
        return self._entry(path) + self._opened(handle)

    def _rename(self, node: int, data: bytes, header: int) -> bytes:
        old, new = data[header:].split(b"\0")[:2]
        source, target = self._join(node, old), self._join(struct.unpack_from("<Q", data)[0], new)
        os.replace(source, target)
        if (number := self._numbers.pop(source, None)) is not None:
            self._paths[number], self._numbers[target] = target, number
        return b""

    @staticmethod
    def _read(node: int, data: bytes) -> bytes:
        handle, offset, size, *_ = _READ_WRITE.unpack_from(data)
        return os.pread(handle, size, offset)

    @staticmethod
    def _write(node: int, data: bytes) -> bytes:
        handle, offset, size, *_ = _READ_WRITE.unpack_from(data)
        return struct.pack("<II", os.pwrite(handle, data[_READ_WRITE.size :][:size], offset), 0)

    def _statfs(self, node: int, data: bytes) -> bytes:
        found = os.statvfs(self._paths[1])
        blocks = (found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree)
        return struct.pack("<5Q4I24x", *blocks, found.f_bsize, 255, found.f_frsize, 0)

    def _readdir(self, node: int, data: bytes) -> bytes:
        _, offset, size, *_ = _READ_WRITE.unpack_from(data)
        made = b""
        for place, name in enumerate(sorted(os.listdir(self._paths[node]))[offset:], offset + 1):
            encoded = os.fsencode(name)
            line = struct.pack("<QQII", place + 1, place, len(encoded), 0) + encoded
            line += bytes(-len(line) % 8)
            if len(made) + len(line) > size:
                break
            made += line
        return made


def _flags(data: bytes) -> int:
    return int(struct.unpack_from("<I", data)[0])


def _handle(data: bytes) -> int:
    return int(struct.unpack_from("<Q", data)[0])


def _done(call: Callable[..., object], *arguments: object) -> bytes:
    call(*arguments)
    return b""


def _call(done: int) -> None:
    if done:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main(point: str, folder: str) -> None:
    """Mount it, and answer the kernel until nobody holds standard input any more."""
    libc = ctypes.CDLL(None, use_errno=True)
    _call(libc.unshare(_CLONE_NEWNS))
    _call(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    _call(libc.mount(b"there:/", point.encode(), b"fuse.sshfs", 0, options.encode()))
    served = Served(folder)
    sys.stdout.write("mounted\n")
    sys.stdout.flush()
    while sys.stdin not in select.select([device, sys.stdin], [], [])[0]:
        try:
            request = os.read(device, _LARGEST + 4096)
        except (BlockingIOError, FileNotFoundError):  # whoever asked has been interrupted meanwhile
            continue
        size, code, unique, node, *_ = _REQUEST.unpack_from(request)
        if code in _NOT_ANSWERED:
            continue
        failed, answer = 0, b""
        try:
            answer = served.calls[code](node, request[_REQUEST.size : size])
        except KeyError:
            failed = errno.ENOSYS
        except OSError as error:
            failed = error.errno or errno.EIO
        with suppress(FileNotFoundError):  # or by now
            os.write(device, struct.pack("<IiQ", 16 + len(answer), -failed, unique) + answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
