"""What was built: its description, its dependencies, and what importing it does."""

import ctypes
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest

import lcodec_ext
from lcodec_ext import _core

ROOT = Path(__file__).resolve().parents[1]
LINUX = sys.platform.startswith("linux")


def python(code, tmp_path, **environment):
    """Run code in a fresh interpreter, away from the source tree; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def binutil(name, *arguments):
    return subprocess.run(
        [name, *arguments, _core.__file__], capture_output=True, text=True, check=True
    ).stdout


# ------------------------------------------------------------------------------------------------
# build_info


@pytest.mark.native
def test_build_info_describes_the_build():
    info = lcodec_ext.build_info()
    assert json.loads(json.dumps(info)) == info
    assert info["compiler"].split()[0] in {"GNU", "Clang", "AppleClang"}
    assert info["build_type"] in {"Release", "Debug", "RelWithDebInfo", "MinSizeRel"}
    assert "-ffp-contract=off" in info["flags"].split()
    assert info["hardware_threads"] >= 0
    for sanitizer in info["sanitizers"]:
        assert sanitizer in {"address", "undefined", "thread"}


def test_build_info_is_a_new_dictionary():
    lcodec_ext.build_info()["simd_compiled"].clear()
    assert lcodec_ext.build_info()["simd_compiled"]


def test_one_version_everywhere():
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["version"]
    assert lcodec_ext.build_info()["version"] == declared
    assert lcodec_ext.__version__ == declared
    assert importlib.metadata.version("lcodec_ext") == declared
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {declared}\n" in citation
    versions = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert versions == [declared, "0.1.0"]


@pytest.mark.native
def test_simd_levels():
    info = lcodec_ext.build_info()
    x86 = platform.machine() in {"x86_64", "AMD64"}
    assert info["simd_compiled"] == (["baseline", "avx2", "avx512"] if x86 else ["baseline"])
    supported = info["simd_supported"]
    assert supported == info["simd_compiled"][: len(supported)]
    assert supported


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads /proc/cpuinfo")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 flags")
@pytest.mark.parametrize(("level", "needs"), [("avx2", {"avx2", "fma"}), ("avx512", {"avx512dq"})])
def test_supported_levels_are_what_the_kernel_says(level, needs):
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    assert (level in lcodec_ext.build_info()["simd_supported"]) == needs.issubset(flags)


def test_cuda_fields_agree():
    info = lcodec_ext.build_info()
    assert info["cuda"] == (info["cuda_version"] is not None) == bool(info["cuda_architectures"])


# ------------------------------------------------------------------------------------------------
# CUDA on this machine, whatever it has


def driver_is_installed():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.native
def test_cuda_status_is_one_sentence_that_agrees():
    status = lcodec_ext.cuda_status()
    usable = lcodec_ext.cuda_is_available()
    assert status.endswith(".")
    assert "\n" not in status
    assert status.startswith("CUDA is usable" if usable else "CUDA is not used because ")
    if usable:
        # No claim of what this version does not do.
        assert "dependence functions run on the CPU" in status
        assert lcodec_ext.build_info()["cuda"]


def test_cuda_status_names_the_reason():
    if not lcodec_ext.build_info()["cuda"]:
        assert "built without it" in lcodec_ext.cuda_status()
    elif not driver_is_installed():
        assert "no NVIDIA driver" in lcodec_ext.cuda_status()
    assert (lcodec_ext.build_info()["cuda"] and driver_is_installed()) or (
        not lcodec_ext.cuda_is_available()
    )


def test_a_hidden_device_is_not_available(tmp_path):
    code = "import lcodec_ext as m; print(m.cuda_is_available(), m.cuda_status())"
    printed = python(code, tmp_path, CUDA_VISIBLE_DEVICES="")
    assert printed.startswith("False CUDA is not used because ")


@pytest.mark.native
def test_first_probe_from_many_threads(tmp_path):
    code = (
        "import lcodec_ext as m\n"
        "from concurrent.futures import ThreadPoolExecutor as P\n"
        "with P(8) as p: print(len(set(p.map(lambda _: m.cuda_status(), range(32)))))"
    )
    assert python(code, tmp_path) == "1"
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: lcodec_ext.cuda_is_available(), range(8))) == {
            lcodec_ext.cuda_is_available()
        }


# ------------------------------------------------------------------------------------------------
# Importing


@pytest.mark.parametrize("package", ["torch", "sklearn", "pandas", "scipy", "matplotlib", "tqdm"])
def test_import_brings_in_numpy_alone(package, tmp_path):
    code = f"import sys, lcodec_ext; print({package!r} in sys.modules)"
    assert python(code, tmp_path) == "False"


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_import_does_not_touch_the_gpu(tmp_path):
    code = "import lcodec_ext; print('libcuda' in open('/proc/self/maps').read())"
    assert python(code, tmp_path) == "False"


@pytest.mark.skipif(not LINUX, reason="ELF")
def test_module_needs_no_cuda_torch_or_openmp_library():
    needed = [line for line in binutil("readelf", "-d").splitlines() if "(NEEDED)" in line]
    assert needed
    for line in needed:
        for name in ("cuda", "torch", "c10", "gomp", "iomp", "python"):
            assert f"[lib{name}" not in line


@pytest.mark.skipif(not LINUX, reason="ELF")
def test_module_exports_its_init_function_alone():
    symbols = [line.split()[-1] for line in binutil("nm", "-D", "--defined-only").splitlines()]
    assert symbols == ["PyInit__core"]


def test_installed_package_is_the_one_under_test():
    assert Path(lcodec_ext.__file__).parent == Path(_core.__file__).parent
    assert Path(lcodec_ext.__file__).parent != ROOT / "lcodec_ext"


# ------------------------------------------------------------------------------------------------
# CMake's options


@pytest.fixture
def configure(tmp_path):
    """Return a function that configures the project where no nvcc can be found."""
    cmake = shutil.which("cmake", path=sysconfig.get_path("scripts"))

    def run(*definitions):
        return subprocess.run(
            [
                *(cmake, "-S", ROOT, "-B", tmp_path, f"-DPython_EXECUTABLE={sys.executable}"),
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                *(f"-D{definition}" for definition in definitions),
            ],
            env=os.environ | {"CUDACXX": str(tmp_path / "no-nvcc")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    return run


def test_cuda_auto_does_without_nvcc_and_says_so(configure):
    done = configure()
    assert done.returncode == 0, done.stdout
    assert "CUDA part left out (LCODEC_CUDA=AUTO and no nvcc was found)" in done.stdout


def test_cuda_off_looks_for_nothing(configure):
    done = configure("LCODEC_CUDA=OFF")
    assert done.returncode == 0, done.stdout
    assert "CUDA part left out (LCODEC_CUDA=OFF)" in done.stdout
    assert "CUDA compiler" not in done.stdout


def test_cuda_on_without_nvcc_is_an_error(configure):
    done = configure("LCODEC_CUDA=ON")
    assert done.returncode != 0
    assert "no CUDA compiler was found" in done.stdout


def test_unknown_cuda_option_is_an_error(configure):
    done = configure("LCODEC_CUDA=maybe")
    assert done.returncode != 0
    assert "it must be AUTO, ON or OFF" in done.stdout
