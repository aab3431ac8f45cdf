"""Files of a pool that outlive its placement service: small files in one folder, each replaced before anybody hears of it."""

import json
import os
import secrets
from dataclasses import asdict
from pathlib import Path

from actors.control.desired import DesiredState
from trinity.config import AdapterRef, AdapterSet
from trinity.placement.table import PlacementTable
from trinity.rpc.messages import Load

KEPT_EPOCHS = 100


class PoolFiles:
    """`folder` must be the same after a restart."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._secret, self._host = folder / "secret", folder / "data_host"
        self._source, self._desired = folder / "source.json", folder / "wish.json"
        self._adapters = folder / "adapters.json"

    def forget(self) -> None:
        """A new pool of that name; it counts epochs from where the old one was."""
        self._source.unlink(missing_ok=True)
        self._desired.unlink(missing_ok=True)
        if (before := self.adapters()).refs:
            self.set_adapters(AdapterSet(before.number + 1))

    def newest_table(self) -> PlacementTable | None:
        epochs = sorted(self.folder.glob("epoch-*.json"))
        return PlacementTable.from_json(epochs[-1].read_text()) if epochs else None

    def add_table(self, table: PlacementTable) -> None:
        write(self._epoch(table.epoch), table.to_json())

    def drop_old_tables(self, epoch: int) -> None:
        self._epoch(epoch - KEPT_EPOCHS).unlink(missing_ok=True)

    def secret(self) -> bytes:
        """Made when first asked for; only its owner may read it. Not for two threads at once."""
        if not self._secret.is_file():
            self._secret.touch(mode=0o600)
            self._secret.write_bytes(secrets.token_bytes(32))
        return self._secret.read_bytes()

    def source(self) -> Load | None:
        return Load(**json.loads(self._source.read_text())) if self._source.is_file() else None

    def set_source(self, source: Load) -> None:
        write(self._source, json.dumps(asdict(source)))

    def desired(self) -> DesiredState | None:
        return DesiredState.from_json(self._desired.read_text()) if self._desired.is_file() else None

    def set_desired(self, desired: DesiredState) -> None:
        write(self._desired, desired.to_json())

    def adapters(self) -> AdapterSet:
        if not self._adapters.is_file():
            return AdapterSet()
        found = json.loads(self._adapters.read_text())
        return AdapterSet(found["number"], tuple(AdapterRef(**ref) for ref in found["refs"]))

    def set_adapters(self, adapters: AdapterSet) -> None:
        refs = [ref._asdict() for ref in adapters.refs]
        write(self._adapters, json.dumps({"number": adapters.number, "refs": refs}))

    def data_host(self) -> str:
        return self._host.read_text()

    def set_data_host(self, host: str) -> None:
        write(self._host, host)

    def _epoch(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:08d}.json"


def write(path: Path, text: str) -> None:
    """All of it or nothing, even if the machine stops now."""
    partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
