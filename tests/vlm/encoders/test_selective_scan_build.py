"""What happens to the compiled scan without a compiler, with a broken one, and with two at once?"""

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vlm.encoders.scan_backends import build_kernel, mamba_ssm_backend
from vlm.encoders.selective_scan import selective_scan_channels_last
from vlm.errors import UserError

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, build_kernel.COMPILERS)), reason="no C compiler is on PATH"
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and nothing loaded yet; returns the folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build_kernel.load_kernel.cache_clear()
    yield tmp_path / "vlm-suite"
    build_kernel.load_kernel.cache_clear()


def run(backend):
    ones = torch.ones(1, 3, 2)
    return selective_scan_channels_last(
        ones,
        ones,
        -torch.ones(2, 1),
        torch.ones(1, 3, 1, 1),
        torch.ones(1, 3, 1, 1),
        backend=backend,
    )


def fake_compiler(folder, script):
    folder.mkdir()
    file = folder / "cc"
    file.write_text("#!/bin/sh\n" + script)
    file.chmod(0o755)
    return str(folder)


def test_without_a_compiler(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"'compiled' cannot be used: no C compiler \(cc, gcc"):
        run("compiled")
    torch.testing.assert_close(run("auto"), run("reference"))


def test_a_compiler_that_fails_is_quoted(fresh, monkeypatch, tmp_path):
    path = fake_compiler(tmp_path / "bin", "echo 'no room in here' >&2; exit 1")
    monkeypatch.setenv("PATH", path)
    with pytest.raises(UserError, match="no room in here"):
        run("compiled")
    torch.testing.assert_close(run("auto"), run("reference"))
    assert list(fresh.iterdir()) == []


def test_a_library_that_cannot_be_loaded(fresh, monkeypatch, tmp_path):
    script = 'for last; do :; done; echo nonsense > "$last"'
    monkeypatch.setenv("PATH", fake_compiler(tmp_path / "bin", script))
    with pytest.raises(UserError, match="cannot be used"):
        run("compiled")
    torch.testing.assert_close(run("auto"), run("reference"))


def test_a_compiler_whose_words_are_not_utf8(fresh, monkeypatch, tmp_path):
    script = "printf 'no \\377 room' >&2; exit 1"
    monkeypatch.setenv("PATH", fake_compiler(tmp_path / "bin", script))
    with pytest.raises(UserError, match=r"no . room"):
        run("compiled")
    torch.testing.assert_close(run("auto"), run("reference"))


@needs_compiler
def test_a_library_without_the_functions(fresh, monkeypatch, tmp_path):
    source = tmp_path / "kernel.c"
    source.write_text("int other;\n")
    monkeypatch.setattr(build_kernel, "SOURCE", source)
    with pytest.raises(UserError, match="lacks the functions scan_lanes, scan_run; delete it"):
        run("compiled")
    torch.testing.assert_close(run("auto"), run("reference"))


def test_a_user_without_a_home(fresh, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build_kernel.Path, "home", nowhere)
    with pytest.raises(UserError, match="Could not determine home"):
        run("compiled")
    torch.testing.assert_close(run("auto"), run("reference"))


def test_a_cache_folder_that_cannot_be_written(fresh, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises(UserError, match="cannot be used"):
        run("compiled")


@needs_compiler
def test_it_is_built_once(fresh, monkeypatch):
    torch.testing.assert_close(run("compiled"), run("reference"))
    (library,) = fresh.iterdir()
    build_kernel.load_kernel.cache_clear()
    monkeypatch.setattr(build_kernel, "_build", None)  # calling it again would fail
    run("compiled")
    assert list(fresh.iterdir()) == [library]


@needs_compiler
def test_another_source_is_another_library(fresh, monkeypatch, tmp_path):
    run("compiled")
    source = tmp_path / "kernel.c"
    source.write_text(build_kernel.SOURCE.read_text() + "\n")
    monkeypatch.setattr(build_kernel, "SOURCE", source)
    build_kernel.load_kernel.cache_clear()
    run("compiled")
    assert len(list(fresh.iterdir())) == 2


@needs_compiler
def test_builds_at_the_same_time_do_not_meet(tmp_path):
    compiler = next(filter(None, map(shutil.which, build_kernel.COMPILERS)))
    library = tmp_path / "kernel.so"
    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(lambda _: build_kernel._build(compiler, library), range(3)))
    assert said == ["", "", ""]
    assert list(tmp_path.iterdir()) == [library]
    assert ctypes.CDLL(str(library)).scan_lanes() in (4, 8, 16)


def test_every_flag_of_the_compiler_is_tried(fresh, monkeypatch, tmp_path):
    """clang on Arm knows -mcpu=native only."""
    script = f'case "$*" in *-march=native*) exit 1;; esac; : > "{tmp_path}/second"; exit 1'
    monkeypatch.setenv("PATH", fake_compiler(tmp_path / "bin", script))
    with pytest.raises(UserError):
        run("compiled")
    assert (tmp_path / "second").exists()


def test_a_mamba_ssm_built_for_another_torch_is_no_backend(monkeypatch, tmp_path):
    package = tmp_path / "mamba_ssm"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(str(tmp_path))
    mamba_ssm_backend._broken.cache_clear()
    assert "importing it fails: undefined symbol" in mamba_ssm_backend._broken()
    mamba_ssm_backend._broken.cache_clear()
