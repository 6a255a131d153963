"""``g3dswap cache``: look at, move and clean the options cache."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from g3dswap.errors import CacheError
from g3dswap.options import PATH, cache_option, force_option, json_option, print_table
from g3dswap.tc.cache import Cache, Entry

_SHOWN = (
    *("direction", "in_channels", "out_channels", "groups", "size", "kernel", "stride", "padding"),
    *("dilation", "dtype", "layout", "bias", "precision", "deterministic", "threads"),
)
"""The fields of a key that a list shows; `show` has them all."""


@click.group()
def cache() -> None:
    """Look at, move and clean the cache of tuned options."""


def identity(entry: Entry) -> str:
    """A short name for an entry, from its whole key."""
    return hashlib.sha256(json.dumps(entry.key, sort_keys=True).encode()).hexdigest()[:10]


def _record(entry: Entry) -> dict[str, Any]:
    return {"id": identity(entry), "created": entry.created, "key": entry.key, "value": entry.value}


@cache.command("path")
@cache_option
def path_(cache: Path | None) -> None:
    """Print the directory."""
    click.echo(Cache(cache).directory)


@cache.command("ls")
@cache_option
@json_option
def ls(cache: Path | None, as_json: bool) -> None:
    """List the entries."""
    store = Cache(cache)
    entries = store.entries()
    if as_json:
        click.echo(json.dumps([_record(entry) for entry in entries], indent=2))
        return
    if entries:
        table = Table("id", "device", "key", "created", box=None, pad_edge=False)
        for entry in entries:
            device = str(entry.key["device_name"])
            table.add_row(identity(entry), device, _summary(entry.key), entry.created[:16])
        print_table(table)
    click.echo(f"{len(entries)} entries in {store.directory}.")


def _summary(key: dict[str, Any]) -> str:
    """What a key is about, on one line: lists as 1x2x3, words without their names."""
    words = []
    for name in (name for name in _SHOWN if name in key):
        value = key[name]
        text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
        words.append(text if isinstance(value, str) else f"{name}={text}")
    return " ".join(words)


@cache.command("show")
@click.argument("id")
@cache_option
def show(id: str, cache: Path | None) -> None:
    """Print one entry whole, as JSON; ID is the beginning of what `ls` prints."""
    store = Cache(cache)
    found = [entry for entry in store.entries() if identity(entry).startswith(id)]
    if len(found) != 1:
        many = f"{len(found)} entries begin" if found else "no entry begins"
        raise CacheError(f"{many} with {id} in {store.directory}; `g3dswap cache ls` lists them.")
    click.echo(json.dumps(_record(found[0]), indent=2))


@cache.command("export")
@click.argument("file", type=PATH)
@cache_option
@force_option
def export(file: Path, cache: Path | None, force: bool) -> None:
    """Write all entries to FILE, or to one file a device if FILE is a directory."""
    store = Cache(cache)
    taken = [file / path.name for path in store.files()] if file.is_dir() else [file]
    if not force and (existing := next((path for path in taken if path.exists()), None)):
        raise CacheError(f"{existing} exists already; pass --force to replace it.")
    click.echo(f"Exported {store.export(file)} entries to {file}.")


@cache.command("import")
@click.argument("file", type=PATH)
@cache_option
def import_(file: Path, cache: Path | None) -> None:
    """Add the entries of FILE, or of a directory's files; where both have a key, the younger one stays."""
    store = Cache(cache)
    click.echo(f"Imported {store.load(file)} entries into {store.directory}.")


@cache.command("prune")
@cache_option
@click.option("--all", "everything", is_flag=True, help="Remove every entry.")
@click.option("--older-than", type=click.FloatRange(0), metavar="DAYS", help="Remove older entries.")
@click.option("--id", "ids", multiple=True, metavar="ID", help="Remove this entry.")
@click.option("--device-name", metavar="NAME", help="Remove the entries of this device.")
def prune(
    cache: Path | None,
    everything: bool,
    older_than: float | None,
    ids: tuple[str, ...],
    device_name: str | None,
) -> None:
    """Remove entries; those that fit every option given."""
    if not (everything or older_than is not None or ids or device_name):
        raise click.UsageError("Say which: --all, --older-than, --id or --device-name.")
    oldest = None if older_than is None else datetime.now(timezone.utc) - timedelta(days=older_than)

    def chosen(entry: Entry) -> bool:
        return (
            (oldest is None or entry.when < oldest)
            and (not ids or any(identity(entry).startswith(id) for id in ids))
            and (device_name is None or entry.key["device_name"] == device_name)
        )

    store = Cache(cache)
    click.echo(f"Removed {store.prune(chosen)} entries from {store.directory}.")
