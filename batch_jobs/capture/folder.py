"""The folder of a capture: its manifest, its shards, and which of them are finished."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from batch_jobs.capture.settings import CaptureSettings
from batch_jobs.capture.shards import TextShard
from batch_jobs.config.difference import config_difference
from batch_jobs.errors import StudyError
from batch_jobs.files.atomic import write_atomically
from batch_jobs.files.documents import read_json
from batch_jobs.files.json_lines import RecordWriter, read_records

FORMAT = 1
METADATA_KEY = "vllm_steer_capture"


class CaptureFolder:
    """The folder at ``path``; nothing is written before ``open``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = path / "capture.json"
        self.records = path / "shards.jsonl"

    @contextmanager
    def open(self, settings: CaptureSettings) -> Iterator[RecordWriter]:
        """Hold the folder for a capture with these settings, and write its manifest if it is new.

        Yields:
            The writer for the records of finished shards.

        Raises:
            StudyError: the folder belongs to a capture with other settings, holds something else, or is in use.
        """
        if self.manifest.is_file():
            self._check(settings)
        elif self.path.is_dir() and any(one.name != ".lock" for one in self.path.iterdir()):
            raise StudyError(f"{self.path}: holds files and no capture.json; give an empty or new folder as --out.")
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StudyError(f"{self.path}: another capture writes there; wait for its end.") from error
            manifest = {"format": FORMAT, "digest": settings.digest, "settings": settings.record}
            write_atomically(self.manifest, json.dumps(manifest, indent=2) + "\n")
            with RecordWriter(self.records) as writer:
                yield writer

    def finished(self) -> dict[int, dict[str, Any]]:
        """The records of shards by number, as far as their files are there.

        Raises:
            StudyError: the file of records is damaged.
        """
        return {record["shard"]: record for record in read_records(self.records)}

    def is_finished(self, shard: TextShard, record: Mapping[str, Any] | None, digest: str) -> bool:
        """Whether a shard's file is there, whole, and what these settings make of these texts."""
        if record is None or record["first_text"] != shard.texts[0].place or record["texts"] != len(shard.texts):
            return False
        path = self.path / shard.file_name
        if not path.is_file() or path.stat().st_size != record["bytes"]:
            return False
        try:
            with safe_open(str(path), framework="numpy") as file:
                about = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        except (SafetensorError, OSError, ValueError):
            return False
        return bool(about.get("digest") == digest and about.get("shard") == shard.number)

    def _check(self, settings: CaptureSettings) -> None:
        advice = "give another folder as --out"
        stored = read_json(self.manifest, advice=advice)
        if not isinstance(stored, dict) or stored.get("format") != FORMAT:
            raise StudyError(f"{self.manifest}: is not the manifest of this version, format {FORMAT}; {advice}.")
        if stored.get("digest") != settings.digest:
            changes = config_difference(stored.get("settings", {}), settings.record)
            raise StudyError(
                f"{self.path}: belongs to a capture with other settings ({'; '.join(map(str, changes))}); use the same "
                f"settings, or {advice}."
            )
