"""Makes report.md of a run, with its plots, from its folder alone."""

import math
from typing import Any

from smet_compile.pretrain.config import RunConfig
from smet_compile.pretrain.folder import RunFolder, read_config, write_atomically
from smet_compile.pretrain.memory import BYTE_KINDS
from smet_compile.pretrain.metrics import Record, count_steps, of_kind, ranges_text, read_metrics, steps_without_record
from smet_compile.pretrain.model_config import NO_MODEL
from smet_compile.pretrain.plots import CAPTIONS, draw_plots

COLUMNS = (
    "The last five columns are means over the layers: the share, in what was dropped, of newcomers that no earlier "
    "update could have dropped; the share of the blocks grown two updates before that are still active; the age of "
    "active blocks in steps, from before the update moves any; from after it, the share of all blocks that were ever "
    "active, and the share of the active blocks that were not active at the start."
)
ONLY_SPARSE = ("index", "ages")
MAX_TABLE_ROWS = 24
MAX_EXPONENT = 700


def write_report(folder: RunFolder) -> None:
    """Writes `report.md` and its plots from `config.json` and `metrics.jsonl`, whatever records those hold.

    Raises ValueError where they cannot be written.
    """
    config, records = read_config(folder.config), read_metrics(folder.metrics)
    try:
        _write(folder, config, records)
    except OSError as error:
        raise ValueError(
            f"{folder.path}: the report could not be written ({error.strerror or error}); the run itself is saved; "
            f"mend that, then {folder.resume_command}"
        ) from error


def _write(folder: RunFolder, config: RunConfig, records: list[Record]) -> None:
    images = draw_plots(records, folder.path)
    parts = [
        f"# {config.method}, {config.shape_name}, {_sparsity(config)}",
        _result(config, records),
        *(f"![{CAPTIONS[name]}]({name})" for name in images if name == "loss.png"),
        "## Bytes",
        *_bytes(records, config.shard != "none"),
        *(f"![{CAPTIONS[name]}]({name})" for name in images if name == "bytes.png"),
        "## Topology",
        *_topology(records),
        *(f"![{CAPTIONS[name]}]({name})" for name in images if name == "churn.png"),
        "## Settings",
        _table(["option", "value"], _settings(config)),
    ]
    text = ("\n\n".join(parts) + "\n").encode(errors="backslashreplace")
    write_atomically(folder.report, lambda temporary: temporary.write_bytes(text))


def summarize(folder: RunFolder) -> str:
    """Returns one line: how well the run in `folder` predicts held-out text, and how many bytes its weights take."""
    records = read_metrics(folder.metrics)
    evals = of_kind(records, "eval")
    perplexity = f"{perplexity_of(evals[-1]['loss']):.4f}" if evals else "not recorded"
    return f"validation perplexity {perplexity}" + "".join(map(_bytes_sentence, of_kind(records, "bytes")[:1]))


def perplexity_of(loss: float) -> float:
    """Returns e to the loss, of a size that a float holds."""
    return math.exp(min(loss, MAX_EXPONENT))


def _bytes_sentence(record: Record) -> str:
    if not record["all"]["num_weights"]:
        return ""
    run, dense = (sum(record["all"][who].values()) / record["all"]["num_weights"] for who in ("run", "dense"))
    return f", {run:.2f} bytes per weight for weights, gradients and optimizer (dense AdamW: {dense:.2f})"


def _sparsity(config: RunConfig) -> str:
    return "dense" if config.method == "dense" else f"density {config.density:g}, block {config.block}"


def _settings(config: RunConfig) -> list[list[str]]:
    own = {} if config.model == NO_MODEL else {"model": f"{config.shape_name}, as config.json has it"}
    shown = vars(config) | own
    return [[name, str(value)] for name, value in shown.items()]


