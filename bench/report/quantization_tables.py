"""The table of docs/quantization.md."""

from __future__ import annotations

from .layout import Record, caption, table


def accuracy(entry: Record) -> str:
    """What int8 does to the score of a text and to logits."""
    lines, notes = [], []
    for model in entry["results"]["models"]:
        first = model["rows"][0]
        for row in model["rows"]:
            held, bits = row["weight_bytes"], row.get("bits_per_byte")
            more = None if bits is None else bits / first["bits_per_byte"] - 1
            lines.append(
                [
                    model["model"],
                    row["matrices"],
                    row["dtype"],
                    "-" if held is None else f"{held / 2**20:.1f}",
                    "-" if bits is None else f"{bits:.4f}",
                    "-" if more is None else f"{more:+.3%}",
                    f"{row['logit_rms_error']:.1e}",
                    f"{row['logit_max_error']:.1e}",
                    f"{row['logit_rms_error_of_rms']:.2%}",
                ]
            )
        if "text" in model:
            notes.append(
                f"{model['model']}: bits per byte of the first {model['text_bytes']:,} bytes of "
                f"{model['text']}, logits of its first {model['logit_tokens']} tokens"
            )
        else:
            notes.append(f"{model['model']}: logits of {model['logit_tokens']} random tokens")
    header = [
        *("model", "matrices", "the rest", "weights, MiB", "bits per byte", "change"),
        *("logit error, RMS", "largest", "RMS of RMS"),
    ]
    note = (
        "Errors against the same weights unquantised in float32. MiB: what a GPU holds. "
        + ". ".join(notes)
    )
    return table(header, lines, 3) + caption(entry, note)
