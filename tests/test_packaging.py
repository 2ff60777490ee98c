"""The package as others get it: one identity per module, clones without links, the wheel."""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import jax
import pytest

import difax

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINKS = ("models", "accel", "configs")
IMPORT = """
import importlib, json, sys
print(json.dumps({name: importlib.import_module(name).__file__ for name in sys.argv[1:]}))
"""


def copy_checkout(target: pathlib.Path) -> set[str]:
    """Copies what a release is made of, without the working folder's leftovers (a stale build/ spoils wheels).

    Returns:
      The files of the four folders under the names that an installed difax gives them.
    """
    leftovers = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
    for folder in ("difax", *LINKS):
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=leftovers)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, target)
    files = [f.relative_to(target) for d in ("difax", *LINKS) for f in (target / d).rglob("*") if f.is_file()]
    named = {(f if f.parts[0] == "difax" else "difax" / f).as_posix() for f in files}
    return named - {f"difax/{link}" for link in LINKS}  # in a clone without links they are files


def import_files(files: set[str], folder: pathlib.Path, path: pathlib.Path, env: dict[str, str]) -> None:
    """Imports every module among `files` in a process started in `folder`; all must come from `path`."""
    sources = sorted(f for f in files if f.endswith(".py") and not f.endswith("__main__.py"))
    names = [source.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for source in sources]
    command = [sys.executable, "-c", IMPORT, *names]
    env = env | {"PYTHONPATH": str(path)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"difax", "difax.models", "difax.accel", "difax.configs"} <= found.keys()
    assert {name: file for name, file in found.items() if not file.startswith(f"{path}{os.sep}")} == {}


def test_tests_run_on_eight_devices():
    assert jax.device_count() == 8 or os.environ["JAX_PLATFORMS"] != "cpu"


@pytest.mark.parametrize("name", LINKS)
def test_a_second_identity_is_refused(name):
    with pytest.raises(ImportError, match=f"import difax.{name}, not {name}"):
        importlib.import_module(name)
    assert name not in sys.modules


def test_a_clone_without_links_imports_every_module(tmp_path, user_env):
    """git with core.symlinks=false checks a link out as a text file that holds the target."""
    clone = tmp_path / "clone"
    files = copy_checkout(clone)
    for name in LINKS:
        (clone / "difax" / name).unlink()
        (clone / "difax" / name).write_text(f"../{name}")
    import_files(files, tmp_path, clone, user_env)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> tuple[pathlib.Path, set[str]]:
    """A wheel, made from an sdist of a clean copy of the checkout, and the files that it should hold."""
    if importlib.util.find_spec("build") is None:
        pytest.skip("needs the `build` package: pip install 'difax[dev]'")
    folder = tmp_path_factory.mktemp("wheel")
    files = copy_checkout(folder / "source")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist"]
    done = subprocess.run([*command, folder / "source"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (folder / "dist").glob("*.whl")
    return made, files


def test_the_wheel_holds_exactly_the_checkout(wheel):
    made, files = wheel
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode()
    assert {name for name in names if ".dist-info/" not in name} == files
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "difax = difax.__main__:run" in entry_points


def test_the_wheel_works_in_another_folder(wheel, tmp_path, user_env):
    made, files = wheel
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site]
    subprocess.run([*install, made], check=True)
    import_files(files, elsewhere, site, user_env)
    installed = {f.relative_to(site).as_posix() for f in site.glob("difax/assets/**/*") if f.is_file()}
    assert installed == {file for file in files if file.startswith("difax/assets/")}


def test_the_installed_version_is_the_one_in_the_source():
    try:
        installed = importlib.metadata.version("difax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("difax is on the path but not installed")
    assert installed == difax.__version__
