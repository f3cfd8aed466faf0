import os
import subprocess
import sys
from pathlib import Path

from services.adapters.owned_folder import LOCK, UNFINISHED_LIFE_S, OwnedFolder, sweep_dead

OWNER = """
import sys
from pathlib import Path
from services.adapters.owned_folder import OwnedFolder
folder = OwnedFolder(Path(sys.argv[1]))
folder.new_path().write_text("half")
print(folder.path, flush=True)
sys.stdin.read()
"""


def test_a_folder_is_there_until_it_is_closed(tmp_path: Path) -> None:
    owned = OwnedFolder(tmp_path / "parent")
    owned.new_path().write_text("x")
    assert owned.path.parent == tmp_path / "parent"
    assert owned.new_path() != owned.new_path()
    owned.close()
    owned.close()
    assert list((tmp_path / "parent").iterdir()) == []


def test_the_folder_of_the_living_is_left_and_that_of_the_dead_goes(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        assert sweep_dead(tmp_path) == 0
        assert len(list(folder.iterdir())) == 2
        owner.kill()
        owner.wait()
        assert sweep_dead(tmp_path) == 1
    assert not folder.exists()


def test_a_child_does_not_inherit_the_lock(tmp_path: Path) -> None:
    owned = OwnedFolder(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        os.close(owned._lock)
        owned._lock = -1
        assert sweep_dead(tmp_path) == 1
        child.kill()


def test_folders_that_never_got_their_lock_go_after_a_while(tmp_path: Path) -> None:
    fresh, old, lost = (tmp_path / name for name in (".new-fresh", ".new-old", "lost"))
    for folder in (fresh, old, lost):
        folder.mkdir()
    os.utime(old, (0, old.stat().st_mtime - UNFINISHED_LIFE_S - 1))
    assert sweep_dead(tmp_path) == 2
    assert [folder.name for folder in tmp_path.iterdir()] == [fresh.name]
    assert not (fresh / LOCK).exists()


def test_a_parent_that_is_not_there_needs_no_sweeping(tmp_path: Path) -> None:
    assert sweep_dead(tmp_path / "none") == 0
