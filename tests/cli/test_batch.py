"""gpt2cupy batch."""

from __future__ import annotations

import json
import re

from command import CPU, call, cli, done


def requests(folder, count):
    path = folder / "in.jsonl"
    with path.open("w") as file:
        for number in range(count):
            body = {"prompt": f"ROMEO {number}", "max_tokens": 2, "zebra": 1}
            if number == 1:
                body["suffix"] = "x"
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps(line | {"body": body}) + "\n")
    return path


def test_the_command_answers_a_file_and_says_what_came(tmp_path):
    path, out = requests(tmp_path, 4), tmp_path / "out.jsonl"
    first = cli("batch", str(path), str(out), *CPU)
    assert first.returncode == 0 and first.stdout == ""
    assert re.search(r"4 of 4 requests answered in [\d.]+ s, \d+ tokens/s", first.stderr)
    assert "fields without a meaning here: zebra" in first.stderr
    assert "1 answers are errors" in first.stderr or "1 answer is an error" in first.stderr
    answers = out.read_text().splitlines()
    assert {json.loads(each)["custom_id"] for each in answers} == {"r0", "r1", "r2", "r3"}
    # Cut off, it goes on; --quiet says nothing but of errors.
    out.write_text("".join(f"{each}\n" for each in answers[:2]) + answers[2][:50])
    code, stdout, stderr = call("batch", str(path), str(out), "--quiet", "--max-batch", "1", *CPU)
    assert (code, stdout) == (0, "") and "answered" not in stderr
    assert out.read_text().splitlines()[:2] == answers[:2]
    assert len(out.read_text().splitlines()) == 4


def test_what_cannot_be_is_one_line(tmp_path):
    path = requests(tmp_path, 1)
    code, _, err = call("batch", str(tmp_path / "missing"), str(tmp_path / "out"), *CPU)
    assert code == 1 and "cannot be read" in err
    code, _, err = call("batch", str(path), str(tmp_path / "out"), "--max-batch", "0", *CPU)
    assert code == 2 and "--max-batch 0 is impossible" in err
    assert call("batch", str(path), "-", *CPU)[0] == call("batch", "-", "x", *CPU)[0] == 2
    code, _, err = call("batch", str(path), str(path), *CPU)
    assert code == 1 and "one file" in err


def test_help_names_the_format_and_the_options():
    text = done("batch", "--help")
    for word in ("custom_id", "/v1/completions", "--max-batch", "IN.JSONL", "OUT.JSONL"):
        assert word in text
