"""report.md: what came of a run, made from its folder alone."""

import math
from typing import Any

from smet_compile.pretrain.config import RunConfig, read_config
from smet_compile.pretrain.folder import RunFolder
from smet_compile.pretrain.memory import KINDS
from smet_compile.pretrain.metrics import Record, of_kind, read_metrics
from smet_compile.pretrain.plots import draw_plots

CAPTIONS = {
    "loss.png": "Loss; dotted lines are topology updates",
    "churn.png": "Blocks moved by each topology update, by layer",
    "bytes.png": "Bytes by kind beside dense AdamW",
}
COLUMNS = (
    "The last three columns are means over the layers: the share of the blocks grown by the previous update "
    "that are still active; the age of active blocks in steps; the share of all blocks that were ever active."
)
ONLY_SPARSE = ("index", "ages")
MAX_TABLE_ROWS = 24
MAX_EXPONENT = 700


def write_report(folder: RunFolder) -> None:
    """Write `report.md` and its plots from `config.json` and `metrics.jsonl`."""
    config, records = read_config(folder.config), read_metrics(folder.metrics)
    images = draw_plots(records, folder.path)
    parts = [
        f"# {config.method}, {config.preset}, {_sparsity(config)}",
        _result(config, records),
        *(f"![{CAPTIONS[name]}]({name})" for name in images if name == "loss.png"),
        "## Bytes",
        *_bytes(records),
        *(f"![{CAPTIONS[name]}]({name})" for name in images if name == "bytes.png"),
        "## Topology",
        *_topology(records),
        *(f"![{CAPTIONS[name]}]({name})" for name in images if name == "churn.png"),
        "## Settings",
        _table(["option", "value"], [[name, str(value)] for name, value in vars(config).items()]),
    ]
    folder.report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def summarize(folder: RunFolder) -> str:
    """One line: how well the finished run in `folder` predicts held-out text, and what its weights take."""
    records = read_metrics(folder.metrics)
    loss = of_kind(records, "eval")[-1]["loss"]
    return f"validation perplexity {_perplexity(loss):.4f}" + "".join(map(_bytes_sentence, of_kind(records, "bytes")))


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, MAX_EXPONENT))


def _bytes_sentence(record: Record) -> str:
    run, dense = (sum(record["all"][who].values()) / record["all"]["num_weights"] for who in ("run", "dense"))
    return f", {run:.2f} bytes per weight for weights, gradients and optimizer (dense AdamW: {dense:.2f})"


def _sparsity(config: RunConfig) -> str:
    return "dense" if config.method == "dense" else f"density {config.density:g}, block {config.block}"


def _result(config: RunConfig, records: list[Record]) -> str:
    train, last = of_kind(records, "train"), of_kind(records, "eval")[-1]
    seconds = sum(record["seconds"] for record in train)
    tokens = len(train) * config.step_tokens
    rows = [
        ["validation perplexity (per token)", f"{_perplexity(last['loss']):.4f}"],
        ["validation loss", f"{last['loss']:.4f} nats per token"],
        ["training loss, first and last step", f"{train[0]['loss']:.4f}, {train[-1]['loss']:.4f}"],
        ["steps and tokens", f"{len(train):,} steps, {tokens:,} tokens"],
        ["time in steps", f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens per second on {config.device}"],
    ]
    if config.tokenizer == "bytes":
        rows.insert(1, ["validation bits per byte", f"{last['loss'] / math.log(2):.4f}"])
    return _table(["result", "value"], rows)


def _bytes(records: list[Record]) -> list[str]:
    found = of_kind(records, "bytes")
    if not found:
        return ["Not measured."]
    scopes = [("sparse", "sparse layers"), ("all", "whole model")]
    tables = [_bytes_table(found[0][key], title) for key, title in scopes if found[0][key]["num_weights"]]
    note = (
        "Read from the tensors of model and optimizer after the first step. Per weight means per weight of "
        "the dense model. The index is the topology and what is derived from it; ages include step counts. "
        "Activations are not in it."
    )
    return [note, *tables]


def _bytes_table(counts: dict[str, Any], title: str) -> str:
    total, run, dense = counts["num_weights"], counts["run"], counts["dense"]
    rows = [_bytes_row(kind, run[kind], dense[kind], total) for kind in KINDS]
    rows.append(_bytes_row("sum", sum(run.values()), sum(dense.values()), total))
    head = [f"{title} ({total:,} weights)", "bytes", "per weight", "dense AdamW", "per weight", "ratio"]
    return _table(head, rows)


def _bytes_row(kind: str, run: int, dense: int, total: int) -> list[str]:
    ratio = "-" if kind in ONLY_SPARSE else f"{run / dense:.3f}"
    return [kind, f"{run:,}", f"{run / total:.3f}", f"{dense:,}", f"{dense / total:.3f}", ratio]


def _topology(records: list[Record]) -> list[str]:
    events = [record["event"] for record in of_kind(records, "topology")]
    if not events:
        return ["The topology did not change in this run."]
    every = -(-len(events) // MAX_TABLE_ROWS)
    shown = [events[i] for i in range(len(events)) if i % every == 0 or i == len(events) - 1]
    said = f"{len(events)} updates" + (f", every {every}th shown." if every > 1 else ".")
    head = ["step", "drop fraction", "blocks moved", "churn", "grown still alive", "mean age", "ever active"]
    return [f"{said} {COLUMNS}", _table(head, [_event_row(event) for event in shown])]


def _event_row(event: dict[str, Any]) -> list[str]:
    return [
        str(event["step"]),
        f"{event['drop_fraction']:.4f}",
        f"{event['num_dropped']:,}",
        f"{event['churn_fraction']:.4f}",
        _mean(event, "grown_survival_fraction", ".3f"),
        _mean(event, "mean_age", ".1f"),
        _mean(event, "explored_fraction", ".3f"),
    ]


def _mean(event: dict[str, Any], key: str, form: str) -> str:
    values = [site[key] for site in event["sites"].values() if site[key] is not None]
    return format(sum(values) / len(values), form) if values else "-"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