def _result(config: RunConfig, records: list[Record]) -> str:
    train = of_kind(records, "train")
    steps = max((record["step"] for record in records), default=0)
    rows = [
        *_validation_rows(config, records),
        ["training loss, first and last step", _first_and_last_loss(train)],
        ["steps and tokens", f"{steps:,} steps, {steps * config.step_tokens:,} tokens"],
        ["time in steps", _time(config, train)],
    ]
    if missing := steps_without_record(records, steps):
        rows.append(["steps without a record", f"{count_steps(missing):,} ({ranges_text(missing)})"])
    return _table(["result", "value"], rows)


def _validation_rows(config: RunConfig, records: list[Record]) -> list[list[str]]:
    evals = of_kind(records, "eval")
    if not evals:
        return [["validation loss", "not recorded"]]
    loss = evals[-1]["loss"]
    rows = [
        ["validation perplexity (per token)", f"{perplexity_of(loss):.4f}"],
        ["validation loss", f"{loss:.4f} nats per token"],
    ]
    if config.tokenizer == "bytes":
        rows.insert(1, ["validation bits per byte", f"{loss / math.log(2):.4f}"])
    return rows


def _first_and_last_loss(train: list[Record]) -> str:
    return f"{train[0]['loss']:.4f}, {train[-1]['loss']:.4f}" if train else "not recorded"


def _time(config: RunConfig, train: list[Record]) -> str:
    seconds, tokens = sum(record.get("seconds", 0) for record in train), len(train) * config.step_tokens
    if not seconds > 0:
        return "not recorded"
    return f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens per second on {config.device}"


def _bytes(records: list[Record], is_sharded: bool) -> list[str]:
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
    if is_sharded:
        note += " The bytes are those of all ranks together, the index counted once: each rank holds all of it."
    return [note, *tables]


def _bytes_table(counts: dict[str, Any], title: str) -> str:
    total, run, dense = counts["num_weights"], counts["run"], counts["dense"]
    rows = [_bytes_row(kind, run[kind], dense[kind], total) for kind in BYTE_KINDS]
    rows.append(_bytes_row("sum", sum(run.values()), sum(dense.values()), total))
    head = [f"{title} ({total:,} weights)", "bytes", "per weight", "dense AdamW", "per weight", "ratio"]
    return _table(head, rows)


def _bytes_row(kind: str, run: int, dense: int, total: int) -> list[str]:
    ratio = "-" if kind in ONLY_SPARSE or not dense else f"{run / dense:.3f}"
    return [kind, f"{run:,}", f"{run / total:.3f}", f"{dense:,}", f"{dense / total:.3f}", ratio]


def _topology(records: list[Record]) -> list[str]:
    events = [record["event"] for record in of_kind(records, "topology")]
    if not events:
        return ["The topology did not change in this run."]
    every = -(-len(events) // MAX_TABLE_ROWS)
    shown = [events[i] for i in range(len(events)) if i % every == 0 or i == len(events) - 1]
    summary = f"{len(events)} updates" + (f", every {every}th shown." if every > 1 else ".")
    head = ["step", "drop fraction", "blocks moved", "churn", "newcomers", "still alive", "mean age", "ever active"]
    head.append("moved since start")
    return [f"{summary} {COLUMNS}", _table(head, [_event_row(event) for event in shown])]


def _event_row(event: dict[str, Any]) -> list[str]:
    return [
        str(event["step"]),
        f"{event['drop_fraction']:.4f}",
        f"{event['num_dropped']:,}",
        f"{event['churn_fraction']:.4f}",
        _mean(event, "newcomer_fraction", ".3f"),
        _mean(event, "earlier_survival_fraction", ".3f"),
        _mean(event, "mean_age", ".1f"),
        _mean(event, "explored_fraction", ".3f"),
        _mean(event, "moved_fraction", ".3f"),
    ]


def _mean(event: dict[str, Any], key: str, form: str) -> str:
    """Returns the mean over the weights that have the number; records of older versions lack some."""
    values = [site[key] for site in event["sites"].values() if site.get(key) is not None]
    return format(sum(values) / len(values), form) if values else "-"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_escaped(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escaped(cell: str) -> str:
    """Keeps the characters of a path from ending a cell or a row."""
    return " ".join(cell.splitlines()).replace("|", "\\|")
