"""Clients that others wrote, unchanged: openai, lm-eval, guidellm, schemathesis (extra e2e)."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2cupy.record import ROOT

MODEL = ROOT / "gpt2cupy" / "models" / "shakespeare"
ITEMS = [
    ("ROMEO:\nBut, soft! what light through", [" yonder window breaks", " the world is dead"]),
    ("JULIET:\nO Romeo, Romeo! wherefore art", [" thou Romeo?", " king of the castle?"]),
    ("KING RICHARD III:\nA horse! a horse! my", [" kingdom for a horse!", " lord, my father"]),
    ("First Citizen:\nBefore we proceed any", [" further, hear me speak.", " thing"]),
]


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name} is not installed (extra e2e)"
    )


def python(script: str, *args: str, **environment: str) -> str:
    """What a script prints, in a process that has no part in the test's."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *args],
        capture_output=True, text=True, timeout=170, check=False,
        env=os.environ | quiet | {"PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs("openai")
def test_openai(served):
    script = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
assert [m.id for m in client.models.list()] == ["shakespeare"]
whole = client.completions.create(
    model="shakespeare", prompt="ROMEO:", max_tokens=12, temperature=0, logprobs=2, echo=True)
assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"
assert len(whole.choices[0].logprobs.tokens) == 14
stream = client.completions.create(
    model="shakespeare", prompt="ROMEO:", max_tokens=12, temperature=0, stream=True,
    stream_options={"include_usage": True}, extra_body={"top_k": 5, "ignore_eos": True})
events = list(stream)
assert events[-1].usage.completion_tokens == 12
text = "".join(e.choices[0].text for e in events if e.choices)
assert whole.choices[0].text == "ROMEO:" + text
several = client.completions.create(
    model="shakespeare", prompt=["ROMEO:", "JULIET:"], n=2, max_tokens=3, seed=1, stop=["zzz"])
assert len(several.choices) == 4
for bad, error in (({"model": "other"}, openai.NotFoundError),
                   ({"temperature": -1}, openai.BadRequestError)):
    try:
        client.completions.create(**{"model": "shakespeare", "prompt": "a", **bad})
    except error as found:
        assert found.body["message"]
    else:
        raise AssertionError(bad)
try:
    client.chat.completions.create(
        model="shakespeare", messages=[{"role": "user", "content": "hi"}])
except openai.BadRequestError as found:
    assert "--chat-template" in found.message
else:
    raise AssertionError("a chat without a template")
print("all")
"""
    assert python(script, f"http://127.0.0.1:{served.port}/v1").strip() == "all"


LM_EVAL = """
import json, sys, lm_eval
from lm_eval.tasks import TaskManager
folder, url, tasks = sys.argv[1:4]
models = {
    "hf": f"pretrained={folder},dtype=float32,device=cpu",
    "local-completions": f"model=shakespeare,base_url={url},tokenizer={folder},num_concurrent=2,"
    "max_retries=1,tokenized_requests=True,max_length=512",
}
answers = {}
for model, args in models.items():
    found = lm_eval.simple_evaluate(
        model=model, model_args=args, tasks=["ours_choice", "ours_text"], batch_size=1,
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        log_samples=True, bootstrap_iters=0)
    samples = {
        task: [sample["filtered_resps"] for sample in rows]
        for task, rows in found["samples"].items()
    }
    answers[model] = [samples, found["results"]]
print("RESULT", json.dumps(answers, default=str))
"""


@needs("lm_eval")
def test_lm_eval_finds_what_it_finds_with_transformers(served, tmp_path):
    pytest.importorskip("torch")
    rows = [{"context": c, "choices": o, "gold": 0} for c, o in ITEMS]
    data = tmp_path / "items.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
    common += "test_split: test\n"
    (tmp_path / "choice.yaml").write_text(
        f"task: ours_choice\n{common}output_type: multiple_choice\n"
        'doc_to_text: "{{context}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
        'target_delimiter: ""\nmetric_list:\n  - metric: acc\n'
    )
    (tmp_path / "text.yaml").write_text(
        f"task: ours_text\n{common}output_type: generate_until\n"
        'doc_to_text: "{{context}}"\ndoc_to_target: "{{choices[0]}}"\n'
        'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 12\n  do_sample: false\n'
        "metric_list:\n  - metric: exact_match\n"
    )
    url = f"http://127.0.0.1:{served.port}/v1/completions"
    out = python(LM_EVAL, str(MODEL), url, str(tmp_path))
    found = json.loads(out.partition("RESULT ")[2].splitlines()[0])
    (ours, our_results), (theirs, their_results) = found["local-completions"], found["hf"]
    assert ours["ours_text"] == theirs["ours_text"]
    assert len(ours["ours_choice"]) == len(ITEMS)
    for mine, other in zip(ours["ours_choice"], theirs["ours_choice"], strict=True):
        for (value, greedy), (expected, same) in zip(mine, other, strict=True):
            assert math.isclose(float(value), float(expected), abs_tol=2e-3)
            assert str(greedy) == str(same)
    name = "acc,none"
    assert our_results["ours_choice"][name] == their_results["ours_choice"][name]


@needs("guidellm")
def test_guidellm(served, tmp_path):
    report = tmp_path / "report.json"
    command = Path(sys.executable).with_name("guidellm")
    done = subprocess.run(
        [
            str(command), "run", "--disable-console",
            "--backend", f"kind=openai_http,target=http://127.0.0.1:{served.port},"
            "model=shakespeare,request_format=/v1/completions",
            "--profile", "kind=concurrent,streams=[2]",
            "--constraint", "kind=max_requests,count=6",
            "--tokenizer", f"kind=huggingface_auto,model={MODEL}",
            "--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8",
            "--output", f"kind=json,path={report}",
        ],
        capture_output=True, text=True, timeout=170, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == 6 and not totals["errored"]


@needs("schemathesis")
def test_schemathesis(served):
    """Bodies made from the description of the interface: no 5xx, and answers as it says."""
    script = """
import sys, hypothesis, schemathesis
from gpt2cupy.server.description import description
from schemathesis import checks
from schemathesis.specs.openapi import checks as conformance
described = description("shakespeare", 512)
for path in ("/v1/completions", "/v1/chat/completions"):  # what takes long is no news
    body = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for name, most in (("max_tokens", 4), ("min_tokens", 4), ("n", 2)):
        body["properties"][name]["maximum"] = most
schema = schemathesis.openapi.from_dict(described)
schema.config.update(base_url=sys.argv[1])

@schema.parametrize()
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True,
                     suppress_health_check=list(hypothesis.HealthCheck))
def test(case):
    case.call_and_validate(checks=[
        checks.not_a_server_error,
        conformance.status_code_conformance,
        conformance.content_type_conformance,
        conformance.response_schema_conformance,
    ])
"""
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"test_described_{os.getpid()}.py"
    path.write_text(script.replace("sys.argv[1]", repr(f"http://127.0.0.1:{served.port}")))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir",
             str(path.parent), "-W", "ignore", str(path)],
            capture_output=True, text=True, timeout=170, check=False, cwd=path.parent,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    finally:
        path.unlink()
    assert done.returncode == 0, done.stdout[-4000:]
