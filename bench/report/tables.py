"""The tables of the documents, each made from one record."""

from __future__ import annotations

from collections.abc import Callable

from . import (
    attention_tables,
    batch_tables,
    engine_tables,
    gpu_test_tables,
    layer_tables,
    list_tables,
    op_tables,
    profile_tables,
    quantization_tables,
    server_tables,
    text_tables,
    validate_tables,
)
from .layout import Record, caption, left_out, number, rate, spread, table


def decode(entry: Record) -> str:
    """The steps of 124M, every dtype, batch and backend."""
    results = entry["results"]
    rows = [row for row in results["rows"] if row["model"] == "124M"]
    contexts = [step["context"] for step in rows[0]["steps"]]
    reads = any("read" in step for row in rows for step in row["steps"])
    seen = {(row["gemv"], row["dtype"], row["batch"]) for row in rows}
    header = ["dtype", "batch", "decode", "GEMV"]
    for context in contexts:
        header += [f"step at {context}, µs", *(["roofline, µs"] if reads else [])]
    lines = []
    for row in rows:
        figures = []
        for step in row["steps"]:
            figures.append(step["step"]["median_us"])
            figures += [step["read"]["median_us"]] if reads else []
        whole = row["end_to_end"]["us_per_step"]
        figures += [max(step["host"]["median_us"] for step in row["steps"]), whole]
        figures.append(1e6 * row["batch"] / whole)
        both = "cublas", row["dtype"], row["batch"]
        product = row["gemv"] if both in seen else "-"  # otherwise there is one way
        names = [row["dtype"], row["batch"], row["decode"], product]
        lines.append([*names, *map(number, figures)])
    header += ["host, µs", "in a text, µs", "tokens/s"]
    text = rows[0]["end_to_end"]
    note = (
        f"GPT-2 124M with {results['weights']} weights, medians. A step feeds one token per row "
        f"and samples the next; its time is between events on the device. Host: what Python takes "
        f"to queue a step. In a text: a step of {text['tokens']} tokens after {text['prompt']}, "
        f"each token read by the host"
    )
    if reads:
        note += (
            ". Roofline: a kernel that only reads as many bytes as the step must, weights and "
            "cache, in the same run"
        )
    return table(header, lines) + caption(entry, note)


def decode_sizes(entry: Record) -> str:
    """Every size with our GEMV: how far a step is from reading its bytes once."""
    results = entry["results"]
    rows = [row for row in results["rows"] if row["gemv"] == "ours"]
    contexts = [step["context"] for step in rows[0]["steps"]]
    header = ["size", "dtype", "batch", "decode"]
    for context in contexts:
        header += [f"step at {context}, µs", "roofline, µs", "roofline / step"]
    lines = []
    for row in rows:
        figures = []
        for step in row["steps"]:
            us, read = step["step"]["median_us"], step.get("read", {}).get("median_us")
            share = [number(read), f"{read / us:.0%}"] if read else ["-", "-"]
            figures += [number(us), *share]
        tokens = number(1e6 * row["batch"] / row["end_to_end"]["us_per_step"])
        names = [row[key] for key in ("model", "dtype", "batch", "decode")]
        lines.append([*names, *figures, tokens])
    in_int8 = ", matrices in int8 and the rest in dtype" if results.get("quantize") else ""
    note = (
        f"Random weights{in_int8}, medians. Roofline: a kernel that only reads as many bytes as "
        f"the step must, each weight once and the keys and values of the context, in the same run. "
        f"Tokens/s in a text, read by the host{left_out(results)}"
    )
    return table([*header, "tokens/s"], lines, 2) + caption(entry, note)


def startup(entry: Record) -> str:
    results = entry["results"]
    warm = results["warm"]
    row = [results["model"], results["device"], number(results["first_s"], 2)]
    row.append(spread(warm, 1e6, 2))
    header = ["model", "device", "first run, s", "warm, s (p10 to p90)"]
    note = f"From starting a process to its first token; warm is the median of {warm['runs']}"
    if compiled := results.get("compile"):
        header.append("gpt2cupy compile, s")
        row.append(number(compiled["seconds"], 1))
        note += (
            f"; first with an empty kernel cache, median of {results['empty']['runs']}; "
            f"{compiled['cubins']} cubins compiled on {compiled['cores']} cores"
        )
    return table(header, [row]) + caption(entry, note)


