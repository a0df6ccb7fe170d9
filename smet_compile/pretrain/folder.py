"""The files of a run."""

import shlex
from contextlib import suppress
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
        """Raise ValueError where another run, or a file that a run would replace, lives here."""
        if self._exists(self.config, "--out"):
            raise ValueError(
                f"--out: expected a folder without a run, got {self.path}, which holds one; "
                f"go on with it ({self.resume_command}) or choose another folder"
            )
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out: expected a folder, got a file: {self.path}; choose another name")
        for path in (self.metrics, self.checkpoint, self.report):
            if path.exists():
                raise ValueError(
                    f"--out: expected a folder without a run, got {self.path}, which has no config.json but holds "
                    f"{path.name}; choose another folder"
                )

    def create(self, config: RunConfig) -> None:
        """Make the folder, which is there, a run."""
        write_config(self.config, config)

    def open(self) -> RunConfig:
        """The config of the run that lives here; ValueError where there is none."""
        if not self._exists(self.config, "--resume"):
            what = (
                "a folder without one" if self.path.is_dir() else "a file" if self.path.exists() else "no such folder"
            )
            raise ValueError(
                f"--resume: expected the folder of a run (with config.json), got {what}: {self.path}; "
                "begin a run with --out"
            )
        return read_config(self.config)

    def _exists(self, path: Path, option: str) -> bool:
        try:
            return path.exists()
        except OSError as error:
            raise ValueError(f"{option}: expected a folder, got {self.path} ({error.strerror})") from error

    def is_finished(self) -> bool:
        """Whether the last step was taken and saved."""
        records = read_metrics(self.metrics)
        return bool(records) and records[-1]["kind"] == "end"

    def remove_lone_checkpoint(self) -> None:
        """Remove a folder that holds nothing but a checkpoint: saving made it where the run's own was removed."""
        with suppress(OSError):
            if list(self.path.iterdir()) == [self.checkpoint]:
                self.checkpoint.unlink()
                self.path.rmdir()
