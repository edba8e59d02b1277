"""Counters in files that several processes map."""

from __future__ import annotations

import re

import numpy as np

from gpt2cupy.server import metrics
from gpt2cupy.server.metrics import Store, exposition, total, value_of


def test_processes_are_summed_and_go_on_where_they_were(tmp_path):
    for name, amount in (("front-0", 2), ("front-1", 3), ("front-0", 4)):
        Store(tmp_path, name).add("gpt2cupy:requests_accepted", amount)
    assert value_of(total(tmp_path), "gpt2cupy:requests_accepted") == 9
    Store(tmp_path, "engine").set("vllm:num_requests_running", 5)
    Store(tmp_path, "engine").set("vllm:num_requests_running", 6)
    assert value_of(total(tmp_path), "vllm:num_requests_running") == 6


def test_labels_have_numbers_of_their_own(tmp_path):
    store = Store(tmp_path, "engine")
    store.add("vllm:request_success", value="stop")
    store.add("vllm:request_success", 2, value="error")
    found = {r: value_of(store.numbers, "vllm:request_success", r) for r in metrics.REASONS}
    assert found == {"stop": 1, "length": 0, "abort": 0, "error": 2}


def test_a_histogram_counts_as_prometheus_does(tmp_path):
    store, name = Store(tmp_path, "engine"), "vllm:inter_token_latency_seconds"
    values = np.array([0.0005, 0.001, 0.003, 0.7, 500.0])
    store.observe(name, values[:2])
    store.observe(name, values[2:])
    store.observe(name, values[:0])
    text = exposition(total(tmp_path), 'a "model"')
    lines = [line for line in text.splitlines() if line.startswith(name)]
    buckets = {}
    for line in lines:
        if found := re.search(r'_bucket{.*le="([^"]+)"} (\S+)$', line):
            buckets[found[1]] = float(found[2])
    for bound, count in buckets.items():
        assert count == (values <= float(bound)).sum(), bound
    assert buckets["+Inf"] == 5
    assert f'{name}_count{{model_name="a \\"model\\""}} 5.0' in lines
    assert float(lines[-1].split()[-1]) == values.sum()


def test_every_series_is_exposed_once_with_its_type(tmp_path):
    text = exposition(total(tmp_path), "m")
    families = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M)
    assert len(families) == len(set(families)) == len(metrics.ALL)
    for name, kind in families:
        assert (kind == "counter") == (name.endswith("_total") and kind != "histogram")
        assert re.search(rf"^{re.escape(name)}(_bucket)?{{", text, re.M)
