"""Alters the content of checkpoints and computes their checksum again."""

import copy
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

ODD: list[Any] = [
    -1,
    0,
    1,
    2**63,
    -(2**63),
    10**30,
    0.5,
    -0.5,
    float("nan"),
    float("inf"),
    1e300,
    True,
    False,
    None,
    "",
    "x",
    [],
    {},
    [1],
    {"a": 1},
    {"$tuple": [1.0, 2.0]},
    {"$tensor": "nowhere"},
    {"$items": [[1, 2]]},
    {"$items": [[[], 2]]},
    [[[]]],
]
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
]


def read_file(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Returns tensors and JSON of a checkpoint."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return tensors, json.loads(bytes(tensors.pop("json").tolist()))


def write_file(path: Path, tensors: dict[str, Tensor], body: Any) -> None:
    """Writes a checkpoint of this content. Its checksum is computed here, from the description of the format."""
    content = {name: tensor.clone() for name, tensor in tensors.items()}
    content["json"] = torch.frombuffer(bytearray(json.dumps(body).encode()), dtype=torch.uint8).clone()
    digest = hashlib.sha256(b"1")
    for name in sorted(content):
        digest.update(f"{name} {content[name].dtype} {tuple(content[name].shape)}".encode())
        digest.update(bytes(content[name].reshape(-1).view(torch.uint8).numpy()))
    save_file(content, path, {"smet_compile": json.dumps({"version": 1, "sha256": digest.hexdigest()})})


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the paths of all values in a JSON tree."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield (*path, key)
        yield from places(value, (*path, key))


def altered(tensors: dict[str, Tensor], body: Any, seed: int) -> tuple[str, dict[str, Tensor], Any]:
    """Returns what was changed, and the changed content: one place of the JSON, or one or two tensors."""
    chosen, tensors, body = random.Random(seed), dict(tensors), copy.deepcopy(body)
    if chosen.random() < 0.55:
        return _alter_json(chosen, body), tensors, body
    return _alter_tensor(chosen, tensors), tensors, body


def _alter_json(chosen: random.Random, body: Any) -> str:
    path = chosen.choice(list(places(body)))
    parent = body
    for key in path[:-1]:
        parent = parent[key]
    key, how = path[-1], chosen.choice(["drop", "rename", "odd", "odd", "odd", "twice", "swap", "nudge"])
    if how == "drop":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        value = parent.pop(key)
        parent[chosen.choice([key + "x", key[:-1], key.upper(), "$" + key, "0." + key])] = value
    elif how == "twice" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif how == "swap" and len(parent) > 1:
        other = chosen.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], parent[key]
    elif how == "nudge" and type(parent[key]) in (int, float):
        parent[key] = parent[key] + chosen.choice([1, -1, 0.25, 1e-9, 1000])
    else:
        parent[key] = copy.deepcopy(chosen.choice(ODD))
    return f"{how} {'.'.join(map(str, path))}"


def _alter_tensor(chosen: random.Random, tensors: dict[str, Tensor]) -> str:
    name = chosen.choice(sorted(tensors))
    tensor = tensors[name].clone()
    how = chosen.choice(
        ["drop", "dtype", "cut", "longer", "flat", "scalar", "value", "value", "flip", "flip", "swap", "fill"]
    )
    if how == "drop":
        del tensors[name]
        return f"{how} {name}"
    if how == "dtype":
        tensor = tensor.to(chosen.choice(DTYPES))
    elif how == "cut":
        tensor = tensor.reshape(-1)[: max(0, tensor.numel() - chosen.choice([1, 3, 8]))].clone()
    elif how == "longer":
        tensor = torch.cat([tensor.reshape(-1), tensor.reshape(-1)])
    elif how == "flat":
        tensor = tensor.reshape(1, -1)
    elif how == "scalar":
        tensor = torch.tensor(chosen.choice([0, 1, -1, 2**40, 0.5, float("nan")]))
    elif how == "value" and tensor.numel():
        odd = [float("nan"), float("inf"), -1, 1e30] if tensor.is_floating_point() else [-1, 0, 1, 255, 127, 2**40]
        value = chosen.choice(odd)
        tensor.view(-1)[chosen.randrange(tensor.numel())] = _fitting(value, tensor.dtype)
    elif how == "fill":
        tensor.fill_(_fitting(chosen.choice([0, 1, -1, 7]), tensor.dtype))
    elif how == "flip" and tensor.numel():
        data = tensor.view(-1).view(torch.uint8)
        data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        if tensor.dtype == torch.bool:
            data &= 1
    else:
        other = chosen.choice(sorted(tensors))
        tensors[other], tensor = tensor, tensors[other]
        how = f"swap with {other}:"
    tensors[name] = tensor.contiguous()
    return f"{how} {name}"


def _fitting(value: float, dtype: torch.dtype) -> float:
    """Returns the number as the dtype can hold it."""
    if dtype.is_floating_point or dtype.is_complex:
        return value
    if dtype == torch.bool:
        return value != 0
    largest = torch.iinfo(dtype).max
    return int(value) & largest if value > 0 or dtype == torch.uint8 else int(value)
