"""The kernels that the sources have, read from their text."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def kernel_entries() -> set[tuple[str, str]]:
    """(file, entry) of every extern "C" kernel, with the macros that make entries expanded."""
    found = set()
    for path in (ROOT / "cuda_src").glob("*.cu"):
        text = re.sub(r"\\\n", " ", path.read_text(encoding="utf-8"))
        macros = {}
        plain = []
        for line in text.splitlines():
            if define := re.match(r"#define (\w+)\(([^)]*)\)(.*)", line):
                macros[define[1]] = ([p.strip() for p in define[2].split(",")], define[3])
            else:
                plain.append(line)
        code = "\n".join(plain)
        for name, (parameters, body) in macros.items():
            for use in re.finditer(rf"^{name}\((.*)\)$", code, re.MULTILINE):
                expanded = body
                given = [argument.strip() for argument in use[1].split(",")]
                for parameter, argument in zip(parameters, given, strict=True):
                    expanded = re.sub(rf"(?:##)?\b{parameter}\b", argument, expanded)
                code += "\n" + expanded
        attributes = r"(?:(?:__cluster_dims__|__launch_bounds__)\([^)]*\)\s*)*"
        pattern = r'extern "C" __global__ void\s+' + attributes + r"(\w+)\("
        found |= {(path.name, entry) for entry in re.findall(pattern, code)}
        assert code.count('extern "C"') == len(re.findall(pattern, code)), path.name
    return found
