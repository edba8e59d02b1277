"""llama.cpp by its own benchmarks, on a GGUF file made of the checkpoint by the package gguf.

A run is one call of llama-bench for one sequence, of llama-batched-bench for several: the
prompt and the tokens, loading apart. They do not say which ids they chose.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from interface import Job, Run, serve
from safetensors.numpy import load_file

# Tensors of a layer in Hugging Face's layout, and llama.cpp's names of them.
LAYER = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
WHOLE = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
CONTROL, NORMAL = 3, 1  # kinds of tokens


def convert(folder: Path) -> Path:
    """The GGUF file of a checkpoint in float16 or float32, beside it; made once."""
    path = folder / "model.gguf"
    if path.exists():
        return path
    config = json.loads((folder / "config.json").read_text())
    vocabulary = json.loads((folder / "vocab.json").read_text())
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    tensors = load_file(folder / "model.safetensors")
    writer.add_file_type(int(any(a.dtype == np.float16 for a in tensors.values())))  # 0: float32
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([NORMAL] * (len(tokens) - 1) + [CONTROL])
    writer.add_token_merges((folder / "merges.txt").read_text().splitlines())
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    for key, array in tensors.items():
        writer.add_tensor(*converted(key, array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(key: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """A tensor as llama.cpp has it: matrices as rows [out, in], vectors in float32."""
    words = key.removeprefix("transformer.").split(".")
    kind, end = ".".join(words[2:-1] if words[0] == "h" else words[:-1]), words[-1]
    name = f"blk.{words[1]}.{LAYER[kind]}" if words[0] == "h" else WHOLE[kind]
    if array.ndim == 1 or kind == "wpe":
        array = array.astype(np.float32)
    elif words[0] == "h":
        array = np.ascontiguousarray(array.T)
    return f"{name}.{end}", array


def prepare(job: Job) -> tuple[Run, dict[str, Any]]:
    batch, prompt = len(job["prompts"]), len(job["prompts"][0])
    program = "llama-bench" if batch == 1 else "llama-batched-bench"
    if shutil.which(program) is None:
        raise FileNotFoundError(f"{program} is not on PATH")
    if job["dtype"] not in ("float16", "float32"):
        raise ValueError("the GGUF file is made in float16 or float32")
    layers = "0" if job["device"] == "cpu" else "99"
    model = [program, "-m", str(convert(Path(job["folder"]))), "-ngl", layers]
    model += ["-t", str(job["threads"])] if job.get("threads") else []

    def single(tokens: int) -> tuple[float, float]:
        command = [*model, "-p", str(prompt), "-n", str(tokens - 1), "-r", "1", "-fa", "1"]
        found = json.loads(output([*command, "-o", "json"]))
        prefill = sum(test["avg_ns"] for test in found if test["n_gen"] == 0)
        steps = sum(test["avg_ns"] for test in found if test["n_gen"] > 0)
        return prefill / 1e9, steps / 1e9

    def batched(tokens: int) -> tuple[float, float]:
        # Twice: the program may end before its log has written the last line.
        sizes = ["-npp", str(prompt), "-ntg", str(tokens - 1), "-npl", f"{batch},{batch}"]
        room = ["-c", str(batch * (prompt + tokens)), "-fa", "on", "--output-format", "jsonl"]
        lines = [line for line in output(model + sizes + room).splitlines() if line[:1] == "{"]
        if not lines:
            raise ValueError(f"{program} wrote no result")
        found = json.loads(lines[0])
        return found["t_pp"], found["t_tg"]

    def run(tokens: int) -> tuple[list[int], float, float, float]:
        first, rest = (single if batch == 1 else batched)(tokens)
        return [], 0.0, first, first + rest

    return run, {"program": program}


def output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    serve(("gguf",), prepare)
