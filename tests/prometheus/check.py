#!/usr/bin/env python3
"""Asks a Prometheus for all that the dashboard, the rules and docs/metrics.md ask it for.

    check.py http://127.0.0.1:9090

Every series must exist and move, every expression must have a result, and the alerts of the broken model must be raised. Needs Python alone;
tests/prometheus/run.sh starts what it looks at.
"""

import json
import math
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120  # seconds, from the start of the load
WARM = 40  # seconds of load before the series must have moved

# Series that stay as they are in a run that goes well.
CONSTANT = {
    "hardmax_build_info": "facts",
    "hardmax_model_info": "facts",
    "hardmax_routing_info": "facts: the routing in force is not changed here",
    "hardmax_kv_cache_info": "facts",
    "hardmax_tuning_info": "facts",
    "hardmax_tuning_skipped_steps_total": "gradients are finite",
    "hardmax_metrics_series": "the number of series is that of the start",
    "hardmax_engine_panics_total": "counts bugs",
    "hardmax_router_non_finite_tokens_total": "counts broken weights",
    "job_model:hardmax_request_errors:ratio5m": "no call fails through the server's fault",
}
# What exists under that name only with `--metrics-aliases vllm`, or as the name of a file.
NOT_SERIES = {"hardmax_test"}
# Must fire, with these labels.
FIRING = [
    {"alertname": "FidelityGapHigh", "model": "broken"},
    {"alertname": "FidelityGapLayerHigh", "model": "broken", "layer": "2"},
    {"alertname": "FidelityGapLayerHigh", "model": "broken", "layer": "3"},
    {"alertname": "ExpertDead", "model": "broken", "layer": "1"},
]
# Must not.
QUIET = [
    {"alertname": "FidelityGapHigh", "model": "demo"},
    {"alertname": "FidelityGapLayerHigh", "model": "demo"},
    {"alertname": "FidelityGapLayerHigh", "model": "broken", "layer": "0"},
    {"alertname": "ExpertDead", "model": "demo"},
    {"alertname": "ExpertDead", "model": "broken", "layer": "0"},
    {"alertname": "ErrorRate"},
    {"alertname": "EnginePanic"},
    {"alertname": "TargetDown"},
    {"alertname": "TuningFailed"},
    {"alertname": "TuningStalled"},
    {"alertname": "AutomaticRollback"},
]
# A comparison at the end of an expression.
FILTER = re.compile(r"(?:[<>]=?|==|!=) *[\d.]+$")
NAME = re.compile(r"\b(?:[a-z_]+:)?hardmax_[a-z0-9_]+(?::[a-z0-9_]+)?")


def ask(url, path, **parameters):
    address = f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(address, timeout=10) as response:
            return json.load(response)["data"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{parameters}: {error.read().decode()}") from None


def query(url, expression):
    """Samples that are numbers: 0/0 is there, and says nothing."""
    samples = ask(url, "query", query=expression)["result"]
    return [sample for sample in samples if not math.isnan(float(sample["value"][1]))]


def dashboard_expressions():
    dashboard = json.loads((ROOT / "docker/grafana/dashboards/hardmax.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield f"panel '{panel['title']}'", target["expr"]


def rule_expressions():
    """Without a YAML parser: `expr:` with its text, or `>` and the deeper lines that follow."""
    lines = (ROOT / "docker/prometheus/rules/hardmax.yml").read_text().splitlines()
    name, at = None, 0
    while at < len(lines):
        line = lines[at].strip().removeprefix("- ")
        at += 1
        if line.startswith(("record: ", "alert: ")):
            name = line
        if not line.startswith("expr: "):
            continue
        expression = line.removeprefix("expr: ")
        if expression == ">":
            depth = len(lines[at]) - len(lines[at].lstrip())
            block = []
            while at < len(lines) and (not lines[at].strip() or len(lines[at]) - len(lines[at].lstrip()) >= depth):
                block.append(lines[at].strip())
                at += 1
            expression = " ".join(block)
        yield name, expression


def documented_expressions():
    page = (ROOT / "docs/metrics.md").read_text()
    for block in re.findall(r"```promql\n(.*?)```", page, re.DOTALL):
        yield "docs/metrics.md", block


def concrete(expression):
    """With values for Grafana's variables, and windows that fit a run of a minute."""
    for variable, value in (("$model", "broken"), ("$layer", "1"), ("$__rate_interval", "20s")):
        expression = expression.replace(variable, value)
    return re.sub(r"\[(5m|30m)\]", "[20s]", expression)


def problems_of_series(url, names):
    for name in sorted(names - NOT_SERIES):
        if not query(url, f'count({{__name__="{name}"}})') and not query(url, f'count({{__name__="{name}_bucket"}})'):
            yield f"{name} does not exist"
        elif name not in CONSTANT:
            # A difference: one number for each, where `!=` would take NaN for another one than NaN.
            series = f'{{__name__=~"{name}(_count)?"}}[10m]'
            if not query(url, f"max_over_time({series}) - min_over_time({series}) > 0"):
                yield f"{name} does not move"


def has_result(url, where, expression):
    """Without the filter at its end, which may leave nothing. An alert may be quiet; it is asked all the same."""
    return bool(query(url, concrete(FILTER.sub("", expression.strip())))) or where.startswith("alert: ")


def fires(url, labels):
    matchers = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return bool(query(url, f'ALERTS{{alertstate="firing",{matchers}}}'))


def problems(url, unanswered, names):
    yield from problems_of_series(url, names)
    yield from (f"{where} has no result: {expression}" for where, expression in unanswered)
    yield from (f"{labels} does not fire" for labels in FIRING if not fires(url, labels))


def main(url):
    rules, panels, documented = list(rule_expressions()), list(dashboard_expressions()), list(documented_expressions())
    expressions = rules + panels + documented
    names = {name for _, expression in expressions for name in NAME.findall(expression)}
    assert len(rules) > 20 and len(panels) > 40 and len(documented) > 8 and len(names) > 40, "the expressions were not found"
    start = time.monotonic()
    unanswered = expressions
    while True:
        # From the start: on a quick machine the one job is over long before the load has shown the rest, and its rates with it.
        unanswered = [(where, expression) for where, expression in unanswered if not has_result(url, where, expression)]
        if time.monotonic() > start + WARM:
            found = list(problems(url, unanswered, names))
            if not found or time.monotonic() > start + PATIENCE:
                break
        time.sleep(5)
    found += [f"{labels} fires" for labels in QUIET if fires(url, labels)]
    for problem in found:
        print(problem)
    if not found:
        raised = sorted({sample["metric"]["alertname"] for sample in query(url, 'ALERTS{alertstate="firing"}')})
        print(f"{len(names)} series exist and {len(names - set(CONSTANT))} move; {len(expressions)} expressions; raised: {', '.join(raised)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
