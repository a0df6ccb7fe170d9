"""Finds the options of a new run that have no effect beside the others."""

from collections.abc import Collection, Iterator

from smet_compile.pretrain.config import METHODS, STATIC, RunConfig, option_name

OF_SPARSE_METHODS = (
    "density", "block", "distribution", "lr_density_exponent", "every", "block_warmup", "initial_block_warmup",
    "drop_fraction", "final_drop_fraction", "schedule", "grow", "min_age", "pattern", "moment_dtype",
)  # fmt: skip
OF_UPDATES = ("drop_fraction", "final_drop_fraction", "grow", "min_age")
OF_AGES = ("block_warmup", "initial_block_warmup")


def unused_options(config: RunConfig, given: Collection[str]) -> list[str]:
    """Returns a line for each reason why some of the options `given` (names of fields) have no effect on the run."""
    lines = []
    for reason, names in _unused(config):
        found = [option_name(name) for name in names if name in given]
        if found:
            lines.append(f"note: {', '.join(found)} {'has' if len(found) == 1 else 'have'} no effect {reason}")
    return lines


def _unused(config: RunConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    method = METHODS[config.method]
    if method is None:
        yield f"with --method {config.method}", OF_SPARSE_METHODS
    elif config.schedule == "none":
        is_static = config.method == STATIC
        yield f"with --method {STATIC}" if is_static else "where the topology stays (--schedule none)", OF_UPDATES
    elif config.schedule == "constant":
        yield "with --schedule constant", ("final_drop_fraction",)
    if method is not None and method.naive:
        yield f"with --method {config.method}", OF_AGES
    if not config.data.startswith("hf:"):
        yield "without hf: data", ("column",)
