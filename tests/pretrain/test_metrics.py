from pathlib import Path

import pytest

from smet_compile.pretrain.metrics import MetricsLog, cut_back, read_metrics


def write_steps(path: Path, first: int, last: int) -> None:
    log = MetricsLog(path)
    for step in range(first, last + 1):
        log.write("train", step, loss=1 / step)
        log.write("eval", step, loss=step / 3)
    log.close()


def test_records_after_a_checkpoint_are_cut_and_written_once_more(tmp_path: Path) -> None:
    path, whole = tmp_path / "metrics.jsonl", tmp_path / "whole.jsonl"
    write_steps(path, 1, 9)
    cut_back(path, 4)
    write_steps(path, 5, 9)
    write_steps(whole, 1, 9)
    assert path.read_text() == whole.read_text()


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2)
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [record["step"] for record in read_metrics(path)] == [1, 1, 2, 2]
    cut_back(path, 2)
    assert path.read_text().endswith("}\n")


def test_no_room_is_an_error_at_once() -> None:
    with pytest.raises(OSError, match="No space left"):
        MetricsLog(Path("/dev/full")).write("train", 1, loss=1.0)


def test_no_file_is_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
