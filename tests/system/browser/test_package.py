"""What `pip install` of the project gives a stranger: the wheel's files, and `es2 app` in an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

import pytest

from es2 import __version__
from es2.core.files import files_below
from tests.system.browser.serving import PATIENCE, ROOT, expect, marks, playwright, served

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKBENCH = "es2/workbench"


def test_every_package_is_named_for_the_wheel() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    folders = [path.parent for name in ("es2", "app") for path in (ROOT / name).rglob("__init__.py")]
    dotted = [".".join(folder.relative_to(ROOT).parts) for folder in folders]
    renamed = {f"es2.workbench.{name}": name.replace(".", "/") for name in dotted if name.split(".")[0] == "app"}
    renamed["es2.workbench.cached_activations"] = "cached_activations"
    assert setuptools["package-dir"] == renamed
    assert sorted(setuptools["packages"]) == sorted(
        {name for name in dotted if name.split(".")[0] == "es2"} | {*renamed}
    )


def expected_files() -> set[str]:
    """What belongs into the wheel: all of `es2/`, and the app and the showcase below `es2/workbench`."""
    parts = {"es2": "es2", "app": f"{WORKBENCH}/app", "cached_activations/showcase": f"{WORKBENCH}/cached_activations"}
    parts["cached_activations/showcase"] += "/showcase"
    return {
        f"{target}/{file.relative_to(ROOT / source).as_posix()}"
        for source, target in parts.items()
        for folder, _, names in os.walk(ROOT / source, followlinks=True)
        for file in (Path(folder, name) for name in names)
        if "__pycache__" not in file.parts
    }


def build_wheel(work: Path) -> Path:
    """The wheel, built from a copy of the checkout, which a build would write into."""
    source = work / "source"
    for name in ("app", "es2", "cached_activations/showcase"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", work, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(work.glob("*.whl"))


BARE = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}


def install(wheel: Path, folder: Path) -> Path:
    """A virtual environment with the wheel and with all that this Python has but the checkout; returns its `es2`."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(pip, check=True, timeout=300)
    ask = "import json, sys, sysconfig; print(json.dumps([sysconfig.get_path('purelib'), sys.path]))"
    own = json.loads(subprocess.run([python, "-c", ask], capture_output=True, check=True).stdout)[0]
    # A path file adds folders but reads no path files in them, so the checkout's own editable install stays out.
    Path(own, "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    where = [python, "-c", "import es2; print(es2.__path__[0])"]
    found = subprocess.run(where, cwd=folder, env=BARE, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found) == Path(own, "es2")
    return folder / "bin" / "es2"


@pytest.mark.long
@pytest.mark.browser
@marks[1]
def test_an_installed_wheel_opens_the_showcase_in_an_empty_folder(
    tmp_path: Path, open_page: Callable[[str], playwright.Page]
) -> None:
    wheel = build_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == expected_files()
        metadata = message_from_bytes(archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))))
    assert (metadata["Version"], metadata["Author"]) == (__version__, "ES2 Workbench developers")

    es2 = install(wheel, tmp_path / "environment")
    empty = tmp_path / "empty"
    empty.mkdir()
    package = next((tmp_path / "environment").glob("lib/*/site-packages/es2"))
    before = {path: path.stat().st_mtime_ns for path in files_below(package) if path.suffix != ".pyc"}
    bare = {"ES2_HOME": "", "ES2_SHOWCASE": "", "PYTHONPATH": "", "HOME": str(empty)}
    log = tmp_path / "server.log"
    with served(empty, log=log, command=(str(es2), "app"), cwd=empty, **bare) as address:
        page = open_page(address)
        tuned = page.locator(".st-key-linked_pair .plots-plot").nth(1)
        expect(tuned.locator(".scatterlayer .point").first).to_be_attached(timeout=3 * PATIENCE)
        expect(page.get_by_text("Showcase").first).to_be_visible()
    after = {path: path.stat().st_mtime_ns for path in files_below(package) if path.suffix != ".pyc"}
    assert after == before

    remake = subprocess.run([es2, "showcase"], cwd=empty, env=BARE | bare, capture_output=True, text=True, timeout=120)
    assert remake.returncode == 2
    assert "is part of the installed package" in remake.stderr
