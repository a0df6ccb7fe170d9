"""Writes the model card of a compact model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from smet_compile.convert.report import num_active_weights
from smet_compile.hub.content import FILE, Content, topology_name, values_name
from smet_compile.hub.hugging_face import CONFIG
from smet_compile.ops import Site
from smet_compile.runtime.tree import Reordered
from smet_compile.shards import local

_FILE = "README.md"
_MARK = "<!-- Written by smet_compile.save_compact, and again at each save; without this line the card stays. -->"


def write(folder: Path, content: Content, sites: Mapping[str, Site]) -> None:
    """Writes the card, unless there is one that was not written here."""
    path = folder / _FILE
    if not path.exists() or _MARK in path.read_text(errors="replace"):
        path.write_text("\n".join(_lines(content, sites, (folder / CONFIG).is_file())) + "\n")


def _lines(content: Content, sites: Mapping[str, Site], is_hugging_face: bool) -> list[str]:
    compact, dense = _bytes(content, sites)
    num_weights = sum(site.whole.num_weights for site in sites.values())
    num_active = sum(num_active_weights(site.compact) for site in sites.values())
    density = f"{num_active / num_weights:.4f} ({num_active:,} of {num_weights:,})"
    load = 'model = smet.load_compact("FOLDER")'
    if not is_hugging_face:
        load = f'model = smet.load_compact("FOLDER", {content.class_name}(...))  # the dense model, of any weights'
    return [
        "---",
        "library_name: smet_compile",
        "tags: [smet_compile, sparse, sparse-training]",
        "---",
        "",
        _MARK,
        "",
        f"# {content.class_name}, sparse",
        "",
        f"{len(sites)} weights are compact: stored only where they are active.",
        "",
        "| | |",
        "|---|---|",
        f"| density of the compact weights | {density} |",
        f"| density by weight | {_range(site.density for site in sites.values())} |",
        f"| block shape | {_listed(_block_shape(site) for site in sites.values())} |",
        f"| method | {_method(content.method)} |",
        f"| bytes, compact | {compact:,} ({FILE}) |",
        f"| bytes, dense | {dense:,} |",
        f"| versions | {', '.join(f'{name} {version}' for name, version in content.versions.items())} |",
        "",
        "```python",
        "import smet_compile as smet",
        "",
        load,
        "dense = smet.export_dense(model)  # a plain module, for other libraries",
        "```",
    ]


def _bytes(content: Content, sites: Mapping[str, Site]) -> tuple[int, int]:
    """Returns the bytes of the tensors in the file, and those that they would take with dense weights."""
    compact_names = {name for weight in sites for name in (values_name(weight), topology_name(weight))}
    sizes = {name: _tensor_bytes(value) for name, value in content.tensors.items()}
    compact = {_place(name, content.tensors[name]) for name in compact_names}  # they may have further names
    others = {_place(name, value): sizes[name] for name, value in content.tensors.items()}
    others = {place: size for place, size in others.items() if place not in compact}
    dense = sum(site.whole.num_weights * site.values.element_size() for site in sites.values())
    return sum(others.values()) + sum(sizes[name] for name in compact_names), sum(others.values()) + dense


def _place(name: str, value: Any) -> int | str:
    """Returns where a tensor lies, which tied weights share, since they are stored once; else its name."""
    value = value.tensor if isinstance(value, Reordered) else value
    here = local(value) if isinstance(value, Tensor) else None
    return name if here is None or here.numel() == 0 else here.data_ptr()


def _tensor_bytes(value: Any) -> int:
    tensor = value.tensor if isinstance(value, Reordered) else value
    return tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else 0


def _method(method: Mapping[str, Any]) -> str:
    if not method:
        return "not recorded"
    stages = "" if method["density_schedule"] is None else ", with a schedule of densities"
    return (
        f"Sparse Memory-Efficient Training (arXiv 2606.00888): {method['num_updates']} topology updates in "
        f"{method['num_steps']:,} of {method['total_steps']:,} steps, every {method['every']}; drop "
        f'"{method["drop"]}", grow "{method["grow"]}"{stages}'
    )


def _block_shape(site: Site) -> str:
    text = "single weights" if site.layout.single_weights else "x".join(map(str, site.layout.block_shape))
    return text if site.compact.pattern is None else f"{text}, pattern {site.compact.pattern}"


def _listed(texts: Any) -> str:
    return "; ".join(dict.fromkeys(texts))


def _range(densities: Any) -> str:
    found = list(densities)
    return f"{min(found):.4f} to {max(found):.4f}"
