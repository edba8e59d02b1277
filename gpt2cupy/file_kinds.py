"""What a file is, by its first bytes."""

from __future__ import annotations

HEAD = 512  # bytes that tell formats apart
LLMC, LLMC_TOKENIZER, SAFETENSORS, TORCH = "llm.c", "llm.c tokenizer", "safetensors", "torch"
LFS = "lfs"
POINTER = (
    "this is a pointer of git-lfs, not the file itself",
    "The clone has no large files yet: run git lfs pull in its folder.",
)
LLMC_MAGIC, LLMC_TOKENIZER_MAGIC = 20240326, 20240328


def kind_of(head: bytes) -> str:
    """A format's name, "text" for what reads as text, or "" for anything else."""
    number = int.from_bytes(head[:4], "little")
    if not head:
        return "empty"
    if number in (LLMC_MAGIC, LLMC_TOKENIZER_MAGIC):
        return LLMC if number == LLMC_MAGIC else LLMC_TOKENIZER
    if head[:4] == b"PK\3\4" or head[:2] == b"\x80\x02":
        return TORCH
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return SAFETENSORS
    if head.startswith(b"version https://git-lfs"):
        return LFS
    if head[:4] == b"GGUF":
        return "gguf"
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        return "hdf5"
    start = head.lstrip()[:15].lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "html"
    if not _is_text(head):
        return ""
    return "json" if start[:1] in (b"{", b"[") else "text"


def _is_text(head: bytes) -> bool:
    # The last character may be cut.
    text = head.decode("utf-8", "replace")[:-1]
    return not any(c == "\ufffd" or (c < " " and c not in "\t\n\r\f") for c in text)
