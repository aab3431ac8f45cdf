"""Where committed state lies on a host: whose folders are removed, and whose are refused."""

import os

import pytest

from actors.sync import shm_folders
from trinity.config import PlacementConfig
from trinity.errors import ConfigError


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_RAYLET_PID", str(os.getpid()))
    return lambda pool="prod": PlacementConfig(pool=pool, memory_dir=str(tmp_path / "memory"))


def test_folders_of_a_node_that_lives_stay_and_those_of_one_that_has_gone_do_not(settings):
    mine = shm_folders.folder(settings(), "trinity", "shard-0").parent
    pid = str(os.getpid())
    gone = mine.with_name(mine.name.replace(f"-{pid}-", "-4194305-"))  # above the kernel's largest
    elsewhere = mine.with_name(
        mine.name.replace(f"-{pid}-", "-4194305-").replace(f"-{shm_folders._namespace()}-", "-1-")
    )
    strangers = [mine.with_name(f"{shm_folders.PREFIX}-{os.getuid()}-{end}") for end in ("", "x-y-z", "1")]
    for path in (gone, elsewhere, *strangers):
        path.mkdir()
    assert shm_folders.folder(settings("other"), "trinity", "shard-0").parent.parent == mine.parent
    assert not gone.exists()
    assert all(path.is_dir() for path in (mine, elsewhere, *strangers))


def test_ending_a_pool_leaves_a_pool_whose_name_ends_like_it(settings):
    ended, other = (
        shm_folders.folder(settings("prod"), "trinity", "a").parent,
        shm_folders.folder(settings("test-prod"), "trinity", "a").parent,
    )
    shm_folders._remove._function("prod", "trinity", settings().memory_dir)
    assert (ended.exists(), other.exists()) == (False, True)


def test_the_folder_is_for_its_owner_and_no_link_to_elsewhere(settings, tmp_path):
    mine = shm_folders.folder(settings(), "trinity", "a").parent
    assert mine.stat().st_mode & 0o077 == 0
    mine.rmdir()
    (tmp_path / "theirs").mkdir()
    mine.symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="memory_dir"):
        shm_folders.folder(settings(), "trinity", "a")


@pytest.mark.parametrize("of", [shm_folders.cache_folder, shm_folders.state_folder])
def test_what_engines_have_cached_and_the_placement_knows_goes_with_their_pool_and_with_their_node(settings, of):
    mine = of(settings(), "trinity")
    gone = mine.with_name(mine.name.replace(f"-{os.getpid()}-", "-4194305-"))
    gone.mkdir()
    (gone / "kv-1").touch()
    assert mine != shm_folders.folder(settings(), "trinity", "a").parent
    assert not gone.exists()
    (mine / "kv-1").touch()
    shm_folders._remove._function("prod", "trinity", settings().memory_dir)
    assert not mine.exists()
