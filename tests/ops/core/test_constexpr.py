"""Constants read from the text of the kernels: what can be read, and what is refused."""

from __future__ import annotations

import pytest

from gpt2cupy.errors import CompileError
from gpt2cupy.ops.core import cuda_source, variants
from gpt2cupy.ops.core.constexpr import Constants
from gpt2cupy.ops.linear import ACTIVATION_CODES

TEXT = """
#ifndef K
#define K 768
#endif
#define LONGEST 2048  // of a row
constexpr int WARP = 32;
constexpr int WARPS = K > LONGEST ? 2 : K % 5 == 0 ? 5 : 4;  // of a block; "= 9;"
constexpr int THREADS = WARPS * WARP;
constexpr int HALF = (THREADS + 1) / 2;
constexpr int BYTES = 226 << 10;
// constexpr int HIDDEN = 1;
template <int UNITS>
constexpr bool SWIZZLED = (UNITS & (UNITS - 1)) == 0;
template <int UNITS>
constexpr int PITCH = SWIZZLED<UNITS> ? UNITS * 8
                                      : UNITS * 8 + 8;
constexpr int UNITS = 6;
constexpr int ROW = PITCH<UNITS> + PITCH<8>;
constexpr unsigned FLOATS = sizeof(float);
  constexpr int LOCAL = 3;
"""


def test_what_can_be_read():
    found = Constants([TEXT], {"K": 1600})
    names = ("LONGEST", "WARPS", "THREADS", "HALF", "BYTES", "UNITS", "ROW")
    assert [found[name] for name in names] == [2048, 5, 160, 80, 226 << 10, 6, 120]
    assert Constants([TEXT], {"K": 3072})["WARPS"] == 2
    assert Constants([TEXT], {"UNITS": 4})["PITCH"] == 32


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("HIDDEN", "declare no constant HIDDEN"),
        ("LOCAL", "declare no constant LOCAL"),
        ("WARPS", "declare no constant K"),  # a macro has no value that was not given
        ("PITCH", "declare no constant UNITS"),
        ("FLOATS", "declare no constant sizeof"),
    ],
)
def test_what_is_refused(name, says):
    with pytest.raises(CompileError, match=says) as caught:
        Constants([TEXT.replace("int UNITS = 6", "int OTHERS = 6")], {})[name]
    assert caught.value.remedy


def test_a_changed_constant_is_seen(tmp_path, monkeypatch):
    (tmp_path / "tile.cuh").write_text("constexpr int ROWS = 32;\n")
    (tmp_path / "some.cu").write_text('#include "tile.cuh"\nconstexpr int ALL = 2 * ROWS;\n')
    monkeypatch.setattr(cuda_source, "source_dir", lambda: tmp_path)
    assert cuda_source.constants("some.cu")["ALL"] == 64


def test_a_name_with_two_values_is_refused():
    """Else the one that is read may not be the one that is compiled."""
    with pytest.raises(CompileError, match="several constants WARP"):
        Constants([TEXT, "constexpr int WARP = 16;"], {})["WARP"]


def test_activations_have_the_codes_of_the_kernels():
    codes = cuda_source.constants("linear.cu")
    found = {name: codes[(name or "identity").upper()] for name in ACTIVATION_CODES}
    assert found == ACTIVATION_CODES


@pytest.mark.parametrize("channels", [256, 768, 1600, 2048])
def test_the_step_takes_the_sizes_that_its_text_names(channels):
    assert variants.takes_step({"K": str(channels), "HS": "64"})
    for wrong in (channels + 32, 192, 2112):
        assert not variants.takes_step({"K": str(wrong), "HS": "64"})
    assert not variants.takes_step({"K": str(channels), "HS": "80"})