def soak(entry: Record) -> str:
    results = entry["results"]
    first, last = results["rows"][0], results["rows"][-1]
    names = {
        "host_bytes": "memory of the process, kB", "objects": "Python objects",
        "threads": "threads", "files": "open files",
        "pool_used_bytes": "arrays on the GPU, kB", "pool_total_bytes": "CuPy's pool, kB",
        "device_bytes": "memory in use on the GPU, kB",
    }  # fmt: skip
    lines = []
    for name, by in results["growth"].items():
        scale = 1024 if name.endswith("bytes") else 1
        figures = first[name], last[name], by, results["allowed"][name]
        lines.append([names[name], *(number(figure / scale) for figure in figures)])
    header = ["what", f"after {first['requests']:,}", f"after {last['requests']:,}"]
    ways = ", ".join(f"{count:,} {way}" for way, count in results["counts"].items())
    note = (
        f"{last['requests']:,} requests of mixed lengths and settings in one process in "
        f"{results['seconds']:.0f} s ({ways}); model {results['model']}, {results['dtype']}"
    )
    return table([*header, "growth", "allowed"], lines) + caption(entry, note)


def cpu(entry: Record) -> str:
    results = entry["results"]
    rows = [
        [name, f"{row['prefill_ms']:.0f}", f"{row['tokens_per_second']:.1f}"]
        for name, row in results["engines"].items()
    ]
    note = (
        f"{results['model']}, {results['dtype']}, batch {results['batch']}, {results['threads']} "
        f"threads, {results['new_tokens']} tokens after {results['prompt_tokens']}; medians of "
        f"{results['rounds']} rounds in turn. gpt2cupy makes {results['ratio_to_best']:.2f} times "
        f"the tokens/s of {results['best_of_transformers']}"
    )
    if "ratio_of_texts" in results:
        note += f", and with {results['texts']} texts at once {results['ratio_of_texts']:.1f} times"
        note += " those of one text"
    if "ratio_to_llama" in results:
        note += f". It makes {results['ratio_to_llama']:.2f} times those of llama.cpp"
        note += f", built by {results.get('llama_build', 'a line that was not noted')}"
    header = ["engine", "prompt, ms", "tokens/s"]
    return table(header, rows) + caption(entry, note)


def prefill(entry: Record) -> str:
    rows = [
        [row["model"], row["dtype"], row["tokens"]]
        + [spread(row[key], 1e3, 3) for key in ("device", "first_token")]
        for row in entry["results"]["rows"]
    ]
    header = ["size", "dtype", "tokens", "on the device, ms", "first token in Python, ms"]
    note = (
        "One prompt, random weights, medians (p10 to p90). On the device: between events around "
        "some prompts in a row with the sampling of their first tokens, per prompt. In Python: "
        "from the call to the token's id" + left_out(entry["results"])
    )
    return table(header, rows, 2) + caption(entry, note)


def invariance(entry: Record) -> str:
    lines = []
    for row in entry["results"]["rows"]:
        if "tokens" in row:
            what = f"prompt of {row['tokens']} tokens"
        else:
            rows = f"{row['batch']} row{'s' * (row['batch'] > 1)}"
            what = f"step of {rows}, context {row['context']} ({row['decode']})"
        ratio = row["invariant"]["median_us"] / row["default"]["median_us"]
        times = [spread(row[key]) for key in ("default", "invariant")]
        lines.append([row["model"], row["dtype"], what, *times, number(ratio, 2)])
    header = ["size", "dtype", "what", "default, µs", "batch-invariant, µs", "ratio"]
    note = (
        "Random weights, medians (p10 to p90) of times between events on the device, in captured "
        "graphs (in brackets the default's decode path); a prompt's with the sampling of its first "
        "token" + left_out(entry["results"])
    )
    return table(header, lines, 3) + caption(entry, note)


def gemv(entry: Record) -> str:
    lines = []
    for row in entry["results"]["rows"]:
        read, ours, cublas = (row[key]["median_us"] for key in ("read", "ours", "cublas"))
        speeds = [number(row["bytes"] / us / 1e3) for us in (ours, cublas, read)]
        lines.append(
            [row["model"], row["dtype"], row["shape"], f"{row['m']} x {row['k']}"]
            + [number(ours, 2), number(cublas, 2), *speeds]
            + [f"{read / us:.0%}" for us in (ours, cublas)]
        )
    header = [
        *("size", "dtype", "matrix", "M x K", "ours, µs", "cuBLAS, µs"),
        *("ours, GB/s", "cuBLAS, GB/s", "roofline, GB/s", "ours / roofline", "cuBLAS / roofline"),
    ]
    note = (
        "One row times a weight matrix [M, K] that is not in the L2 cache, in a captured graph; "
        "medians. Roofline: a kernel that only reads the same bytes in the same way"
    )
    return table(header, lines, 4) + caption(entry, note)


