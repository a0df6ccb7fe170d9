"""The files of a run."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from smet_compile.pretrain.config import RunConfig, read_config, write_config
from smet_compile.pretrain.metrics import read_metrics


@dataclass(frozen=True)
class RunFolder:
    """One folder holds one run; it counts as a run from the moment `config.json` is there."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    @property
    def resume_command(self) -> str:
        return f"python -m smet_compile pretrain --resume {shlex.quote(str(self.path))}"

    def expect_free(self) -> None:
        """Raise ValueError where another run lives here."""
        if self.config.exists():
            raise ValueError(
                f"--out: expected a folder without a run, got {self.path}, which holds one; "
                f"go on with it ({self.resume_command}) or choose another folder"
            )

    def create(self, config: RunConfig) -> None:
        """Make the folder a run."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_config(self.config, config)

    def open(self) -> RunConfig:
        """The config of the run that lives here; ValueError where there is none."""
        if not self.config.exists():
            what = "a folder without one" if self.path.is_dir() else "no such folder"
            raise ValueError(
                f"--resume: expected the folder of a run (with config.json), got {what}: {self.path}; "
                "begin a run with --out"
            )
        return read_config(self.config)

    def is_finished(self) -> bool:
        """Whether the last step was taken and saved."""
        records = read_metrics(self.metrics)
        return bool(records) and records[-1]["kind"] == "end"
