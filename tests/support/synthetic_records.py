"""Records of benchmarks that only a GPU can make, written by hand, and what their tables say."""

from __future__ import annotations

TIMING = {"median_us": 800.4, "p10_us": 790.0, "p90_us": 850.0, "runs": 50}


def timing(median, width=0.0):
    return {"median_us": median, "p10_us": median - width, "p90_us": median + width, "runs": 5}


def profile_results():
    """Two dtypes of ours and one peer, on a GPU, with a component of each table."""
    part = {"avg_ms": 0.01, "total_ms": 6.0, "count": 600, "percent": 44.0}
    tables = {name: [part | {"component": name}] for name in ("model", "block", "attention", "mlp")}
    token = {f"{key}_ms": 4.5 for key in ("mean", "p50", "p95", "p99")}
    token |= {"tokens_per_s": 222.2, "blocks_percent": 93.4}
    settings = {"prompt": "What", "prompt_tokens": 1, "batch": 1, "warmup": 2, "runs": 3}
    kernel = {"component": "qkv product", "kernel": "gemv", "calls": 9, "avg_us": 2.5}
    kernel |= {"total_ms": 0.02, "gb_per_s": 1416.0, "percent_of_limit": 33.3, "step_us": 2.0}
    gaps = {"launches": 88, "kernels_us": 400.0, "gaps_us": 200.0, "unprofiled_us": 606.0}
    gaps |= {"overlap_us": 3.5, "recording_us": 2.5}
    older = gaps | {"gaps_us": -7.5, "host_us": 390.0, "residual_percent": -1.0}
    del older["overlap_us"], older["recording_us"]
    own = {
        "settings": settings | {"tokens": 30},
        "tables": {key: [row | {"covers": "a, b"} for row in rows] for key, rows in tables.items()},
        "per_token": token,
        "kernels": [
            {"component": "projection", "kernel": "library", "calls": 1}
            | {"avg_us": 1.0, "total_ms": 0.1, "step_us": 5.0},
            kernel,
            kernel | {"component": "sampling", "kernel": "not asked for", "step_us": 1.0},
        ],
        "kernel_timer": "cupti",
        "gaps": gaps | {"host_us": 390.0, "residual_percent": -1.0},
        "overhead": {"ops_percent": 12.5, "kernels_percent": 3.0},
    }
    operator = dict.fromkeys(
        ("self_cpu_percent", "self_cpu_ms", "cpu_total_percent", "cpu_total_ms", "cpu_avg_us"), 1.5
    )
    operator |= dict.fromkeys(("self_cuda_ms", "self_cuda_percent", "cuda_total_ms"), 2.5)
    operator |= {"name": "aten::addmm", "cuda_avg_us": None, "calls": 2400}
    rows = [operator, *(operator | {"name": f"aten::op{n}"} for n in range(29))]
    operators = {"new_tokens": 50, "rows": rows, "wall_ms": 700.0}
    operators |= {"self_cpu_total_ms": 653.0, "self_cuda_total_ms": 109.0}
    operators |= {"matrix_percent": 74.8, "idle_percent": 84.4}
    peer = {"settings": {"dtype": "float32"}, "tables": tables, "per_token": token}
    return {
        "model": "gpt2",
        "weights": "random",
        "ours": [own | {"dtype": "float32"}, own | {"dtype": "float16"}],
        "paths": [
            own | {"dtype": "float16", "decoder": "graph"},
            # As records were before overlap was told apart.
            own | {"dtype": "float32", "decoder": "graph", "kernels": [], "gaps": older},
        ],
        "peers": [peer | {"operators": operators}],
    }


def validate_results():
    step = {"step": 4, "row": 0, "max_abs": 0.5, "rmse": 0.125, "agrees": True}
    step |= {"top": [[88, 11.7954], [68, 7.8]], "reference_top": [[88, 11.5], [13, 7.75]]}
    found = {"dtype": "bfloat16", "max_abs": 2.0, "rmse": 0.25, "passed": True}
    found |= {"limit": {"max": 4.0, "rms": 0.5}, "largest_kl": 1e-3}
    found |= {"compared": 256, "agreeing": 255}
    comparisons = [
        found | {"ours": "graph", "against": "full", "steps": [step]},
        found | {"ours": "full", "against": "float64", "steps": [], "passed": False},
    ]
    return {"model": "shakespeare", "steps": 128, "batch": 2, "comparisons": comparisons}