def naive(entry: Record) -> str:
    """The whole forward pass for each token, against the KV cache."""
    results = entry["results"]
    lines = []
    for row in results["rows"]:
        figures = []
        for engine in ("gpt2cupy", "transformers"):
            found = [row["engines"].get(f"{engine} {way}") for way in ("naive", "cached")]
            rates = [rate(row["batch"], one["step"]) if one else None for one in found]
            figures += [number(r) if r else "-" for r in rates]
            both = rates[0] and rates[1]
            figures.append(f"{rates[1] / rates[0]:.1f}" if both else "-")
        lines.append([row["dtype"], row["batch"], *figures])
    header = ["dtype", "batch"]
    for engine in ("ours", "transformers"):
        header += [f"{engine}, whole forward, tokens/s", f"{engine}, KV cache, tokens/s"]
        header.append("speed-up")
    rounds = results["rounds"]
    ours = [row["engines"].get("gpt2cupy cached") for row in results["rows"]]
    paths = " or ".join(dict.fromkeys(one["decode"] for one in ours if one))
    note = (
        f"{results['model']}, random weights, {results['tokens']} greedy tokens after "
        f"{results['prompt']}; {f'medians of {rounds} runs' if rounds > 1 else 'one run each'}, in "
        f"turn, each engine in its own process. Ours with the cache: decode path {paths}. "
        f"transformers: generate() with use_cache=False and True, attention without "
        f"cuDNN, which prepares itself for every length{left_out(results)}"
    )
    absent = {name: why for row in results["rows"] for name, why in row["skipped"].items()}
    note += "".join(f". {name}: left out, {why}" for name, why in absent.items())
    return table(header, lines) + caption(entry, note)


def ablation(entry: Record) -> str:
    """Steps with each optimisation switched off, and with all of them off."""
    results = entry["results"]
    whole = {(r["dtype"], r["batch"]): r["step"] for r in results["rows"] if not r["off"]}
    lines = []
    for row in results["rows"]:
        off = row["off"].replace(",", ", ") or "nothing"
        if row["only_cache"] and row["off"]:
            off += " (only the KV cache)"
        full = whole[row["dtype"], row["batch"]]["median_us"]
        rates = number(row["tokens_per_second"])
        share = f"{full / row['step']['median_us']:.0%}"
        lines.append([row["dtype"], off, row["batch"], spread(row["step"]), rates, share])
    header = ["dtype", "off", "batch", "step, µs (p10 to p90)", "tokens/s", "of all on"]
    switches = "; ".join(f"{name}: {what}" for name, what in results["switches"].items())
    note = (
        f"{results['model']}, random weights, {results['tokens']} greedy tokens after "
        f"{results['prompt']}. {switches}{left_out(results)}"
    )
    return table(header, lines, 2) + caption(entry, note)


# Switch of bench/ablation.py -> the version of docs/notebook/ladder.md that brought it.
VERSIONS = {"fused-norm": 2, "one-pass-sampling": 4, "graph": 5, "overlap": 6, "gemv": 7}


def ladder(entry: Record) -> str:
    """The versions that can still be switched off: steps in float16 without and with each."""
    results = entry["results"]
    steps = {
        (row["batch"], row["off"].removeprefix("persistent,")): number(row["step"]["median_us"])
        for row in results["rows"]
        if row["dtype"] == "float16"
    }
    batches = sorted({batch for batch, _ in steps})
    lines = []
    for name, version in sorted(VERSIONS.items(), key=lambda each: each[1]):
        for batch in batches:
            # Where the persistent step is taken, what it replaces is compared without it.
            whole = steps.get((batch, "persistent")) or steps.get((batch, ""))
            if (batch, name) in steps:
                lines.append([version, f"`{name}`", batch, steps[batch, name], whole])
    header = ["version", "switch", "rows", "step without it, µs", "step with it, µs"]
    note = (
        f"{results['model']}, float16, random weights, {results['tokens']} greedy tokens after "
        f"{results['prompt']}; medians"
    )
    return table(header, lines, 2) + caption(entry, note)


