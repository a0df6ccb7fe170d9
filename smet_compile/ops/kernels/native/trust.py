"""Tells whether another user could change what lies at a path: code that is loaded from there runs as this user."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

_MOST_LINKS = 40
_ROOT = Path("/")


def trusted_folder(path: Path) -> Path:
    """Returns the folder at ``path`` without symbolic links, and makes it and its parents where they are missing.

    Every folder and link on the way belongs to root or this user. Nobody else may write to a folder, unless it is
    sticky as ``/tmp`` is: then others cannot replace the next component, which is checked in its turn. So nobody else
    can put another folder there later.

    Raises:
        PermissionError: another user could. OSError: the folder is not there and cannot be made.
    """
    _check(_ROOT)
    place, num_links = _ROOT, 0
    parts = [*reversed((Path.cwd() / path).parts[1:])]
    while parts:
        part = parts.pop()
        if part == "..":
            place = place.parent
            continue
        following = place / part
        if not os.path.lexists(following):
            with contextlib.suppress(FileExistsError):  # another process makes it too
                following.mkdir(0o700)
        if not _check(following):
            place = following
            continue
        num_links += 1
        if num_links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(following))
        place = _ROOT if target.is_absolute() else place
        parts += reversed(target.parts[1:] if target.is_absolute() else target.parts)
    return place


def is_trusted(status: os.stat_result) -> bool:
    """Returns whether only root and this user can change a file."""
    return status.st_uid in _owners() and not _others_write(status)


def _check(path: Path) -> bool:
    """Raises OSError where ``path`` is no folder that can be trusted; returns whether it is a link instead."""
    status = path.lstat()
    if status.st_uid not in _owners():
        raise PermissionError(f"{path} belongs to user {status.st_uid}, who can change what lies there")
    if stat.S_ISLNK(status.st_mode):
        return True
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if _others_write(status) and not status.st_mode & stat.S_ISVTX:
        mode = stat.S_IMODE(status.st_mode)
        raise PermissionError(f"other users may write to {path} (mode {mode:o}), which chmod go-w ends")
    return False


def _owners() -> set[int]:
    """Returns root, this user, and the owner of ``/``: root itself, under another number in some containers."""
    return {0, os.geteuid(), _ROOT.stat().st_uid}


def _others_write(status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_private(status.st_gid)


def _is_private(group_id: int) -> bool:
    """Returns whether a group is that of this user alone, as where the umask is 002 by default."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(group_id)
    except KeyError:
        return False
    if group_id == 0 or group.gr_name != user.pw_name or set(group.gr_mem) - {user.pw_name}:
        return False
    return all(each.pw_uid == user.pw_uid for each in pwd.getpwall() if each.pw_gid == group_id)