def layer_row(layer, tokens, ours_us, inside=True):
    def side(us, error):
        ways = ("python", "graph", "gpu_warm", "gpu_cold")
        timed = {way: {"p50_us": us} if us else None for way in ways}
        return timed | {"max_error": error, "mean_error": error / 10, "inside": inside}

    row = {"layer": layer, "size": "Llama-2 7B", "tokens": tokens, "dtype": "float32"}
    row |= {"flops": 10**12, "not_stored_bytes": 21_500_000, "kernels": ["linear_split"] * 2}
    row |= {"ours": side(ours_us, 1e-5), "eager": side(4000.0, 2e-5), "read": {"p50_us": 1500.0}}
    return row | {"compiled": side(3000.0, 2e-5)}


SYNTHETIC = {
    "layers": {
        "rows": [
            layer_row("ffn", 2048, 2000.0),
            layer_row("ffn", 8, 2000.0),
            layer_row("ffn", 512, None, inside=False),
            layer_row("plain", 512, 2000.0),
            layer_row("llama", 512, 2000.0),
        ]
    },
    "validate": validate_results(),
    "gpu-tests": {"passed": 9, "failed": [], "skipped": {"a": "why"}},
    "gpu-tests-sm_75": {"passed": 7, "failed": ["b"], "skipped": {}, "chip": "sm_75", "sms": 40},
    "gemv": {
        "rows": [
            {"model": "124M", "dtype": "float16", "shape": "qkv", "m": 2304, "k": 768}
            | {"bytes": 3_538_944, "copies": 29}
            | {"read": timing(1.0), "ours": timing(2.0), "cublas": timing(4.0)}
        ]
    },
    "invariance": {
        "skipped": {},
        "rows": [
            {"model": "124M", "dtype": "float16", "batch": 4, "context": 256, "decode": "graph"}
            | {"default": timing(100.0), "invariant": timing(150.0)},
            {"model": "124M", "dtype": "float16", "tokens": 512}
            | {"default": timing(400.0), "invariant": timing(600.0)},
        ],
    },
    "ablation": {
        "model": "124M",
        "prompt": 32,
        "tokens": 512,
        "switches": {"graph": "one captured graph", "gemv": "our product"},
        "skipped": {"1558M float32": "needs 99 GiB"},
        "rows": [
            {"dtype": "float16", "batch": 1, "off": off, "only_cache": off == "graph,gemv"}
            | {"step": timing(us), "tokens_per_second": 1e6 / us}
            for off, us in (("", 100.0), ("graph", 400.0), ("gemv", 125.0), ("graph,gemv", 500.0))
        ],
    },
    "profile": profile_results(),
    "peers": {
        "prompt": 32,
        "tokens": 200,
        "rounds": 5,
        "skipped": {},
        "rows": [
            {"model": "124M", "dtype": "float16", "batch": 1, "skipped": {}}
            | {
                "engines": {
                    "gpt2cupy": {"step": timing(100.0), "prefill": timing(900.0)}
                    | {"load_s": 0.4, "first_run_s": 0.06},
                    # Compiles while it loads: its load_s has compile_s in it.
                    "PyTorch step": {"step": timing(300.0), "prefill": timing(4000.0)}
                    | {"load_s": 60.5, "first_run_s": 0.25, "compile_s": 58.25},
                }
            }
        ],
    },
}