# Name of a table -> (the record it is made from, how).
TABLES: dict[str, tuple[str, Callable[[Record], str]]] = {
    "decode": ("decode", decode),
    "decode-sizes": ("decode-sizes", decode_sizes),
    "batches": ("batches", batch_tables.batches),
    "contexts": ("batches", batch_tables.contexts),
    "decode-int8": ("decode-int8", decode_sizes),
    "quantization": ("quantization", quantization_tables.accuracy),
    "startup": ("startup", startup),
    "cpu": ("cpu", cpu),
    "soak": ("soak", soak),
    "gpu-tests": ("gpu-tests", gpu_test_tables.gpu_tests),
    "gpu-tests-cuda1": ("gpu-tests-cuda1", gpu_test_tables.gpu_tests),
    "gpu-tests-sm_75": ("gpu-tests-sm_75", gpu_test_tables.gpu_tests),
    "gpu-tests-sm_80": ("gpu-tests-sm_80", gpu_test_tables.gpu_tests),
    "gpu-tests-sm_86": ("gpu-tests-sm_86", gpu_test_tables.gpu_tests),
    "devices": ("devices", text_tables.devices),
    "generate": ("generate", text_tables.generate),
    "prefixes": ("prefixes", engine_tables.prefixes),
    "speculation": ("speculation", engine_tables.speculation),
    "arrivals": ("arrivals", engine_tables.arrivals),
    "attention": ("attention", attention_tables.speeds),
    "attention-errors": ("attention", attention_tables.correctness),
    "attention-rates": ("attention", attention_tables.rates),
    "attention-decode": ("attention", attention_tables.decode),
    "batch": ("batch", list_tables.batch),
    "scoring": ("scoring", list_tables.scoring),
    "server-summary": ("server", server_tables.summary),
    "server-load": ("server", server_tables.load),
    "server-arrivals": ("server", server_tables.arrivals),
    "server-processes": ("server", server_tables.processes),
    "server-one": ("server", server_tables.one),
    "server-norms": ("server", server_tables.norms),
    "server-front": ("server-front", server_tables.front),
    "server-choices": ("server-choices", server_tables.choices),
    "ops-rms-norm": ("ops", op_tables.some_ops(op_tables.of("rms_norm", few=True))),
    "ops-norms": ("ops", op_tables.some_ops(op_tables.of(*op_tables.NORMS, few=True))),
    "ops-many-rows": (
        "ops",
        op_tables.some_ops(op_tables.of("rms_norm", *op_tables.NORMS, few=False)),
    ),
    "call-cost": ("call-cost", op_tables.call_cost),
    "ops-sampling": ("ops", op_tables.some_ops(op_tables.of("softmax", "sample_logits"))),
    "ops-activations": (
        "ops",
        op_tables.some_ops(op_tables.of("gelu", "gelu_erf", "bias_gelu", "silu_mul", "rope")),
    ),
    "layers-ffn": ("layers", layer_tables.ffn),
    "layers-few": ("layers", layer_tables.few),
    "layers-plain": ("layers", layer_tables.plain),
    "layers-llama": ("layers", layer_tables.llama),
    "layers-errors": ("layers", layer_tables.errors),
    "layers-rates": ("layers", layer_tables.rates),
    "prefill": ("prefill", prefill),
    "gemv": ("gemv", gemv),
    "invariance": ("invariance", invariance),
    "naive": ("naive", naive),
    "ablation": ("ablation", ablation),
    "ladder": ("ablation", ladder),
    "validate": ("validate", validate_tables.comparisons),
    "validate-steps": ("validate", validate_tables.steps),
    "profile-operators": ("profile", profile_tables.operators),
    "profile-model": ("profile", profile_tables.components("model")),
    "profile-block": ("profile", profile_tables.components("block")),
    "profile-attention": ("profile", profile_tables.components("attention")),
    "profile-mlp": ("profile", profile_tables.components("mlp")),
    "profile-tokens": ("profile", profile_tables.tokens),
    "profile-kernels": ("profile", profile_tables.kernels),
    "profile-gaps": ("profile", profile_tables.gaps),
    "profile-added": ("profile", profile_tables.added),
    "profile-lost": ("profile", profile_tables.lost),
    "profile-pictures": ("profile", profile_tables.pictures),
}
