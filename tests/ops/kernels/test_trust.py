"""Tests that a folder is trusted only where no other user can change it, by any folder or link on the way."""

import grp
import os
import pwd
from pathlib import Path
from types import SimpleNamespace

import pytest

from smet_compile.ops.kernels.native import build
from smet_compile.ops.kernels.native.build import trusted_folder

OTHER = 65534
plays_two_users = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")


def test_missing_folders_are_made_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        assert trusted_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    finally:
        os.umask(before)
    assert [(tmp_path / each).stat().st_mode & 0o777 for each in ("a", "a/b")] == [0o700, 0o700]


def test_a_relative_path_and_one_that_goes_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert trusted_folder(Path("a/../b/./c")) == tmp_path / "b" / "c"


def links(folder: Path) -> dict[str, Path]:
    (folder / "to_absolute").symlink_to(folder / "target")
    (folder / "to_relative").symlink_to("sub/../target")
    (folder / "to_link").symlink_to("to_absolute")
    (folder / "to_missing").symlink_to(folder / "missing" / "folder")
    return {
        "to_absolute": folder / "target",
        "to_relative": folder / "target",
        "to_link/below": folder / "target" / "below",
        "to_missing": folder / "missing" / "folder",
    }


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for link, folder in links(tmp_path).items():
        assert trusted_folder(tmp_path / link) == folder and folder.is_dir()


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        trusted_folder(tmp_path / "a")


def test_a_file_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"Not a directory.*file"):
        trusted_folder(tmp_path / "file" / "cache")


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o707, 0o720, 0o702])
@pytest.mark.parametrize("which", ["scratch", "scratch/parent", "scratch/parent/cache"])
def test_others_may_write_to_a_folder_on_the_way(tmp_path: Path, which: str, mode: int) -> None:
    path = trusted_folder(tmp_path / "scratch" / "parent" / "cache")
    (tmp_path / which).chmod(mode)
    if mode & 0o002 or not build._is_private((tmp_path / which).stat().st_gid):
        with pytest.raises(PermissionError, match=f"other users may write to {tmp_path / which} .mode {mode:o}.*chmod"):
            trusted_folder(path)


def test_others_may_write_where_a_link_leads_or_lies(tmp_path: Path) -> None:
    cache = trusted_folder(tmp_path / "open" / "cache")
    (tmp_path / "link").symlink_to(cache)
    (tmp_path / "open" / "link_back").symlink_to(trusted_folder(tmp_path / "own"))
    (tmp_path / "open").chmod(0o777)
    for path in (tmp_path / "link", tmp_path / "open" / "link_back", tmp_path / "open" / ".." / "own"):
        with pytest.raises(PermissionError, match=r"other users may write to .*/open "):
            trusted_folder(path)


def test_a_sticky_folder_may_be_open(tmp_path: Path) -> None:
    path = trusted_folder(tmp_path / "sticky" / "cache")
    path.parent.chmod(0o1777)
    assert trusted_folder(path) == path and trusted_folder(path.parent) == path.parent


@plays_two_users
@pytest.mark.parametrize("which", ["scratch", "scratch/sticky", "scratch/sticky/cache"])
def test_a_folder_on_the_way_belongs_to_another_user(tmp_path: Path, which: str) -> None:
    path = trusted_folder(tmp_path / "scratch" / "sticky" / "cache")
    path.parent.chmod(0o1777)
    os.chown(tmp_path / which, OTHER, OTHER)
    with pytest.raises(PermissionError, match=f"{tmp_path / which} belongs to user {OTHER}"):
        trusted_folder(path)


@plays_two_users
def test_a_link_of_another_user(tmp_path: Path) -> None:
    """The link leads to a good folder now, and could lead elsewhere later."""
    sticky, own = trusted_folder(tmp_path / "sticky"), trusted_folder(tmp_path / "own")
    sticky.chmod(0o1777)
    (sticky / "cache").symlink_to(own)
    assert trusted_folder(sticky / "cache") == own
    os.lchown(sticky / "cache", OTHER, OTHER)
    with pytest.raises(PermissionError, match=f"sticky/cache belongs to user {OTHER}"):
        trusted_folder(sticky / "cache")


def test_a_folder_of_another_user_is_not_made_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_owners", lambda: {0} if os.geteuid() else {1})
    with pytest.raises(PermissionError, match="belongs to user"):
        trusted_folder(tmp_path / "new")
    assert not (tmp_path / "new").exists()


PRIVATE: dict[str, tuple[str, list[str], dict[str, int], bool]] = {
    "of the user alone": ("me", [], {"me": 4242}, True),
    "that lists the user": ("me", ["me"], {"me": 4242}, True),
    "of another name": ("lab", [], {"me": 4242}, False),
    "with a member": ("me", ["you"], {"me": 4242}, False),
    "that is another user's first": ("me", [], {"me": 4242, "you": 4242}, False),
}


@pytest.mark.parametrize("case", PRIVATE)
def test_a_group_of_one_user_is_no_other(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries are used under umask 002, under which every user has a group of their own."""
    name, members, first_groups, expected = PRIVATE[case]
    users = [
        SimpleNamespace(pw_name=user, pw_uid=os.geteuid() + (user != "me"), pw_gid=group)
        for user, group in first_groups.items()
    ]
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: users[0])
    monkeypatch.setattr(pwd, "getpwall", lambda: users)
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=name, gr_mem=members))
    status = os.stat_result((0o40775, 0, 0, 0, os.geteuid(), 4242, 0, 0, 0, 0))
    assert build.is_trusted(status) is expected
    assert not build.is_trusted(os.stat_result((0o40777, 0, 0, 0, os.geteuid(), 4242, 0, 0, 0, 0)))


def unknown(*number: int) -> None:
    raise KeyError(number)


@pytest.mark.parametrize("function", [(pwd, "getpwuid"), (grp, "getgrgid")], ids=["user", "group"])
def test_a_group_that_is_not_known(function: tuple[object, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*function, unknown)
    assert not build._is_private(4242)
