"""What lies where in a run folder, and the manifest: what is being run.

run.json                       what runs: written once, at the start
journal.sqlite                 what happened (journal.py)
checkpoints/NAME.safetensors   every array the next step reads
checkpoints/NAME.json          everything else, and the checksum of the arrays
lock                           who writes
live.json                      what a training says of itself while it runs (live.py)
control.jsonl                  what a live training is asked to do (control.py)
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loopscope.errors import RunError
from loopscope.run import files
from loopscope.run.lock import Lock, writer

FORMAT = 1
"""The version of the format, in run.json and in the journal."""


def unwritable(path: Path, error: Exception) -> RunError:
    """The refusal of a folder that cannot be written, before anything is trained."""
    reason = getattr(error, "strerror", None) or error
    return RunError(
        f"The run folder {str(path)!r} cannot be written: {reason}. Nothing was "
        "trained. Give `run` a folder that can be written."
    )


@dataclass(frozen=True)
class Folder:
    """A run folder, by path. Making one reads nothing."""

    path: Path

    @property
    def manifest_path(self) -> Path:
        """Of run.json."""
        return self.path / "run.json"

    @property
    def journal_path(self) -> Path:
        """Of the journal."""
        return self.path / "journal.sqlite"

    @property
    def checkpoints_path(self) -> Path:
        """Of the folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def lock_path(self) -> Path:
        """Of the lock."""
        return self.path / "lock"

    @property
    def live_path(self) -> Path:
        """Of what a training says of itself."""
        return self.path / "live.json"

    @property
    def control_path(self) -> Path:
        """Of what a training is asked to do."""
        return self.path / "control.jsonl"

    @property
    def exists(self) -> bool:
        """Whether there is a run."""
        return self.manifest_path.exists()

    def writer(self) -> dict[str, Any] | None:
        """Who writes it now: pid, host, since; or `None`."""
        return writer(self.lock_path)

    def lock(self) -> Lock:
        """The lock, not yet taken."""
        return Lock(self.lock_path)

    def make(self) -> None:
        """Make the folder, if need be.

        Raises:
            RunError: It cannot be made or written, or holds something else.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            ours = {"run.json", "journal.sqlite", "checkpoints", "lock"}
            ours |= {"live.json", "control.jsonl"}
            names = {n for n in os.listdir(self.path) if not n.startswith("journal.")}
            foreign = {n for n in names if not n.endswith(files.TEMPORARY)} - ours
            if not foreign or self.exists:
                self.checkpoints_path.mkdir(exist_ok=True)
            else:
                raise RunError(
                    f"{str(self.path)!r} is not a run and not empty: it holds "
                    f"{sorted(foreign)[0]!r}. Give the run a folder of its own."
                )
            probe = self.checkpoints_path / f"probe{files.TEMPORARY}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise unwritable(self.path, error) from error
        left = [*self.path.glob("journal.*")]
        left += self.checkpoints_path.glob("*.json")
        if left and not self.exists:
            raise RunError(
                f"{str(self.path)!r} holds {left[0].name!r} and no run.json: a run "
                "that has lost its manifest, or a part of one. Put run.json back, or "
                "give the run another folder."
            )

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Write run.json; from now on the folder is a run."""
        files.write(self.manifest_path, files.seal({"format": FORMAT, **manifest}))

    def forget(self) -> None:
        """Take away what a run has left that never came to its first checkpoint."""
        for path in self.path.glob("journal.sqlite*"):
            path.unlink(missing_ok=True)
        self.live_path.unlink(missing_ok=True)
        self.control_path.unlink(missing_ok=True)
        self.manifest_path.unlink(missing_ok=True)
        self.__dict__.pop("manifest", None)

    def leave_no_trace(self) -> None:
        """Take the folder away again if no run was begun in it."""
        if not self.exists:
            with contextlib.suppress(OSError):
                self.lock_path.unlink(missing_ok=True)
                self.checkpoints_path.rmdir()
                self.path.rmdir()

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What run.json says.

        Raises:
            RunError: There is none, it is damaged, or of a later format.
        """
        try:
            data = self.manifest_path.read_bytes()
        except OSError as error:
            raise RunError(
                f"There is no run in {str(self.path)!r} (no run.json in it: "
                f"{error.strerror}). `loopscope runs` lists what there is."
            ) from error
        manifest = files.unseal(data, str(self.manifest_path))
        if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
            raise RunError(f"{self.manifest_path} is damaged: it names no format")
        if manifest["format"] > FORMAT:
            raise RunError(
                f"{str(self.path)!r} has format {manifest['format']}; this version of "
                f"loopscope reads up to {FORMAT}. Install a newer one."
            )
        return manifest
