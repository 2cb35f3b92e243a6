"""Nothing is ever half-written."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from billhook.models import building, check_out, locate
from billhook.models.atomic import refusals
from billhook.plan.errors import InputError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_folder_appears_only_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with building(out) as fresh:
        (fresh / "a").write_text("1")
        assert not out.exists() and fresh.parent.parent == out.parent
    assert names(out) == {"a"} and names(out.parent) == {"out"}


def test_it_is_as_readable_as_any_new_folder(tmp_path: Path) -> None:
    with building(tmp_path / "out"):
        pass
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), building(tmp_path / "out") as fresh:
        (fresh / "a").write_text("1")
        raise KeyboardInterrupt
    assert names(tmp_path) == set()


def test_an_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"already exists.*--overwrite"), building(tmp_path / "out"):
        pytest.fail("the work was begun")


def test_overwrite_replaces_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "billhook.json").write_text("{}")
    (out / "stale").write_text("old")
    with building(out, overwrite=True) as fresh:
        assert names(out) == {"billhook.json", "stale"}
        (fresh / "new").write_text("1")
    assert names(out) == {"new"} and names(tmp_path) == {"out"}


def test_a_failed_overwrite_keeps_the_old(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "billhook.json").write_text("old")
    with pytest.raises(ZeroDivisionError), building(out, overwrite=True) as fresh:
        (fresh / "billhook.json").write_text("new")
        raise ZeroDivisionError
    assert (out / "billhook.json").read_text() == "old" and names(tmp_path) == {"out"}


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(InputError, match="something other than a model"), building(tmp_path, overwrite=True):
        pass
    assert names(tmp_path) == {"thesis.tex"}


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="already exists"), building(out):
        out.mkdir()
        (out / "billhook.json").write_text("another run's")
    assert names(tmp_path) == {"out"} and names(out) == {"billhook.json"}


def test_impossible_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a folder"):
        check_out(tmp_path / "file", overwrite=True)
    with pytest.raises(InputError, match="cannot be made"):
        check_out(tmp_path / "file" / "out")


def test_nothing_is_put_into_the_model_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for out in (tmp_path / "model" / "out", tmp_path / "model" / "deep" / ".." / "er" / "out"):
        with pytest.raises(InputError, match="lies inside the model that is read"):
            check_out(out, source=tmp_path / "model")
    (tmp_path / "model.gguf").touch()
    for source in ("model", "model.gguf", "no/such"):
        check_out(tmp_path / "out", source=tmp_path / source)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_parent_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="not writable"):
        check_out(tmp_path / "out")


def test_a_killed_process_leaves_no_target(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "from billhook.models.atomic import building\n"
        "with building(sys.argv[1]) as fresh:\n"
        "    (fresh / 'billhook.json').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists() and names(tmp_path) != set()
    with building(out) as fresh:
        (fresh / "billhook.json").write_text("whole")
    assert (out / "billhook.json").read_text() == "whole"
    assert names(tmp_path) == {"out"}, "what the killed process had built is still there"


def test_what_another_run_is_building_is_left_alone(tmp_path: Path) -> None:
    code = "import sys\nfrom billhook.models.atomic import building\nwith building(sys.argv[1]):\n    pass"
    with building(tmp_path / "out") as fresh:
        (fresh / "a").write_text("1")
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True)
        assert names(fresh) == {"a"}
        (tmp_path / "out").rmdir()
    assert names(tmp_path / "out") == {"a"}


def test_what_the_system_refuses_to_a_library_in_rust_is_an_os_error(tmp_path: Path) -> None:
    words = "No space left on device"
    for full in (Exception(f"Error while serializing: I/O error: {words} (os error 28)"), OSError(errno.ENOSPC, words)):
        with pytest.raises(OSError, match=words) as caught, building(tmp_path / "out"):
            raise full
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "out")
    assert names(tmp_path) == set()
    with pytest.raises(ValueError, match="a bug"), building(tmp_path / "out"):
        raise ValueError("a bug")


def test_the_words_that_are_looked_for_are_those_of_the_installed_library(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as caught, refusals(tmp_path / "a"):
            save_file({"a": np.zeros(1000)}, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG


KILLED_BETWEEN = """
import os, pathlib, signal, sys
from billhook.models.atomic import building
rename = pathlib.Path.rename

def dying(self, target):
    if self.parent.name.endswith(".building"):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

pathlib.Path.rename = dying
with building(sys.argv[1], overwrite=True) as fresh:
    (fresh / "billhook.json").write_text("new")
"""


@pytest.fixture
def orphan(tmp_path: Path) -> Path:
    """The place of a folder that was moved aside by a run that was killed before it put another in its place."""
    out = tmp_path / "out[1]"
    out.mkdir()
    (out / "billhook.json").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED_BETWEEN, str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists() and any(name.endswith(".old") for name in names(tmp_path))
    return out


def test_what_a_killed_run_moved_aside_is_put_back_by_the_next_one(orphan: Path) -> None:
    with pytest.raises(InputError, match=r"already exists.*--overwrite"):
        check_out(orphan)
    assert (orphan / "billhook.json").read_text() == "old"
    assert not any(name.endswith(".old") for name in names(orphan.parent))
    with building(orphan, overwrite=True) as fresh:
        (fresh / "billhook.json").write_text("new")
    assert (orphan / "billhook.json").read_text() == "new"


def test_what_a_killed_run_moved_aside_is_put_back_for_reading(orphan: Path) -> None:
    assert locate(orphan) == orphan
    assert (orphan / "billhook.json").read_text() == "old"


def test_a_run_that_is_at_it_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "billhook.json").write_text("old")
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        if self.parent.name.endswith(".building"):
            assert not out.exists()
            code = (
                "import sys, pathlib\nfrom billhook.models.atomic import put_back\nput_back(pathlib.Path(sys.argv[1]))"
            )
            subprocess.run([sys.executable, "-c", code, str(out)], check=True)
            assert not out.exists()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    with building(out, overwrite=True) as fresh:
        (fresh / "billhook.json").write_text("new")
    assert (out / "billhook.json").read_text() == "new" and names(tmp_path) == {"out"}


def test_a_config_of_something_else_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text("{}")
    (tmp_path / "project" / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(InputError, match="something other than a model"),
        building(tmp_path / "project", overwrite=True),
    ):
        pass
    assert (tmp_path / "project" / "thesis.txt").read_text() == "years of work"
