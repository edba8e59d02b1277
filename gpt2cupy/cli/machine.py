"""``gpt2cupy info`` and ``gpt2cupy compile``."""

from __future__ import annotations

import json
import re
from typing import Annotated

import typer

from ..errors import shown
from . import options, shell


def info(
    model: options.Model = "shakespeare",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    revision: options.Revision = None,
    variant: options.Variant = None,
    adapter: options.Adapter = None,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Registers, shared memory and occupancy of each kernel."),
    ] = False,
    arch: Annotated[
        str | None,
        typer.Option(help="With --kernels: sm_75, sm_80, ...; needs no GPU. Default: this GPU's."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """What would run here: versions, device, kernels, and the memory of a model."""
    if arch is not None and not kernels:
        raise typer.BadParameter("--arch needs --kernels")
    if kernels:
        from ..inspect import kernel_report

        rows = kernel_report.report(
            model, dtype, device, arch, revision=revision, variant=variant, adapter=adapter
        )
        if as_json:
            for row in rows:
                shell.write(json.dumps(row) + "\n")
        else:
            shell.write("".join(line + "\n" for line in kernel_report.table(rows)))
        return
    from ..inspect import info as about

    facts = about.report(
        model, dtype, device, revision=revision, variant=variant, adapter=adapter,
        quantize=options.name_of(quantize),
    )  # fmt: skip
    if as_json:
        shell.write(json.dumps(facts) + "\n")
    else:
        for label, text in about.lines(facts):
            shell.write(f"{label:<16} {text}\n")


def compile(
    arch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<str>",
            help="sm_75, sm_80, ...; several times for several. Default: this GPU's.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Only what this model may launch: a name, hub id or folder. Default: what "
            "GPT-2's sizes and the embedded model may.",
        ),
    ] = None,
    ops: Annotated[
        bool,
        typer.Option(
            "--ops",
            help="Also what gpt2cupy.ops alone launches. Without --model for heads of 32, 64, 80, "
            "96 and 128 channels.",
        ),
    ] = False,
) -> None:
    """Compile kernels ahead of time into the cache, on all cores; needs no GPU.

    What is not compiled ahead is compiled when it is first launched.
    """
    from concurrent.futures import as_completed

    from tqdm import tqdm

    from ..ops.core import compiler, device
    from ..ops.core import variants as ahead

    for name in arch or ():
        if not _is_architecture(name):
            raise typer.BadParameter(
                f"{shown(name)} is no architecture; it is one of "
                f"{', '.join(compiler.ARCHITECTURES)}"
            )
    if not arch:
        device.cupy_module()
        arch = [device.device_arch(device.current_device())]
    if model is None:
        sizes = ahead.FAST_HEAD_SIZES if ops else ahead.GPT2_HEAD_SIZES
        variants = list(ahead.variants(sizes))
    else:
        from .. import checkpoint
        from ..inspect import kernel_report

        variants = kernel_report.variants_of(checkpoint.open(model).config, model)
    jobs = ahead.in_order(
        (*variant, name)
        for name in arch
        for variant in variants
        if ahead.launched(*variant, name) and (ops or variant[0] not in ahead.OPS_ALONE)
    )
    with compiler.in_processes():
        cubins = [compiler.request(*job) for job in jobs]
        try:
            for cubin in tqdm(as_completed(cubins), total=len(cubins), unit="kernel", disable=None):
                cubin.result()
        finally:
            for cubin in cubins:
                cubin.cancel()  # after an error or Ctrl-C
    shell.write(f"{len(jobs)} cubins for {', '.join(arch)} in {compiler.cache_dir()}\n")


def _is_architecture(name: str) -> bool:
    """Whether there is such a chip, by our lists or by the NVRTC that is there.

    Those between and after the ones that are tested may work too; older ones do not.
    """
    from ..ops.core import compiler

    match = re.fullmatch(r"(sm_(\d{2,3}))[af]?", name, re.ASCII)
    if match is None or int(match[2]) < 75:
        return False
    if match[1] in (*compiler.ARCHITECTURES, *compiler.NEWER_CHIPS):
        return True  # an NVRTC that is too old for it says which one is needed
    return int(match[2]) in compiler.nvrtc().getSupportedArchs()