SAYS = {
    "layers-ffn": [
        "| Llama-2 7B | float32 | 2048 | 4.000 | 3.000 | 2.000 | 2.00 | 1.50 | 21.5 | 500 | "
        "1.0e-05 | 1.0e-06 | 2.0e-05 | `linear_split` |",
        "| Llama-2 7B | float32 | 512 | 4.000 | 3.000 | - | - | - | 21.5 | - |",
    ],
    "layers-few": ["| 8 | 4000.0 | 3000.0 | 2000.0 | 1.50 | 1.50 | 1500.0 | 0.75 |"],
    "layers-errors": ["| 1.0e-05 | 1.0e-06 | 2.0e-05 | 2.0e-06 | no |"],
    "layers-rates": ["| Llama-2 7B | float32 | 2048 | 500 | 250 | 333 |"],
    "validate": [
        "| bfloat16 | cached, graph | whole forward | 2.00e+00 | 2.50e-01 | 4.00e+00 | 5.00e-01 | "
        "1.0e-03 | 255 of 256 | yes |",
        "| bfloat16 | whole forward | float64 | 2.00e+00 |",
        "| no |",
    ],
    "validate-steps": [
        "| bfloat16 | cached, graph | 4 | 5.00e-01 | 1.25e-01 | 88:11.795 68:7.800 | "
        "88:11.500 13:7.750 |"
    ],
    "gpu-tests": ["| NVIDIA H200 | 9 | 0 | 1 |"],
    "gpu-tests-sm_75": ["| NVIDIA H200, as sm_75 with 40 SMs | 7 | 1 | 0 |"],
    "gemv": [
        "| 124M | float16 | qkv | 2304 x 768 | 2.00 | 4.00 | 1,769 | 885 | 3,539 | 50% | 25% |"
    ],
    "invariance": [
        "| 124M | float16 | step of 4 rows, context 256 (graph) | 100 (100 to 100) | "
        "150 (150 to 150) | 1.50 |",
        "| 124M | float16 | prompt of 512 tokens | 400 (400 to 400) | 600 (600 to 600) | 1.50 |",
    ],
    "ablation": [
        "| float16 | nothing | 1 | 100 (100 to 100) | 10,000 | 100% |",
        "| float16 | graph | 1 | 400 (400 to 400) | 2,500 | 25% |",
        "| float16 | graph, gemv (only the KV cache) | 1 | 500 (500 to 500) | 2,000 | 20% |",
        "graph: one captured graph; gemv: our product. Left out: 1558M float32: needs 99 GiB.",
    ],
    "ladder": [
        "| 5 | `graph` | 1 | 400 | 100 |",
        "| 7 | `gemv` | 1 | 125 | 100 |",
    ],
    "profile-operators": [
        "| `aten::addmm` | 1.50 |",
        "the first 20 of 30 operators and kernels, those of one name added up. Self CPU 653.0 ms "
        "in all, self CUDA 109.0 ms; matrix products are "
        "74.8 % of the GPU's time, which idles 84.4 % of 700 ms",
    ],
    "profile-model": [
        "| transformers, float32 | model | 0.0100 | 6.0 | 600 | 44.0 |",
        "| gpt2cupy, float16 | model (a, b) | 0.0100 |",
        "2 warm-up runs, 3 runs of 30 tokens",
    ],
    "profile-tokens": ["| transformers, float32 | 4.500 | 4.500 | 4.500 | 4.500 | 93.4 | 222.2 |"],
    "profile-kernels": [
        "| float16 | qkv product | `gemv` | 9 | 2.50 | 0.02 | 1,416 | 33.3 |",
        "| float16 | projection | `library` | 1 | 1.00 | 0.10 | - | - |",
    ],
    "profile-lost": [
        # 0.02 ms in 90 steps at a third of the limit; a library's kernel is lost whole.
        "| float16 | gaps between kernels | 197.5 | - | 197.5 |",
        "| float16 | `library`: projection | 1.1 | - | 1.1 |",
        "| float16 | `gemv`: qkv product | 0.2 | 33.3 | 0.1 |",
    ],
    "profile-pictures": ["![Roofline and components, float16](profiling-float16.png)"],
    "profile-gaps": [
        "| gpt2cupy, float16, graph | 88 | 400.0 | 3.5 | 200.0 | 2.5 | 606.0 | 390.0 | -1.0 | "
        "+12.5 | +3.0 |",
        "| gpt2cupy, float32, graph | 88 | 400.0 | - | -7.5 | - | 606.0 |",
    ],
    "profile-added": [
        # Of 8 us the longest first; 0.02 ms in 90 steps.
        "| float16 | graph | projection | `library` | 5.0 | 62.5% | 1.1 |",
        "| float16 | graph | qkv product | `gemv` | 2.0 | 25.0% | 0.2 |",
        "| float16 | graph | all |  | 8.0 | 100.0% |  |",
    ],
}


LISTS = {
    "batch": {
        "model": "124M", "dtype": "float16", "weights": "random",
        "rows": [
            {"name": "plain", "requests": 4096, "max_batch": 256, "prompt_tokens": 4096 * 128,
             "tokens": 4096 * 128, "wall": TIMING | {"median_us": 3.2e6},
             "host": TIMING | {"median_us": 0.8e6}, "tokens_per_second": 163_840.0},
        ],
    },
    "scoring": {
        "model": "124M", "dtype": "float16", "weights": "random", "context": 100,
        "continuation": 10,
        "rows": [
            {"pairs": 12000, "tokens": 1_320_000, "scored": 120_000, "wall": TIMING,
             "alone": TIMING, "encoding": TIMING | {"median_us": 480_000.0}, "alone_pairs": 200,
             "apart": 0.0, "pairs_per_second": 9000.0, "tokens_per_second": 990_000.0,
             "alone_per_second": 700.0},
        ],
    },
}  # fmt: skip
